"""The scheduler, one rule at a time; test_scheduler_properties.py and _simulation.py run all of them together."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.engine.request import FinishReason, Request, SequenceStatus
from tests.engine.scheduling import EOS, Params, add, chunks, ids, make, prompt, turn

# ---- steps --------------------------------------------------------------------------------------------------------


def test_prompt_then_decodes_then_length() -> None:
    scheduler = make()
    request = add(scheduler, prompt(5), max_tokens=3)
    seq = request.sequences[0]
    step = scheduler.schedule()
    assert step is not None and step.started == [seq] and chunks(step) == [(0, 0, 5, True)] and step.num_tokens == 5
    (event,) = scheduler.update(step, [50])
    assert (event.seq, event.token, event.finished, event.row) == (seq, 50, False, 0)
    step = turn(scheduler, 51)
    assert step.decodes == [seq] and step.positions == [5] and not step.prefills and not step.started
    step = scheduler.schedule()
    assert step is not None and step.positions == [6]
    (event,) = scheduler.update(step, [52])
    assert event.finished and seq.finish_reason == "length" and seq.output_token_ids == [50, 51, 52]
    assert seq.pages == [] and seq.slot == -1 and not scheduler.has_work()
    assert scheduler.schedule() is None
    scheduler.check()


def test_decodes_come_first_and_prompts_are_cut_to_the_budget() -> None:
    scheduler = make(max_num_tokens=8)
    add(scheduler, prompt(3))
    turn(scheduler)
    add(scheduler, prompt(10, 200))
    add(scheduler, prompt(6, 300))
    step = turn(scheduler)
    assert ids(step.decodes) == [0] and chunks(step) == [(1, 0, 7, False)]
    step = turn(scheduler)
    assert ids(step.decodes) == [0] and chunks(step) == [(1, 7, 10, True), (2, 0, 4, False)]
    step = turn(scheduler)
    assert ids(step.decodes) == [0, 1] and chunks(step) == [(2, 4, 6, True)]


def test_chunks_fit_the_tiles() -> None:
    scheduler = make(max_num_tokens=32, tile=4, max_tiles=3)
    for first in (100, 200, 300):
        add(scheduler, prompt(5, first))
    step = turn(scheduler)
    assert chunks(step) == [(0, 0, 5, True), (1, 0, 4, False)]  # 2 tiles and 1 tile


def test_whole_prompts_only_without_chunked_prefill() -> None:
    scheduler = make(max_num_tokens=8, chunked_prefill=False)
    add(scheduler, prompt(5))
    add(scheduler, prompt(8, 200), max_tokens=1)
    assert chunks(turn(scheduler)) == [(0, 0, 5, True)]
    for _ in range(7):
        assert chunks(turn(scheduler)) == []  # 8 tokens do not fit beside a decode
    assert chunks(turn(scheduler)) == [(1, 0, 8, True)]


def test_the_batch_is_bounded_and_slots_are_reused() -> None:
    scheduler = make(max_batch_size=2)
    requests = [add(scheduler, prompt(2, 100 * n), max_tokens=2) for n in range(1, 4)]
    assert ids(turn(scheduler).started) == [0, 1]
    assert sorted(request.sequences[0].slot for request in requests) == [-1, 0, 1]
    turn(scheduler)
    assert ids(turn(scheduler).started) == [2]


def test_queue_order() -> None:
    for priority_queue, order in ((False, [0, 1, 2]), (True, [1, 2, 0])):
        scheduler = make(max_batch_size=1, priority_queue=priority_queue)
        for n, priority in enumerate((0.1, 0.9, 0.5)):
            add(scheduler, prompt(2, 100 * n), max_tokens=1, priority=priority)
        assert [chunks(turn(scheduler))[0][0] for _ in range(3)] == order


# ---- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "reason", "outputs", "stop_reason"),
    [
        ({}, "stop", 2, None),
        ({"ignore_eos": True}, "length", 8, None),
        ({"end_id": 9}, "length", 8, None),
        ({"end_id": -1}, "length", 8, None),
        ({"min_tokens": 2}, "stop", 2, None),
        ({"min_tokens": 3}, "stop", 4, None),
        ({"stop_token_ids": [5]}, "stop", 1, 5),
        ({"stop_token_ids": [5], "ignore_eos": True}, "stop", 1, 5),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, "stop", 2, EOS),
        ({"max_tokens": 1}, "length", 1, None),
        ({"max_tokens": None, "ignore_eos": True}, "length", 61, None),
    ],
)
def test_when_a_sequence_ends(params: dict, reason: str, outputs: int, stop_reason: int | None) -> None:
    scheduler = make()
    seq = add(scheduler, prompt(3), **params).sequences[0]
    tokens = iter([5, EOS] * 40)
    while scheduler.has_work():
        turn(scheduler, next(tokens))
    assert (seq.finish_reason, seq.num_output, seq.stop_reason) == (reason, outputs, stop_reason)


def test_finish_on_a_stop_string() -> None:
    scheduler = make()
    seq = add(scheduler, prompt(6)).sequences[0]
    turn(scheduler)
    step = scheduler.schedule()
    scheduler.finish(seq, FinishReason.STOP, "###")
    assert seq.finished and seq.stop_reason == "###" and scheduler.pool.num_free == 63
    assert step is not None and scheduler.update(step, [7]) == []
    scheduler.finish(seq, FinishReason.STOP, "again")
    assert seq.stop_reason == "###" and not scheduler.has_work()


# ---- overlap ------------------------------------------------------------------------------------------------------


def test_overlap_runs_one_step_ahead_and_never_past_the_end() -> None:
    scheduler = make()
    seq = add(scheduler, prompt(4), max_tokens=3).sequences[0]
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert second is not None and second.decodes == [seq] and second.positions == [4] and seq.num_pending == 2
    assert first is not None and scheduler.update(first, [50])[0].token == 50
    third = scheduler.schedule()
    assert third is not None and third.positions == [5]
    scheduler.update(second, [51])
    assert scheduler.schedule() is None and scheduler.has_work()  # its third and last token is on the way
    assert scheduler.update(third, [52])[0].finished
    assert seq.output_token_ids == [50, 51, 52] and not scheduler.has_work()


def test_the_surplus_token_after_eos_is_dropped_and_pages_are_free_at_once() -> None:
    scheduler = make()
    seq = add(scheduler, prompt(4)).sequences[0]
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert scheduler.update(first, [EOS])[0].finished
    assert scheduler.pool.num_free == 63 and seq.pages == [] and not scheduler.has_work()
    assert scheduler.update(second, [9]) == []
    assert seq.output_token_ids == [EOS]
    scheduler.check()


def test_wait_for_token_never_runs_ahead() -> None:
    scheduler = make()
    seq = add(scheduler, prompt(4)).sequences[0]
    seq.wait_for_token = True
    first = scheduler.schedule()
    assert first is not None and scheduler.schedule() is None
    scheduler.update(first, [5])
    assert scheduler.schedule() is not None and scheduler.schedule() is None


def test_decodes_stay_within_the_budget() -> None:
    scheduler = make(max_num_tokens=1)
    sequences = [add(scheduler, [n], max_tokens=3).sequences[0] for n in (1, 2)]
    for seq in sequences:
        seq.wait_for_token = True
    first, second = scheduler.schedule(), scheduler.schedule()  # the second runs while the first waits for its token
    assert first is not None and second is not None
    scheduler.update(first, [7])
    scheduler.update(second, [7])
    while scheduler.has_work():
        assert turn(scheduler).num_tokens == 1
    assert [seq.num_output for seq in sequences] == [3, 3]


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "length", "params", "message"),
    [
        ({}, 64, {}, "the prompt has 64 tokens, but max_seq_len 64 leaves room for 63 and one output token"),
        ({"pages": 3}, 9, {}, "the prompt has 9 tokens, but the KV cache holds 8"),
        ({"pages": 17}, 80, {}, "the prompt has 80 tokens, but max_seq_len 64 leaves room for 63"),
        ({"chunked_prefill": False}, 33, {}, "the prompt has 33 tokens, but one step computes 32"),
        ({"chunked_prefill": False, "tile": 8, "max_tiles": 2}, 17, {}, "one step computes 16"),
        ({}, 5, {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_a_request_that_can_never_run_is_refused(options: dict, length: int, params: dict, message: str) -> None:
    scheduler = make(**options)
    with pytest.raises(ValueError, match=message):
        add(scheduler, prompt(length), **params)
    assert not scheduler.has_work() and scheduler.num_waiting == 0
    add(scheduler, prompt(3))
    while scheduler.has_work():
        turn(scheduler)


def test_the_longest_prompt_that_fits_runs() -> None:
    for options, length in (({}, 63), ({"pages": 3}, 8)):
        scheduler = make(**options)
        seq = add(scheduler, prompt(length)).sequences[0]
        while scheduler.has_work():
            turn(scheduler)
        assert seq.num_output == 1 and seq.finish_reason == "length"


def test_bad_requests_and_settings() -> None:
    scheduler = make()
    request = add(scheduler, prompt(3))
    with pytest.raises(ValueError, match="request 0 was added before"):
        scheduler.add(request)
    with pytest.raises(ValueError, match="the prompt is empty"):
        Request(1, [], Params())
    with pytest.raises(ValueError, match="prompt token -1 is negative"):
        Request(1, [3, -1], Params())
    with pytest.raises(ValueError, match="priority nan"):
        Request(1, [1], Params(), priority=float("nan"))
    with pytest.raises(ValueError, match="n is 0"):
        Request(1, [1], Params(n=0))
    with pytest.raises(ValueError, match="unknown capacity policy 'STATIC_BATCH': choose one of GUARANTEED_NO_EVICT"):
        make(policy="STATIC_BATCH")
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        make(max_batch_size=0)
    with pytest.raises(ValueError, match="max_seq_len is 1"):
        make(max_seq_len=1)
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(ValueError, match="0 tokens for a step of 1 rows"):
        scheduler.update(step, [])


def test_an_illegal_move_is_an_error() -> None:
    seq = Request(1, [1], Params()).sequences[0]
    seq.move(SequenceStatus.FINISHED)
    with pytest.raises(RuntimeError, match=r"sequence 1\.0 cannot go from finished to running"):
        seq.move(SequenceStatus.RUNNING)


# ---- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_64_steady_decodes_cost_less_than_350_microseconds(depth: int) -> None:
    scheduler = make(pages=4000, page_size=32, max_batch_size=64, max_num_tokens=8192, max_seq_len=4096)
    for n in range(64):
        add(scheduler, [n + 5] * (100 + n), max_tokens=300)
    inflight, times = [], []
    for _ in range(250):
        start = time.perf_counter()
        inflight.append(scheduler.schedule())
        seconds = time.perf_counter() - start
        if len(inflight) == depth:
            step = inflight.pop(0)
            assert step is not None
            tokens = [7] * step.num_rows
            start = time.perf_counter()
            scheduler.update(step, tokens)
            times.append(seconds + time.perf_counter() - start)
    assert scheduler.num_running == 64
    assert sorted(times)[len(times) // 2] < 350e-6


def test_the_scheduler_needs_no_jax() -> None:
    code = "import sys, jaxllm.engine.scheduler; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
