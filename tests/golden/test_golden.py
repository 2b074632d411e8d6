"""jaxllm's logits and greedy tokens against transformers, for tiny models of every family.

The reference numbers are stored beside each model (`scripts/make_golden.py` makes them); where torch is installed the
same comparison is made live with other weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.models.registry import config_from_hf
from jaxllm.weights.resolve import resolve_model

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import tiny  # noqa: E402
from full_logits import FullLogits  # noqa: E402

TOLERANCE = 1e-3
"""On the largest absolute logit difference; float32 rounding alone makes about 1e-5."""


def expected(name: str) -> list[tuple[list[int], np.ndarray, list[int]]]:
    """Prompt, logits [T, V] and greedy tokens of every stored prompt."""
    with np.load(ROOT / name / "expected.npz") as file:
        return [
            (file[f"prompt_{i}"].tolist(), file[f"logits_{i}"], file[f"greedy_{i}"].tolist())
            for i in range(len(file.files) // 3)
        ]


def full_logits(directory: Path, tp: int = 1) -> FullLogits:
    files = resolve_model(directory)
    assert files.config is not None
    source = files.open()
    try:
        return FullLogits(config_from_hf(files.config), source, tp)
    finally:
        source.close()


def compare(model: FullLogits, prompts: list[list[int]], wanted: list[np.ndarray], tile: int | None) -> float:
    """The largest absolute difference over all positions of all prompts."""
    logits = model(prompts, tile)
    for ours, theirs in zip(logits, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert np.isfinite(ours).all()
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(logits, wanted, strict=True))


def test_every_model_is_stored() -> None:
    assert {path.name for path in ROOT.iterdir() if (path / "config.json").exists()} == set(tiny.CASES)
    size = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())
    assert size < 6 * 2**20


def test_padding_is_zeros_all_the_way() -> None:
    prompts, _, _ = zip(*expected("llama_mha"), strict=True)
    model = full_logits(ROOT / "llama_mha")
    model(list(prompts), 16)
    padding = model.positions < 0
    assert padding.any() and model.hidden is not None
    assert not model.hidden[padding].any() and model.hidden[~padding].any(axis=1).all()


@pytest.mark.parametrize("name", tiny.CASES)
def test_logits(name: str, record_property: Any) -> None:
    prompts, wanted, _ = zip(*expected(name), strict=True)
    model = full_logits(ROOT / name)
    # decode rows, then tiles shorter and longer than prompts, windows and pages
    for tile in (None, 3, 16):
        difference = compare(model, list(prompts), list(wanted), tile)
        record_property(f"max_logit_difference_tile_{tile}", difference)
        assert difference <= TOLERANCE


# one of each kind that padding and replication of heads, biases and norms could break
SHARDED = (
    "llama_gqa_tied",
    "llama_mlp_bias",
    "llama_attention_bias",
    "tinyllama",
    "qwen2",
    "qwen3_tied_bias",
    "gemma3",
)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("name", SHARDED)
def test_logits_sharded(name: str, tp: int) -> None:
    if len(jax.devices()) < tp:
        pytest.skip(f"needs {tp} devices")
    prompts, wanted, _ = zip(*expected(name), strict=True)
    assert compare(full_logits(ROOT / name, tp), list(prompts), list(wanted), 8) <= TOLERANCE


@pytest.fixture(scope="module", params=tiny.CASES)
def llm(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    with LLM(
        ROOT / request.param,
        skip_tokenizer_init=True,
        dtype="float32",
        max_batch_size=8,
        max_num_tokens=32,  # less than the longest prompt: prefill goes in chunks
        max_seq_len=64,
        kv_cache_config={"tokens_per_block": 4, "max_tokens": 1024},
        batch_buckets=[8],
        token_buckets=[32],
        progress=False,
    ) as engine:
        yield request.param, engine


def test_greedy(llm: tuple[str, LLM]) -> None:
    name, engine = llm
    prompts, _, wanted = zip(*expected(name), strict=True)
    params = SamplingParams(max_tokens=tiny.NEW_TOKENS, ignore_eos=True)
    together = engine.generate(list(prompts), params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == list(wanted)
    # once more, now that the prompts' pages are in the prefix cache
    alone = [engine.generate(prompt, params, use_tqdm=False) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in alone] == list(wanted)


SLOW_LIVE = ("mixtral_window", "qwen3_moe_step", "deepseek_v2", "gpt_oss")
"""Others of their kind are compared live by default."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_LIVE else name for name in tiny.CASES]
)
def test_live(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    seed = 4321
    reference = tiny.build(tiny.CASES[name], seed)
    tiny.save(reference, tiny.CASES[name], tmp_path)
    prompts = tiny.prompts(seed)
    wanted = [tiny.torch_logits(reference, prompt) for prompt in prompts]
    assert compare(full_logits(tmp_path), prompts, wanted, 4) <= TOLERANCE
