"""Make the tiny models under tests/golden with transformers and torch, and store their logits and greedy tokens.

    python scripts/make_golden.py [NAME ...]

Each directory gets config.json, model.safetensors and expected.npz: `prompt_I`, `logits_I` (float32, all positions)
and `greedy_I` for every prompt I. The reference is computed by the model as loaded back from the directory, so that it
belongs to the files and not to what was in memory. The same seeds give the same weights.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "golden"))

import tiny  # noqa: E402


def make(name: str, directory: Path) -> None:
    """Write one model, with the first seed whose greedy choices are all clear."""
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    case = tiny.CASES[name]
    for seed in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        built = tiny.build(case, seed)
        tiny.save(built, case, directory)
        how = {"quantization_config": Mxfp4Config(dequantize=True)} if case.mxfp4 else {}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **tiny.PLAIN, **how)
        prompts = tiny.prompts(seed)
        greedy = [tiny.torch_greedy(model.eval(), prompt, tiny.NEW_TOKENS) for prompt in prompts]
        gap = min(gap for _, gap in greedy)
        if gap >= tiny.MIN_GAP:
            break
    else:
        raise RuntimeError(f"{name}: no seed below 100 has a gap of {tiny.MIN_GAP} between the best two logits")
    if not np.array_equal(tiny.torch_logits(built, prompts[-1]), tiny.torch_logits(model, prompts[-1])):
        raise RuntimeError(f"{name}: the files do not give the model they were written from")
    arrays = {}
    for i, (prompt, (tokens, _)) in enumerate(zip(prompts, greedy, strict=True)):
        arrays[f"prompt_{i}"] = np.array(prompt, np.int32)
        arrays[f"logits_{i}"] = tiny.torch_logits(model, prompt)
        arrays[f"greedy_{i}"] = np.array(tokens, np.int32)
    np.savez_compressed(directory / "expected.npz", **arrays)
    spread = np.std(np.concatenate([arrays[f"logits_{i}"] for i in range(len(prompts))]))
    size = sum(path.stat().st_size for path in directory.iterdir()) // 1024
    print(f"{name:22s} seed {seed:2d}  smallest gap {gap:.4f}  logits' deviation {spread:.2f}  {size} KiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which models (default: all of {', '.join(tiny.CASES)})")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(tiny.CASES))
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}, the models are {', '.join(tiny.CASES)}")
    for name in arguments.names or tiny.CASES:
        make(name, ROOT / "tests" / "golden" / name)


if __name__ == "__main__":
    main()
