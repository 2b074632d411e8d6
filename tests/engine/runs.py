"""Prompts for the tiny model's engine, and what is asked of it in many tests."""

from __future__ import annotations

from typing import Any

from jaxllm import LLM, SamplingParams
from tests.tiny_llm import prompts, tokens_of

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
PROMPTS = prompts(12, seed=1)
SHARED = prompts(1, seed=2, low=30, high=30)[0]


def run(llm: LLM, inputs: Any, params: Any = GREEDY, **kwargs: Any) -> list[list[int]]:
    return tokens_of(llm.generate(inputs, params, use_tqdm=False, **kwargs))


def all_free(llm: LLM) -> bool:
    stats = llm.get_stats()
    return stats["pages_free"] == stats["pages"] and stats["running"] == stats["waiting"] == 0


def check(llm: LLM, wanted: list[list[int]]) -> None:
    assert run(llm, PROMPTS) == wanted
    assert all_free(llm)
    llm._engine._scheduler.check()
