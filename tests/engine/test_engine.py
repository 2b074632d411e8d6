"""The whole engine on a tiny model: every way to run it gives the same tokens, and nothing leaks or hangs."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.request import FinishReason, Update
from tests.engine.runs import GREEDY, PROMPTS, SHARED, all_free, check, run
from tests.tiny_llm import PAGE, make_llm, prompts, submit, until

pytestmark = [pytest.mark.timeout(300), pytest.mark.quick]


# ---- one answer, whatever the loop --------------------------------------------------------------------------------


def test_batched_is_alone(llm: LLM, wanted: list[list[int]]) -> None:
    before = llm.get_stats()
    check(llm, wanted)
    after = llm.get_stats()
    assert after["output_tokens"] - before["output_tokens"] == sum(map(len, wanted))
    assert after["prompt_tokens"] - before["prompt_tokens"] == sum(map(len, PROMPTS))
    assert after["requests"] - before["requests"] == len(PROMPTS)


def test_plain_loop(wanted: list[list[int]]) -> None:
    with make_llm(disable_overlap_scheduler=True) as plain:
        check(plain, wanted)


def test_whole_prompts_and_no_cache(wanted: list[list[int]]) -> None:
    short = [i for i, prompt in enumerate(PROMPTS) if len(prompt) <= 32]
    with make_llm(enable_chunked_prefill=False, reuse=False) as whole:
        assert run(whole, [PROMPTS[i] for i in short]) == [wanted[i] for i in short]
        assert whole.get_stats()["cache_hits"] == 0
        # the default engine must have cut some of these, or nothing was compared
        assert sum(len(PROMPTS[i]) for i in short) > 2 * 32
        with pytest.raises(ValueError, match="one step computes 32 and chunked prefill is off"):
            run(whole, [5] * 33)
        before = whole.get_stats()
        four = run(whole, SHARED, SamplingParams(max_tokens=8, n=4, ignore_eos=True))
        assert four == four[:1] * 4
        assert whole.get_stats()["prompt_tokens"] - before["prompt_tokens"] == len(SHARED)


def test_prefix_cache_hit_is_cold(llm: LLM) -> None:
    prompt = prompts(1, seed=99, low=30, high=30)[0]
    before = llm.get_stats()
    cold = run(llm, prompt, cache_salt="cold")
    after_cold = llm.get_stats()
    assert after_cold["cache_hits"] == before["cache_hits"]
    warm = run(llm, prompt, cache_salt="cold")
    assert warm == cold
    assert llm.get_stats()["cache_hits"] - after_cold["cache_hits"] == (len(prompt) - 1) // PAGE
    # outputs are cached, too
    hits = llm.get_stats()["cache_hits"]
    longer = prompt + cold[0]
    again = run(llm, longer, SamplingParams(max_tokens=4, ignore_eos=True), cache_salt="cold")
    assert llm.get_stats()["cache_hits"] - hits >= (len(longer) - 2) // PAGE
    assert again == run(llm, longer, SamplingParams(max_tokens=4, ignore_eos=True), cache_salt="other")


# ---- n and best_of ------------------------------------------------------------------------------------------------


class PeakPages:
    """The most pages in use at the end of any step while the block runs."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        scheduler = llm._engine._scheduler
        schedule = scheduler.schedule

        def watched() -> Any:
            step = schedule()
            self.peak = max(self.peak, scheduler.pool.capacity - scheduler.pool.num_free)
            return step

        monkeypatch.setattr(scheduler, "schedule", watched)


@pytest.mark.parametrize("kind", ["n", "best_of"])
def test_completions_share_prompt_pages(llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    prompt = prompts(1, seed=7, low=33, high=33)[0]
    pages = PeakPages(llm, monkeypatch)
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=3, ignore_eos=True, **{kind: 4})
    (output,) = llm.generate([prompt], params, use_tqdm=False, cache_salt=kind)
    assert len(output.outputs) == (4 if kind == "n" else 1)
    shared = len(prompt) // PAGE
    own = -(-(len(prompt) + 5 - 1) // PAGE) - shared
    assert shared < pages.peak <= shared + 4 * own
    assert all_free(llm)
    if kind == "n":
        assert len({tuple(c.token_ids) for c in output.outputs}) > 1


def test_best_of_keeps_the_likeliest(llm: LLM) -> None:
    base = {"max_tokens": 6, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    prompt = PROMPTS[2]
    every = llm.generate(prompt, SamplingParams(n=5, logprobs=0, prompt_logprobs=1, **base), use_tqdm=False).outputs
    best = llm.generate(
        prompt, SamplingParams(n=2, best_of=5, logprobs=0, prompt_logprobs=1, **base), use_tqdm=False
    ).outputs
    ranked = sorted(every, key=lambda c: -c.cumulative_logprob)
    assert tokens_of_completions(best) == tokens_of_completions(ranked[:2])
    # sequences that end in the same step all keep the logprobs of their last token
    assert all(len(c.logprobs) == 6 for c in [*every, *best])
    assert all(c.prompt_logprobs is not None for c in [*every, *best])


def tokens_of_completions(completions: Any) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


# ---- streaming and cancelling -------------------------------------------------------------------------------------


def test_streaming_gives_the_same_tokens(llm: LLM, wanted: list[list[int]]) -> None:
    results = [llm.generate_async(prompt, GREEDY, streaming=True) for prompt in PROMPTS[:4]]
    for result, tokens in zip(results, wanted, strict=False):
        seen: list[int] = []
        text = ""
        for state in result:
            seen += state.outputs[0].token_ids_diff
            text += state.outputs[0].text_diff
        assert seen == tokens
        assert text == result.outputs[0].text


def test_abort_frees_pages_at_once(llm: LLM) -> None:
    result = llm.generate_async(PROMPTS[3], SamplingParams(max_tokens=None, ignore_eos=True, n=3), streaming=True)
    next(iter(result))
    assert not all_free(llm)
    result.abort()
    assert result.result(timeout=20).outputs[0].finish_reason == "cancelled"
    assert all_free(llm)


def test_random_load_with_cancels_leaks_nothing(llm: LLM, wanted: list[list[int]]) -> None:
    rng = random.Random(0)
    results = []
    for i in range(200):
        prompt = rng.choice(PROMPTS)
        params = SamplingParams(
            max_tokens=rng.randint(1, 24),
            ignore_eos=True,
            n=rng.choice((1, 1, 1, 3)),
            temperature=rng.choice((None, 0.9)),
            logprobs=rng.choice((None, None, 2)),
        )
        results.append((llm.generate_async(prompt, params, streaming=i % 3 == 0), prompt, params))
        if i % 3 == 0:
            rng.choice(results)[0].abort()
        if i % 10 == 0:
            time.sleep(rng.random() * 0.01)
    reasons = set()
    for result, prompt, params in results:
        result.result(timeout=120)
        for completion in result.outputs:
            reasons.add(completion.finish_reason)
            if completion.finish_reason == "length" and params.temperature is None:
                assert completion.token_ids == wanted[PROMPTS.index(prompt)][: params.max_tokens] or (
                    params.max_tokens > 20
                )
    assert reasons == {"length", "cancelled"}
    assert until(lambda: all_free(llm))
    assert not llm._engine._owners and not llm._engine._results._records
    llm._engine._scheduler.check()


# ---- who runs when pages are short --------------------------------------------------------------------------------


def test_priorities() -> None:
    order: list[int] = []
    with make_llm(scheduler_config={"waiting_queue_policy": "priority"}) as llm:
        blockers = [llm.generate_async([9], SamplingParams(max_tokens=40, ignore_eos=True)) for _ in range(8)]
        results = []
        for priority in (0.1, 0.9, 0.5, 0.7):
            result = llm.generate_async([5, 6], SamplingParams(max_tokens=30, ignore_eos=True), priority=priority)
            result.add_done_callback(lambda result, priority=priority: order.append(priority))
            results.append(result)
        for result in blockers + results:
            result.result(timeout=60)
    started = sorted(zip((r.timing.first_token for r in results), (0.1, 0.9, 0.5, 0.7), strict=True))
    ranks = [priority for _, priority in started]
    assert sorted(order) == [0.1, 0.5, 0.7, 0.9]
    # all four get their slots when the blockers end, in the order of their priorities
    assert ranks.index(0.9) <= ranks.index(0.1)


@pytest.mark.parametrize("policy", ["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"])
def test_tiny_pool(wanted: list[list[int]], policy: str) -> None:
    with make_llm(kv_tokens=80, scheduler_config={"capacity_scheduler_policy": policy}) as llm:
        check(llm, wanted)
        preemptions = llm.get_stats()["preemptions"]
        assert (preemptions > 0) == (policy == "MAX_UTILIZATION")
        sampled = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=11, repetition_penalty=1.3)
        together = run(llm, PROMPTS, sampled)
        alone = [tokens for prompt in PROMPTS for tokens in run(llm, prompt, sampled)]
        assert together == alone
        assert all_free(llm)


def test_one_sequence_can_be_stopped(llm: LLM) -> None:
    """As the server does it when it finds a stop string: the others go on, and the pages are free."""
    updates: list[Update] = []
    params = SamplingParams(max_tokens=30, n=2, ignore_eos=True)

    def on_update(update: Update) -> None:
        updates.append(update)
        if update.index == 0 and update.finish_reason is None:
            llm._engine.stop(10_001, 0)
            llm._engine.stop(10_001, 7)  # there is no such sequence

    request = submit(llm, 10_001, [5, 6, 7], params, on_update)
    assert until(lambda: request.finished and all_free(llm))
    ends = {update.index: update.finish_reason for update in updates if update.finish_reason is not None}
    assert ends == {0: FinishReason.STOP, 1: FinishReason.LENGTH}
    assert request.sequences[0].num_output < 30 == request.sequences[1].num_output
    llm._engine._scheduler.check()


def test_the_loop_shows_that_it_passes(llm: LLM) -> None:
    engine = llm._engine
    time.sleep(1.0)  # it has nothing to do, and passes all the same
    assert engine.death is None and until(lambda: engine.seconds_silent < 0.3, 5)
    hold = threading.Event()
    request = submit(llm, 10_002, [5], SamplingParams(max_tokens=2), lambda update: hold.wait(20) and None)
    assert until(lambda: engine.seconds_silent > 0.8)  # idle, it never is so long
    hold.set()
    assert until(lambda: request.finished and engine.seconds_silent < 0.6)


def test_iterations_and_cached_tokens_are_told(llm: LLM) -> None:
    engine = llm._engine
    number = max((one.number for one in engine.iterations.since(0)), default=0)
    prompt = prompts(1, seed=77, low=30, high=30)[0]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for request_id, cached in ((10_003, 0), (10_004, 28)):
        request = submit(llm, request_id, prompt, params, lambda update: None)
        assert until(lambda request=request: request.finished)  # type: ignore[misc]
        assert request.num_cached == cached
    assert until(lambda: len(engine.iterations.since(number)) >= 8)
    found = engine.iterations.since(number)
    assert [one.number for one in found] == list(range(number + 1, number + 1 + len(found)))
    assert sum(one.context for one in found) == 2 and sum(one.generation for one in found) == 6
    assert [one.tokens for one in found if one.context] == [30, 2]
    assert all(0 < one.seconds < 60 for one in found) and engine.iterations.since(found[-1].number) == []
