"""The engine when a request, its owner or the engine itself fails: no other request hears of it, and nobody hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.owners import EngineDeadError
from jaxllm.engine.request import FinishReason, Update
from tests.engine.runs import GREEDY, PROMPTS, all_free, check, run
from tests.tiny_llm import make_llm, submit, until

pytestmark = [pytest.mark.timeout(300), pytest.mark.quick]


def test_a_callback_that_raises_ends_its_request_only(
    llm: LLM, wanted: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Update] = []

    def broken(update: Update) -> None:
        calls.append(update)
        raise RuntimeError("the owner's mistake")

    before = llm.get_stats()["output_tokens"]
    other = llm.generate_async(PROMPTS[0], GREEDY)
    submit(llm, 10**6, PROMPTS[1], SamplingParams(max_tokens=40, n=2, ignore_eos=True), broken)
    assert other.result(timeout=60).outputs[0].token_ids == wanted[0]
    assert until(lambda: bool(calls) and all_free(llm))  # the engine may not have seen it yet
    assert len(calls) == 1
    assert llm.get_stats()["output_tokens"] - before < len(wanted[0]) + 40, "it goes on for nobody"
    assert "the callback of request 1000000 failed" in caplog.text
    check(llm, wanted)


def test_a_result_that_cannot_be_made_fails_its_request_only(
    llm: LLM, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = llm._engine._results.record

    def broken(event: Any, flight: Any) -> Any:
        if event.seq.request.request_id == 10**6 + 1:
            raise RuntimeError("no text for this token")
        return record(event, flight)

    monkeypatch.setattr(llm._engine._results, "record", broken)
    updates: list[Update] = []
    submit(llm, 10**6 + 1, PROMPTS[1], SamplingParams(max_tokens=1, ignore_eos=True), updates.append)
    assert run(llm, PROMPTS[:3]) == wanted[:3]
    assert [update.finish_reason for update in updates] == [FinishReason.ERROR]
    assert "no text" in str(updates[0].error)
    assert all_free(llm)


def test_a_request_fails_once_for_all_of_its_sequences(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    record = llm._engine._results.record

    def broken(event: Any, flight: Any) -> Any:
        if max(seq.num_output for seq in event.seq.request.sequences) > 3:  # both have a token in this step
            raise RuntimeError("no text for this token")
        return record(event, flight)

    monkeypatch.setattr(llm._engine._results, "record", broken)
    updates: list[Update] = []
    submit(llm, 10**6 + 2, PROMPTS[1], SamplingParams(max_tokens=9, n=2, ignore_eos=True, stop="~"), updates.append)
    assert until(lambda: any(update.error is not None for update in updates) and all_free(llm))
    assert {update.index for update in updates if update.token_ids} == {0, 1}
    assert sum(update.error is not None for update in updates) == 1


def test_a_sequence_that_has_ended_is_not_cancelled_again(llm: LLM) -> None:
    updates: list[Update] = []

    def hear(update: Update) -> None:
        updates.append(update)
        if len(updates) == 6:  # in the engine's thread: both have tokens, and neither has all
            llm._engine.stop(10**6 + 3, 0)
            llm._engine.abort(10**6 + 3)

    submit(llm, 10**6 + 3, PROMPTS[1], SamplingParams(max_tokens=20, n=2, ignore_eos=True), hear)
    assert until(lambda: bool(updates) and updates[-1].finish_reason is FinishReason.CANCELLED and all_free(llm))
    ends = [(update.index, update.finish_reason) for update in updates if update.finish_reason is not None]
    assert ends == [(0, FinishReason.STOP), (1, FinishReason.CANCELLED)]


def test_streams_hear_of_every_nth_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._engine._owners, "stream_interval", 4)
    updates: list[Update] = []
    submit(llm, 10**6 + 4, PROMPTS[0], SamplingParams(max_tokens=11, ignore_eos=True), updates.append)
    assert until(lambda: bool(updates) and updates[-1].finish_reason is not None)
    assert [len(update.token_ids) for update in updates] == [1, 4, 4, 2]


def test_cancel_of_unknown_and_finished_requests_is_harmless(llm: LLM, wanted: list[list[int]]) -> None:
    llm._engine.abort(987654321)
    result = llm.generate_async(PROMPTS[0], GREEDY)
    result.result(timeout=60)
    llm._engine.abort(result.request_id)
    check(llm, wanted)


@pytest.fixture
def mortal() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


def test_an_owner_may_stop_the_engine_when_it_is_called_back(mortal: LLM, caplog: pytest.LogCaptureFixture) -> None:
    result = mortal.generate_async(PROMPTS[0], GREEDY)
    other = mortal.generate_async(PROMPTS[1], SamplingParams(max_tokens=None, ignore_eos=True))
    result.add_done_callback(lambda result: mortal.shutdown())
    assert result.result(timeout=60).outputs[0].length == 20
    with pytest.raises(EngineDeadError, match="shut down"):
        other.result(timeout=60)
    assert until(lambda: not mortal._engine._thread.is_alive()) and not caplog.records


def test_death_of_the_engine(mortal: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = mortal._engine._runner.launch
    gate = threading.Event()

    def dying(step: Any) -> Any:
        if gate.is_set():
            raise RuntimeError("the device fell off the bus")
        return launch(step)

    monkeypatch.setattr(mortal._engine._runner, "launch", dying)
    forever = SamplingParams(max_tokens=None, ignore_eos=True)
    results = [mortal.generate_async(prompt, forever, streaming=i == 0) for i, prompt in enumerate(PROMPTS)]
    next(iter(results[0]))
    gate.set()
    started = time.monotonic()
    for result in results:
        with pytest.raises(EngineDeadError, match="the device fell off the bus"):
            result.result(timeout=20)
    with pytest.raises(EngineDeadError, match="the device fell off the bus") as caught:
        mortal.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert caught.value.__cause__ is not None
    with pytest.raises(EngineDeadError):
        mortal.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert time.monotonic() - started < 20


def test_shutdown_with_pending_requests(mortal: LLM) -> None:
    results = [mortal.generate_async(p, SamplingParams(max_tokens=None, ignore_eos=True)) for p in PROMPTS]
    mortal.shutdown()
    mortal.shutdown()
    for result in results:
        assert result.done()
        try:
            assert result.result(timeout=1).outputs[0].finish_reason == "length"  # it was faster than the shutdown
        except EngineDeadError as error:
            assert "shut down" in str(error)
    with pytest.raises(RuntimeError, match="shut down"):
        mortal.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    runner = mortal._engine._runner
    assert not any(stage.weights or stage.kv for stage in runner.stages), "the memory is free while the LLM lives"
    assert mortal.get_stats()["pages"] == 128
