"""Every layout of tensor, pipeline and context parallelism and attention DP that fits 8 devices, against one device.

Greedy tokens have to be equal; Star attention, which is approximate, has its own definition on one device. A chosen
subset runs by default; all of them with

    python -m tests.parallel.test_matrix [tiny|smollm2] [FIRST:LAST]        prints the table as it goes
    python -m pytest -m slow tests/parallel/test_matrix.py
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.runner import Runner
from jaxllm.engine.slots import Variant
from jaxllm.mapping import CpType

DEVICES = 8
PAGE = 4
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 203,
    "hidden_size": 54,
    "intermediate_size": 74,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
LAYERS = {"tiny": 5, "smollm2": 30}


@dataclass(frozen=True)
class Case:
    """One layout. `kind` is None without context parallelism."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    kind: CpType | None = None
    attention_dp: bool = False

    def __str__(self) -> str:
        parts = [f"tp{self.tp}", f"pp{self.pp}", f"cp{self.cp}"]
        parts += [self.kind.name] if self.kind else []
        parts += ["ADP"] if self.attention_dp else []
        return "-".join(parts)

    @property
    def settings(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "tensor_parallel_size": self.tp,
            "pipeline_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "enable_attention_dp": self.attention_dp,
        }
        if self.kind is not None:
            out["cp_config"] = {"cp_type": self.kind}
            if self.kind is CpType.STAR:
                out["cp_config"] |= {"block_size": 16, "cp_anchor_size": 8}
        return out

    def refusal(self, model: str) -> str | None:
        """Part of the message with which this layout is refused; None when it has to run."""
        if self.pp > LAYERS[model]:
            return "is more than the model's"
        return None


def every_case() -> Iterator[Case]:
    """All layouts on up to 8 devices, the smallest first."""
    sizes = [
        (tp, pp, cp)
        for tp in range(1, DEVICES + 1)
        for pp in range(1, DEVICES + 1)
        for cp in range(1, DEVICES + 1)
        if 1 < tp * pp * cp <= DEVICES
    ]
    for tp, pp, cp in sorted(sizes, key=lambda s: (np.prod(s), s)):
        kinds: list[CpType | None] = [None] if cp == 1 else list(CpType)
        for kind in kinds:
            for attention_dp in (False, True) if tp > 1 else (False,):
                yield Case(tp, pp, cp, kind, attention_dp)


@cache
def prompts(model: str) -> list[list[int]]:
    """Prompts of less than a page up to several chunks, the longest of more than the 128 tokens that are a page of Star
    attention on 8 devices; two share a beginning."""
    rng = np.random.default_rng(5)
    top = 203 if model == "tiny" else 40_000
    found = [rng.integers(3, top, length).tolist() for length in (1, 3, 4, 17, 33, 70, 130)]
    return [*found, found[-1][:64] + found[3]]


@cache
def _tiny_directory() -> TemporaryDirectory:
    directory = TemporaryDirectory(prefix="jaxllm-matrix-")
    (Path(directory.name) / "config.json").write_text(json.dumps(TINY))
    return directory


@contextmanager
def only_greedy() -> Iterator[None]:
    """Compiles no samplers, which is half the time: greedy tokens need none."""
    jobs = Runner._jobs
    with patch.object(
        Runner, "_jobs", lambda self: {k: v for k, v in jobs(self).items() if not isinstance(k[1], Variant)}
    ):
        yield


def answer(model: str, case: Case) -> list[list[int]]:
    """The greedy tokens of a layout: prompts together, then again, so that the prefix cache is used."""
    settings: dict[str, Any] = {"load_format": "dummy"} if model == "tiny" else {}
    with (
        only_greedy(),
        LLM(
            _tiny_directory().name if model == "tiny" else "smollm2-135m",
            skip_tokenizer_init=True,
            dtype="float32",
            seed=1,
            max_batch_size=4,
            max_num_tokens=48,
            max_seq_len=160,
            kv_cache_config={"tokens_per_block": PAGE, "max_tokens": 640},
            batch_buckets=[4],
            token_buckets=[48],
            progress=False,
            **settings,
            **case.settings,
        ) as llm,
    ):
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        found = [
            [output.outputs[0].token_ids for output in llm.generate(prompts(model), params, use_tqdm=False)]
            for _ in range(2)
        ]
        assert found[0] == found[1], "another answer with the prompts in the prefix cache"
        stats = llm.get_stats()
        assert stats["cache_hits"] > 0 and stats["pages_free"] == stats["pages"]
        return found[0]


@cache
def truth(model: str, star: bool) -> list[list[int]]:
    """The answer of one device."""
    return answer(model, Case(kind=CpType.STAR if star else None))


def check(model: str, case: Case) -> str:
    """What happened, in a word; AssertionError when it is wrong."""
    refusal = case.refusal(model)
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            answer(model, case)
        return "refused"
    wanted = truth(model, case.kind is CpType.STAR)
    got = answer(model, case)
    wrong = [i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b]
    assert not wrong, f"{case}: other tokens than one device's for prompts {wrong}"
    return "equal"


CHOSEN = [
    Case(tp=2, pp=2),
    Case(tp=2, pp=2, attention_dp=True),
    Case(pp=2, cp=2, kind=CpType.RING),
    Case(tp=2, pp=2, cp=2, kind=CpType.ULYSSES),
    Case(tp=2, pp=2, cp=2, kind=CpType.HELIX),
    Case(tp=2, cp=2, kind=CpType.STAR),
    Case(tp=2, cp=2, kind=CpType.RING, attention_dp=True),
    Case(pp=3, cp=2, kind=CpType.STAR),
]


def test_the_single_device_truths_differ() -> None:
    """Otherwise Star attention was not tested."""
    assert truth("tiny", False) != truth("tiny", True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen_layouts(case: Case) -> None:
    assert check("tiny", case) == "equal"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", list(every_case()), ids=str)
@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_every_layout(model: str, case: Case) -> None:
    check(model, case)


def main(arguments: list[str]) -> int:
    """Runs layouts, and prints a row for each; 1 when any was wrong."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    models = [name for name in arguments if ":" not in name] or ["tiny", "smollm2"]
    first, last = next((tuple(map(int, a.split(":"))) for a in arguments if ":" in a), (1, 10**6))
    wrong = 0
    for model in models:
        cases = list(every_case())
        for number, case in enumerate(cases, 1):
            if not first <= number <= last:
                continue
            started = time.perf_counter()
            try:
                result = check(model, case)
            except Exception as error:
                wrong += 1
                result = f"WRONG: {type(error).__name__}: {str(error)[:120]!r}"
            seconds = time.perf_counter() - started
            row = f"{number:>3}/{len(cases)}  {case.tp:>2} {case.pp:>2} {case.cp:>2}"
            row += f"  {case.kind.name if case.kind else '-':<8}{'ADP' if case.attention_dp else '-':<4}"
            print(f"{model:<8} {row}  {seconds:6.1f} s  {result}", flush=True)
    print(f"{wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
