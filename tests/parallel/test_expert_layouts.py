"""Layouts of tensor, expert, pipeline and context parallelism and attention DP, and both ways of bringing tokens to
experts: the greedy tokens of a Mixtral, a Qwen3-MoE, a DeepSeek-V3 and a gpt-oss that transformers computed.

A chosen subset runs by default; all of them with

    python -m tests.parallel.test_expert_layouts [MODEL ...] [FIRST:LAST:STEP]     prints the table as it goes
    python -m pytest -m slow tests/parallel/test_expert_layouts.py
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.mapping import CpType
from tests.parallel.test_matrix import DEVICES, only_greedy

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = {"mixtral": 2, "qwen3_moe": 3, "deepseek_v3": 3, "gpt_oss": 3}
HEADS = {"mixtral": 8, "qwen3_moe": 6, "deepseek_v3": 5, "gpt_oss": 6}


@dataclass(frozen=True)
class Case:
    """One layout of one of the golden models."""

    model: str
    tp: int = 1
    ep: int = 1
    pp: int = 1
    cp: int = 1
    kind: CpType | None = None
    attention_dp: bool = False
    dispatch: str = "auto"

    def __str__(self) -> str:
        parts = [self.model, f"tp{self.tp}", f"ep{self.ep}", f"pp{self.pp}", f"cp{self.cp}"]
        parts += [self.kind.name] if self.kind else []
        parts += ["ADP"] if self.attention_dp else []
        return "-".join([*parts, self.dispatch])

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "tensor_parallel_size": self.tp,
            "moe_expert_parallel_size": self.ep,
            "pipeline_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "cp_config": {"cp_type": self.kind or CpType.ULYSSES},
            "enable_attention_dp": self.attention_dp,
            # half of the lanes' prompts at a time
            "moe_config": {"dispatch": self.dispatch, "max_num_tokens": 24 if self.attention_dp else None},
        }

    @property
    def possible(self) -> bool:
        """Whether there are layers for the stages, and heads for the ranks."""
        ranks = 1 if self.attention_dp else self.tp * self.ep
        ranks *= self.cp if self.kind is CpType.ULYSSES else 1
        if self.model == "deepseek_v3" and self.cp > 1:
            return False
        return self.pp <= LAYERS[self.model] and ranks <= HEADS[self.model]


def every_case() -> Iterator[Case]:
    """All layouts with expert parallelism on up to 8 devices; and tensor parallelism of the experts alone."""
    sizes = [
        (tp, ep, pp, cp)
        for tp in (1, 2, 3, 4, 8)
        for ep in (1, 2, 4, 8)
        for pp in (1, 2)
        for cp in (1, 2)
        if tp * ep > 1 and tp * ep * pp * cp <= DEVICES
    ]
    for model in LAYERS:
        for tp, ep, pp, cp in sizes:
            for kind in (CpType.ULYSSES, CpType.RING, CpType.HELIX) if cp > 1 else (None,):
                for attention_dp in (False, True):
                    for dispatch in ("replicate", "all_to_all", "ragged") if ep > 1 else ("replicate",):
                        case = Case(model, tp, ep, pp, cp, kind, attention_dp, dispatch)
                        if case.possible:
                            yield case


def answers(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """The greedy tokens of a layout, and those of transformers."""
    with np.load(GOLDEN / case.model / "expected.npz") as file:
        count = len(file.files) // 3
        prompts = [file[f"prompt_{i}"].tolist() for i in range(count)]
        wanted = [file[f"greedy_{i}"].tolist() for i in range(count)]
    with (
        only_greedy(),
        LLM(
            GOLDEN / case.model,
            skip_tokenizer_init=True,
            dtype="float32",
            max_batch_size=4,
            max_num_tokens=48,
            max_seq_len=64,
            kv_cache_config={"tokens_per_block": 4, "max_tokens": 640},
            batch_buckets=[4],
            token_buckets=[48],
            progress=False,
            **case.settings,
        ) as llm,
    ):
        params = SamplingParams(max_tokens=len(wanted[0]), ignore_eos=True)
        return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)], wanted


CHOSEN = [
    Case("mixtral", tp=2, ep=4, dispatch="ragged"),
    Case("qwen3_moe", tp=2, ep=4, attention_dp=True, dispatch="all_to_all"),
    Case("qwen3_moe", tp=2, ep=2, cp=2, kind=CpType.HELIX),
    Case("deepseek_v3", tp=1, ep=2, cp=2, kind=CpType.HELIX),
    Case("gpt_oss", tp=2, ep=2, cp=2, kind=CpType.HELIX),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen_layouts(case: Case) -> None:
    found, wanted = answers(case)
    assert found == wanted


def test_experts_as_a_part_of_tensor_parallelism(caplog: pytest.LogCaptureFixture) -> None:
    """The other reading of the sizes: eight devices, whose expert groups are a part of tp."""
    with caplog.at_level(logging.INFO, "jaxllm"):
        found, wanted = answers(Case("mixtral", tp=8, ep=4))
    assert "tp x pp x cp = 8 devices, expert groups being a part of tp" in caplog.text
    assert found == wanted


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", list(every_case()), ids=str)
def test_every_layout(case: Case) -> None:
    found, wanted = answers(case)
    assert found == wanted


def main(arguments: list[str]) -> int:
    """Runs layouts, and prints a row for each; 1 when any was wrong."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    models = [name for name in arguments if ":" not in name] or list(LAYERS)
    first, last, step = (*next((map(int, a.split(":")) for a in arguments if ":" in a), (1, 10**6)), 1)[:3]
    wrong = 0
    for number, case in enumerate(every_case(), 1):
        if case.model not in models or number not in range(first, last + 1, step):
            continue
        started = time.perf_counter()
        try:
            found, wanted = answers(case)
            result = "equal" if found == wanted else "WRONG: other tokens"
        except Exception as error:
            result = f"WRONG: {type(error).__name__}: {str(error)[:120]!r}"
        wrong += result != "equal"
        row = f"{number:>4}  {case.model:<12}{case.tp:>2} {case.ep:>2} {case.pp:>2} {case.cp:>2}"
        row += f"  {case.kind.name if case.kind else '-':<8}{'ADP' if case.attention_dp else '-':<4}{case.dispatch:<11}"
        print(f"{row}  {time.perf_counter() - started:6.1f} s  {result}", flush=True)
    print(f"{wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
