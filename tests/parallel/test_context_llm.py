"""Context parallelism behind `LLM(...)`: the tokens of one device, whatever else the engine does at the same time.

Star attention is another attention: it is compared with its own definition on one device.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

import tests.tiny_llm as tiny_llm
from jaxllm import SamplingParams
from jaxllm.mapping import CpType
from tests.tiny_llm import make_llm, prompts, tokens_of

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = [kind.name for kind in CpType]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def cp_config(kind: str, block: int = 8) -> dict[str, Any]:
    return {"cp_type": CpType[kind]} | ({"block_size": block, "cp_anchor_size": block - 3} if kind == "STAR" else {})


def generate(model: str, kind: str, block: int = 8, **settings: Any) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """Tokens of prompts together, of some of them once more (their pages are cached), and the engine's counters."""
    before, tiny_llm.MODEL = tiny_llm.MODEL, GOLDEN / model
    try:
        with make_llm(cp_config=cp_config(kind, block), **settings) as llm:
            found = [
                tokens_of(llm.generate(some, PARAMS, use_tqdm=False))
                for some in (prompts(12, seed=3), prompts(12, seed=3)[:4])
            ]
            return found, llm._engine.stats()
    finally:
        tiny_llm.MODEL = before


@cache
def alone(model: str, kind: str, block: int) -> list[list[list[int]]]:
    return generate(model, kind, block)[0]


def reference(model: str, kind: str, block: int = 8) -> list[list[list[int]]]:
    """On one device, where only star attention differs."""
    return alone(model, "STAR", block) if kind == "STAR" else alone(model, "RING", 8)


def need(devices: int) -> None:
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")


# 9 heads with 3 KV heads, tied; sliding windows; biases and norms of heads with 9 heads
QUICK = [("llama_gqa_tied", kind, 2, 2) for kind in KINDS] + [("mistral_window", kind, 3, 1) for kind in KINDS]
QUICK.append(("deepseek_v3", "STAR", 2, 1))  # the other kinds: test_expert_layouts.py
SLOW = [
    (model, kind, cp, tp)
    for model in ("llama_gqa_tied", "gemma3", "qwen3_tied_bias")
    for kind in KINDS
    for cp, tp in ((2, 1), (2, 3), (3, 2), (4, 1), (4, 2), (8, 1))
    # gemma3 here has 6 heads
    if not (kind == "ULYSSES" and cp * tp > (6 if model == "gemma3" else 9))
]


@pytest.mark.parametrize("model,kind,cp,tp", [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_tokens_of_one_device(model: str, kind: str, cp: int, tp: int) -> None:
    need(cp * tp)
    found, stats = generate(model, kind, context_parallel_size=cp, tensor_parallel_size=tp)
    assert found == reference(model, kind)
    # With STAR a page is a block on each rank: over eight it is longer than any of the prompts.
    assert (stats["cache_hits"] > 0) == (kind != "STAR" or cp * 8 < 40)


@pytest.mark.parametrize("kind", KINDS)
def test_preemption_and_the_plain_loop(kind: str) -> None:
    """So few pages that sequences are preempted and computed again; without the overlap scheduler."""
    need(2)
    settings = {"context_parallel_size": 2, "kv_tokens": 96, "disable_overlap_scheduler": True}
    found, stats = generate("llama_gqa_tied", kind, 4, **settings)
    assert found == reference("llama_gqa_tied", kind, 4)
    assert stats["preemptions"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_longer_than_the_pool_of_one_device(kind: str) -> None:
    """61 tokens of context over two devices with room for 32 tokens each (with ULYSSES: half of the heads of 64)."""
    need(2)
    prompt = prompts(1, seed=5, low=49, high=49)[0]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    before, tiny_llm.MODEL = tiny_llm.MODEL, GOLDEN / "llama_mha"
    try:
        results, sizes = [], []
        for size, tokens in ((1, 64), (2, 64)):
            settings = {"context_parallel_size": size, "cp_config": cp_config(kind)}
            with make_llm(kv_tokens=tokens, max_batch_size=1, batch_buckets=[1], **settings) as llm:
                results.append(tokens_of(llm.generate(prompt, params, use_tqdm=False)))
                pool = llm._engine._runner.stages[0].kv[0]
                sizes.append(max(shard.data.nbytes for shard in pool.addressable_shards))
    finally:
        tiny_llm.MODEL = before
    assert results[0] == results[1]
    dummy = 2 / 16  # a page of the dummy, relative to the 16 pages of 64 tokens
    heads = 4 / 3 if kind == "ULYSSES" else 1  # 3 heads on two ranks
    assert sizes[1] <= sizes[0] * heads * (0.5 + dummy)
