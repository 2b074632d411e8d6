"""Several decode steps in one dispatch give what one at a time gives, and are only taken where nobody loses by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.config import EngineConfig
from jaxllm.engine.request import Update
from jaxllm.settings import ConfigError
from tests.engine.scheduling import add, make, prompt, turn
from tests.engine.test_compiles import EVENTS, counting
from tests.tiny_llm import EOS, PAGE, make_llm, prompts, submit, until

pytestmark = [pytest.mark.timeout(300)]

STEPS = 4
PROMPTS = prompts(14, seed=1)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.3, top_p=0.95, seed=3)
OTHERS = {
    "ends": SamplingParams(max_tokens=30, temperature=1.5, seed=7, stop_token_ids=list(range(20, 40))),
    "stop strings": SamplingParams(max_tokens=24, ignore_eos=True, stop=["e", "th", "a"]),
    "logprobs": SamplingParams(max_tokens=9, ignore_eos=True, logprobs=2),
    "penalties": SamplingParams(max_tokens=18, ignore_eos=True, repetition_penalty=1.4, frequency_penalty=0.3),
    "held back": SamplingParams(max_tokens=11, temperature=0.8, seed=1, min_tokens=6, stop_token_ids=[EOS, 50]),
    "several": SamplingParams(max_tokens=10, ignore_eos=True, n=3, temperature=1.0, seed=9),
}


@pytest.fixture(scope="module")
def repeating(tokenizer_dir: Any) -> Iterator[LLM]:
    with make_llm(tokenizer_dir, num_scheduler_steps=STEPS) as engine:
        yield engine


def run(llm: LLM, inputs: Any, params: Any) -> list[Any]:
    """Tokens, text, reasons and logprobs of every completion."""
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [
        (
            c.token_ids,
            c.text,
            c.finish_reason,
            c.stop_reason,
            [] if c.logprobs is None else list(map(sorted, c.logprobs)),
        )
        for output in outputs
        for c in output.outputs
    ]


def dispatches(llm: LLM) -> int:
    kept = llm._engine.iterations.since(0)
    return kept[-1].number if kept else 0


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_same_tokens_in_fewer_dispatches(llm: LLM, repeating: LLM, params: SamplingParams) -> None:
    lengths = [replace(params, max_tokens=5 + 3 * i) for i in range(8)]
    wanted = run(llm, PROMPTS[:8], lengths)
    steps, before = repeating.get_stats()["steps"], dispatches(repeating)
    with counting() as seen:
        assert run(repeating, PROMPTS[:8], lengths) == wanted
    assert not any(seen[event] for event in EVENTS), seen
    stats = repeating.get_stats()
    assert until(lambda: dispatches(repeating) > before)
    # 26 decode steps at least, of which the last ones are fewer than a dispatch has
    assert dispatches(repeating) - before < 0.6 * (stats["steps"] - steps)
    assert stats["pages_free"] == stats["pages"] and stats["running"] == 0
    repeating._engine._scheduler.check()


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_request(llm: LLM, repeating: LLM, name: str) -> None:
    """Alone, and beside requests that take several steps; more of them than slots, so that some have to wait."""
    mixed = [OTHERS[name] if i % 3 else replace(GREEDY, max_tokens=4 + i) for i in range(len(PROMPTS))]
    assert run(repeating, PROMPTS, OTHERS[name]) == run(llm, PROMPTS, OTHERS[name])
    assert run(repeating, PROMPTS, mixed) == run(llm, PROMPTS, mixed)
    assert repeating.get_stats()["pages_free"] == repeating.get_stats()["pages"]
    repeating._engine._scheduler.check()


def test_pages_filled_within_a_dispatch_are_reused(llm: LLM, repeating: LLM) -> None:
    (first,) = run(repeating, PROMPTS[3:4], GREEDY)
    hits = repeating.get_stats()["cache_hits"]
    again = PROMPTS[3] + first[0][:18]
    assert run(repeating, [again], replace(GREEDY, max_tokens=2))[0][0] == first[0][18:]
    assert repeating.get_stats()["cache_hits"] - hits == (len(again) - 1) // PAGE


def test_preemption(llm: LLM) -> None:
    wanted = run(llm, PROMPTS, GREEDY)
    with make_llm(num_scheduler_steps=STEPS, kv_tokens=80) as tight:
        assert [one[0] for one in run(tight, PROMPTS, GREEDY)] == [one[0] for one in wanted]
        stats = tight.get_stats()
        assert stats["preemptions"] > 0 and stats["pages_free"] == stats["pages"]
        assert dispatches(tight) < stats["steps"]
        tight._engine._scheduler.check()


def test_streams_hear_of_a_dispatch_at_once(repeating: LLM) -> None:
    seen: list[Update] = []
    submit(repeating, 10**6, PROMPTS[0], replace(GREEDY, max_tokens=1 + 3 * STEPS), seen.append)
    assert until(lambda: bool(seen) and seen[-1].finish_reason is not None)
    assert [len(update.token_ids) for update in seen] == [1, STEPS, STEPS, STEPS]


def test_the_pool_stays_where_it_is(repeating: LLM) -> None:
    """Beside its arguments and results a program needs less than one layer's pages: they are not copied in the loop."""
    runner = repeating._engine._runner
    pool = math.prod(runner.stages[0].kv[0].shape) * 4
    repeated = {key[1:]: p for key, p in runner._programs.items() if key[0] == "repeated"}
    assert len(repeated) == 2
    for program in repeated.values():
        memory = program.memory_analysis()
        single = runner.stages[0].programs[runner.buckets[-1]].memory_analysis()
        assert memory.alias_size_in_bytes >= len(runner.stages[0].kv) * pool
        assert memory.temp_size_in_bytes < single.temp_size_in_bytes + pool / 2


LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel_size": 2, "enable_attention_dp": True},
    {"context_parallel_size": 2, "cp_config": {"cp_type": "RING"}},
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["attention-dp", "ring"])
def test_layouts(llm: LLM, layout: dict[str, Any]) -> None:
    lengths = [replace(GREEDY if i % 2 else SAMPLED, max_tokens=5 + 2 * i) for i in range(len(PROMPTS))]
    wanted = run(llm, PROMPTS, lengths)
    with make_llm(num_scheduler_steps=STEPS, **layout) as engine:
        assert [one[0] for one in run(engine, PROMPTS, lengths)] == [one[0] for one in wanted]
        assert dispatches(engine) < engine.get_stats()["steps"]


# ---- when ---------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_it() -> None:
    scheduler = make(max_batch_size=2)
    for length in (9, 20):
        add(scheduler, prompt(3), max_tokens=length, ignore_eos=True)
    turn(scheduler)
    step = scheduler.schedule()
    assert step is not None and len(step.decodes) == 2
    assert scheduler.can_repeat(step, 4) and scheduler.can_repeat(step, 8), "what ends earlier sits the rest out"
    assert not scheduler.can_repeat(step, 20), "nobody has as many tokens to go"
    add(scheduler, prompt(3), max_tokens=4, ignore_eos=True)
    assert scheduler.can_repeat(step, 8), "no slot is free sooner"
    assert not scheduler.can_repeat(step, 9), "one would be free before the end"
    scheduler.repeat(step, 8)
    assert step.counts == [8, 8] and step.repeats == 8 and step.num_tokens == 16
    for token in range(8):
        scheduler.update(step, [50 + token] * 2)
    scheduler.check()
    assert len(step.decodes[1].tokens) == 12 and step.decodes[0].finished
    step = scheduler.schedule()
    assert step is not None and step.prefills and not scheduler.can_repeat(step, 2)


def test_not_while_a_slot_is_about_to_be_free() -> None:
    """The last token of a sequence is on its way: whoever waits for the slot would wait for all of the repeats."""
    scheduler = make(max_batch_size=2)
    for length in (2, 30):
        add(scheduler, prompt(3), max_tokens=length, ignore_eos=True)
    turn(scheduler)
    assert scheduler.schedule() is not None  # nobody has read it yet
    step = scheduler.schedule()
    assert step is not None and len(step.decodes) == 1
    assert scheduler.can_repeat(step, 8), "nobody waits"
    add(scheduler, prompt(3), max_tokens=4, ignore_eos=True)
    assert not scheduler.can_repeat(step, 8)


def test_the_step_tells_who_got_pages_for_it() -> None:
    """The device's page tables are brought up to date by it."""
    scheduler = make(prefix_cache=False)
    for length in (3, 6):
        add(scheduler, prompt(length), max_tokens=30, ignore_eos=True)
    turn(scheduler)
    step = scheduler.schedule()
    assert step is not None and step.positions == [3, 6] and step.grown == []
    scheduler.repeat(step, 2)
    assert step.grown == [0] and [len(seq.pages) for seq in step.decodes] == [2, 2]
    step = scheduler.schedule()
    assert step is not None and step.positions == [5, 8] and step.grown == [1]
    scheduler.repeat(step, 8)
    assert step.grown == [1, 0] and [len(seq.pages) for seq in step.decodes] == [4, 4]


def test_pages_are_not_taken_from_anybody_for_it() -> None:
    scheduler = make(pages=6, prefix_cache=False)  # five that can be used, of four tokens
    for _ in range(2):
        add(scheduler, prompt(7), max_tokens=20, ignore_eos=True)
    turn(scheduler)
    step = turn(scheduler)
    assert step.positions == [7, 7]
    step = scheduler.schedule()
    assert step is not None and step.positions[0] == 8 and len(step.decodes) == 1, "one page for two"
    assert not scheduler.can_repeat(step, 8)


def test_a_pipeline_has_one_step_at_a_time() -> None:
    with pytest.raises(ConfigError, match="num_scheduler_steps = 4 contradicts pipeline_parallel_size = 2"):
        EngineConfig(model="m", num_scheduler_steps=4, pipeline_parallel_size=2)
    with pytest.raises(ConfigError, match="num_scheduler_steps = 0"):
        EngineConfig(model="m", num_scheduler_steps=0)
