"""Attention data parallelism: requests on ranks of their own get the tokens that one device gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from tests.tiny_llm import make_llm, prompts, tokens_of, until

pytestmark = pytest.mark.timeout(300)

PROMPTS = prompts(12, seed=1)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
RICH = SamplingParams(
    max_tokens=8, ignore_eos=True, temperature=1.0, seed=11, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1
)


def run(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return tokens_of(llm.generate(PROMPTS, params, use_tqdm=False))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as engine:
        yield engine


@pytest.fixture(scope="module")
def lanes() -> Iterator[LLM]:
    with make_llm(tensor_parallel_size=2, enable_attention_dp=True) as engine:
        yield engine


def all_free(llm: LLM) -> bool:
    stats = llm.get_stats()
    return stats["pages_free"] == stats["pages"] and stats["running"] == stats["waiting"] == 0


def test_two_ranks_give_the_tokens_of_one(llm: LLM, lanes: LLM) -> None:
    for params in (GREEDY, RICH, GREEDY):
        assert run(lanes, params) == run(llm, params)
        assert all_free(lanes)
    assert lanes.get_stats()["pages"] == 2 * llm.get_stats()["pages"], "each rank has a pool of its own"
    hits = [pool.stats.hits for pool in lanes._engine._scheduler.pools]
    assert all(hits), f"both ranks found prompts in their caches: {hits}"


def test_logprobs(llm: LLM, lanes: LLM) -> None:
    outputs = [engine.generate(PROMPTS[:5], RICH, use_tqdm=False) for engine in (llm, lanes)]
    for one, two in zip(*outputs, strict=True):
        for field in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(one.outputs[0], field), getattr(two.outputs[0], field), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.keys() == b.keys()
                    values = [[entry[token].logprob for token in a] for entry in (a, b)]
                    np.testing.assert_allclose(values[0], values[1], rtol=0, atol=1e-4)


def test_an_idle_rank(llm: LLM, lanes: LLM) -> None:
    for engine in (llm, lanes):
        (output,) = engine.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == run(llm)[0]


def test_cancelling(llm: LLM, lanes: LLM) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    results = [lanes.generate_async(prompt, endless) for prompt in PROMPTS + PROMPTS]
    for result in results:
        result.abort()
        result.result(timeout=60)
    assert until(lambda: all_free(lanes))
    assert run(lanes) == run(llm)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "kv_tokens": 80,
            "attention_dp_config": {"enable_balance": True, "timeout_iters": 3, "batching_wait_iters": 2},
        },
        {"pipeline_parallel_size": 2},
    ],
    ids=["preemption and waiting", "two stages"],
)
def test_other_ways_to_run(llm: LLM, settings: dict[str, Any]) -> None:
    with make_llm(tensor_parallel_size=2, enable_attention_dp=True, **settings) as engine:
        assert run(engine) == run(llm)
        assert all_free(engine)
        engine._engine._scheduler.check()
        if "kv_tokens" in settings:
            assert engine.get_stats()["preemptions"] > 0
            assert engine._engine._scheduler.num_held_back > 0
