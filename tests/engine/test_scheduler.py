"""The scheduler, one rule at a time; test_scheduler_properties.py runs all of them together."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import FinishReason, Request, SequenceStatus
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Step

EOS = 0


@dataclass
class Params:
    n: int = 1
    max_tokens: int | None = 8
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    end_id: int | None = None


def make(pages: int = 64, page_size: int = 4, prefix_cache: bool = True, **options) -> Scheduler:
    options = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 64, "eos_token_ids": [EOS]} | options
    return Scheduler(PagePool(pages, page_size, prefix_cache), **options)


def prompt(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def add(scheduler: Scheduler, tokens: list[int], request_id: int | None = None, **kwargs) -> Request:
    params = Params(**{name: kwargs.pop(name) for name in list(kwargs) if name in Params.__dataclass_fields__})
    request = Request(scheduler._roster.arrivals if request_id is None else request_id, tokens, params, **kwargs)
    scheduler.add(request)
    return request


def chunks(step: Step) -> list[tuple[int, int, int, bool]]:
    return [(c.seq.request.request_id, c.start, c.stop, c.samples) for c in step.prefills]


def ids(sequences) -> list[int]:
    return [seq.request.request_id for seq in sequences]


def turn(scheduler: Scheduler, token: int = 7) -> Step:
    """One step and its results, all the same token."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.update(step, [token] * step.num_rows)
    scheduler.check()
    return step


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


# ---- pages --------------------------------------------------------------------------------------------------------


def test_prompts_and_outputs_are_found_again() -> None:
    scheduler = make()
    first = add(scheduler, prompt(8), max_tokens=6).sequences[0]
    while scheduler.has_work():
        turn(scheduler)
    # 14 tokens, 13 of them computed: 3 full pages, one of them partly and one wholly output
    second = add(scheduler, [*first.tokens, 1, 2])
    assert chunks(turn(scheduler)) == [(1, 12, 16, True)]
    assert scheduler.pool.stats.hits == 3
    salted = add(scheduler, list(first.tokens), cache_salt="other")
    uncached = add(scheduler, list(first.tokens), prefix_cache=False)
    assert chunks(turn(scheduler)) == [(salted.request_id, 0, 14, True), (uncached.request_id, 0, 14, True)]
    assert [request.num_cached for request in (second, salted, uncached)] == [12, 0, 0]
    scheduler.abort(second)


def test_the_parts_of_a_prompt_are_found_before_it_is_all_there() -> None:
    scheduler = make(max_num_tokens=8)
    long = add(scheduler, prompt(30))
    turn(scheduler)
    assert add(scheduler, prompt(30)[:9]).request_id == 1
    # The rest of the first prompt fills this step; the next one that has room finds what was computed before it.
    while not (step := turn(scheduler)).started:
        assert not long.finished
    assert chunks(step)[-1] == (1, 8, 9, True) and scheduler.pool.stats.hits == 2
    scheduler = make(max_num_tokens=8, max_batch_size=1)
    long = add(scheduler, prompt(30))
    turn(scheduler)
    turn(scheduler)
    scheduler.abort(long)
    add(scheduler, prompt(30))
    assert chunks(turn(scheduler)) == [(1, 16, 24, False)], "of what was aborted halfway, too"


def test_a_page_is_not_shared_in_the_step_that_computes_it() -> None:
    scheduler = make()
    add(scheduler, prompt(9))
    add(scheduler, prompt(9))
    assert chunks(turn(scheduler)) == [(0, 0, 9, True), (1, 0, 9, True)]
    add(scheduler, prompt(9))
    assert chunks(turn(scheduler)) == [(2, 8, 9, True)]


def test_preemption_takes_the_lowest_priority_then_the_latest() -> None:
    scheduler = make(pages=9, page_size=4, prefix_cache=False)  # 8 pages
    high = add(scheduler, prompt(7), priority=0.9)
    low = add(scheduler, prompt(7, 200), priority=0.1)
    middle = [add(scheduler, prompt(7, 300), priority=0.5)]
    turn(scheduler)
    while not scheduler.num_preemptions:
        turn(scheduler)
    assert low.sequences[0].status is SequenceStatus.WAITING and low.sequences[0].pages == []
    middle.append(add(scheduler, prompt(2, 400), priority=0.5))
    while scheduler.num_preemptions == 1 and not middle[0].finished:
        turn(scheduler)
    assert high.sequences[0].status is not SequenceStatus.WAITING
    while scheduler.has_work():
        turn(scheduler)
    assert all(request.sequences[0].num_output == 8 for request in (high, low, *middle))


def test_a_preempted_sequence_is_computed_again_in_front_of_the_queue() -> None:
    scheduler = make(pages=5, page_size=4, max_batch_size=2)  # 4 pages
    first = add(scheduler, prompt(7)).sequences[0]
    second = add(scheduler, prompt(4, 200)).sequences[0]
    later = add(scheduler, prompt(2, 300)).sequences[0]
    step = scheduler.schedule()
    ahead = scheduler.schedule()
    assert step is not None and ahead is not None
    scheduler.update(step, [1] * 2)
    while not scheduler.num_preemptions:
        step, ahead = ahead, scheduler.schedule()
        assert ahead is not None and step is not None
        if scheduler.num_preemptions:
            # its token is still on the way: it waits for it, receives it, and then comes first
            assert second.num_pending == 1 and second.slot == -1 and ids(ahead.decodes) == [0]
        scheduler.update(step, [1] * step.num_rows)
    assert second.num_pending == 0
    outputs = second.num_output
    scheduler.update(ahead, [1] * ahead.num_rows)
    while not second.finished and second.status is SequenceStatus.WAITING:
        step = scheduler.schedule()
        assert step is not None
        assert SequenceStatus.WAITING is later.status or second in step.started
        scheduler.update(step, [1] * step.num_rows)
    assert first.finished and outputs >= 1
    assert chunks(step)[0] == (1, 0, 4 + outputs, True)  # the other one took all of its pages
    while scheduler.has_work():
        turn(scheduler)
    assert second.num_output == later.num_output == 8


def test_a_prompt_under_way_is_preempted_when_it_ranks_lowest() -> None:
    scheduler = make(pages=9, page_size=4, max_num_tokens=2, prefix_cache=False)  # 8 pages
    decoding = add(scheduler, prompt(4), max_tokens=20).sequences[0]
    turn(scheduler)
    turn(scheduler)
    under_way = add(scheduler, prompt(18, 200)).sequences[0]  # 5 pages, one token a step beside the decode
    while not scheduler.num_preemptions:
        turn(scheduler)
    assert under_way.status is SequenceStatus.WAITING and decoding.status is SequenceStatus.RUNNING
    assert under_way.num_output == 0
    while scheduler.has_work():
        turn(scheduler)
    assert under_way.num_output == 8


def test_a_preempted_sequence_waits_for_every_token_that_is_on_the_way() -> None:
    scheduler = make(pages=5, page_size=4, max_batch_size=2, prefix_cache=False)
    first = add(scheduler, prompt(7)).sequences[0]
    second = add(scheduler, prompt(4, 200)).sequences[0]
    inflight = []
    while not scheduler.num_preemptions:  # nothing is read back
        inflight.append(scheduler.schedule())
    pending = second.num_pending
    assert pending > 1 and second.status is SequenceStatus.WAITING
    scheduler.abort(first.request)
    assert scheduler.schedule() is None
    for number, step in enumerate(inflight, 1):
        assert step is not None
        scheduler.update(step, [1] * step.num_rows)
        if number < pending:
            assert scheduler.schedule() is None
    step = scheduler.schedule()
    assert step is not None and chunks(step) == [(1, 0, 4 + pending, True)]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_blocked_sequence_runs_as_soon_as_it_fits(prefix_cache: bool) -> None:
    scheduler = make(pages=11, page_size=4, prefix_cache=prefix_cache)  # 10 pages
    add(scheduler, prompt(20), max_tokens=20)
    add(scheduler, prompt(4, 200), max_tokens=2)
    blocked = add(scheduler, prompt(10, 300)).sequences[0]
    for _ in range(2):
        turn(scheduler)
        assert blocked.status is SequenceStatus.WAITING
    assert turn(scheduler).started == [blocked]


def test_a_blocked_sequence_runs_as_soon_as_its_prefix_is_there() -> None:
    scheduler = make(pages=11, page_size=4)  # 10 pages
    add(scheduler, prompt(25), max_tokens=12)  # 7 pages
    same = add(scheduler, prompt(25)).sequences[0]
    assert same not in turn(scheduler).started
    assert turn(scheduler).started == [same]  # no page was freed, but it needs only one of its own now
    assert scheduler.pool.stats.hits == 6


def test_guaranteed_no_evict_admits_only_what_fits_at_its_longest() -> None:
    scheduler = make(pages=9, page_size=4, policy="GUARANTEED_NO_EVICT")  # 8 pages = 32 tokens
    add(scheduler, prompt(4), max_tokens=13)  # 16 tokens are computed: 4 pages
    add(scheduler, prompt(4, 200), max_tokens=13)
    add(scheduler, prompt(4, 300), max_tokens=1)
    assert ids(turn(scheduler).started) == [0, 1]
    while scheduler.has_work():
        turn(scheduler)
    assert scheduler.num_preemptions == 0


# ---- n > 1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_siblings_share_the_full_pages_of_the_prompt(prefix_cache: bool) -> None:
    scheduler = make(prefix_cache=prefix_cache)
    request = add(scheduler, prompt(10), n=3)
    assert chunks(turn(scheduler)) == [(0, 0, 10, True)]
    assert chunks(turn(scheduler)) == [(0, 8, 10, True), (0, 8, 10, True)]
    first, *others = (seq.pages for seq in request.sequences)
    assert all(pages[:2] == first[:2] and pages[2] != first[2] for pages in others)
    assert 63 - scheduler.pool.num_free == 2 + 3


@pytest.mark.parametrize("length", [8, 9])
def test_siblings_share_even_when_the_first_has_finished(length: int) -> None:
    scheduler = make(max_batch_size=1, prefix_cache=False)
    add(scheduler, prompt(length), n=3, max_tokens=2)
    starts = []
    while scheduler.has_work():
        starts += [chunk.start for chunk in turn(scheduler).prefills]
    count = (length - 1) // 4 * 4
    assert starts == [0, count, count]
    assert scheduler.pool.num_free == 63


def heirs(scheduler: Scheduler, length: int = 9) -> Request:
    """A request whose first sequence has ended and left the pages of its prompt to one that has no slot yet."""
    request = add(scheduler, prompt(length), n=2, max_tokens=2)
    while not request.sequences[0].finished:
        turn(scheduler)
    assert request.sequences[1].status is SequenceStatus.WAITING and request.sequences[1].pages
    return request


def test_abort_frees_what_a_waiting_sequence_has_inherited() -> None:
    scheduler = make(max_batch_size=1, prefix_cache=False)
    scheduler.abort(heirs(scheduler))
    assert scheduler.pool.num_free == 63 and not scheduler.has_work()
    scheduler.check()


@pytest.mark.parametrize("policy", ["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"])
def test_inherited_pages_keep_nobody_waiting(policy: str) -> None:
    """Whoever comes first may need all pages, and nobody runs who would give some back."""
    scheduler = make(pages=6, max_batch_size=1, prefix_cache=False, priority_queue=True, policy=policy)
    request = heirs(scheduler)
    first = add(scheduler, prompt(19, 300), max_tokens=1, priority=0.9)
    assert chunks(turn(scheduler)) == [(first.request_id, 0, 19, True)] and first.finished
    assert not request.sequences[1].pages and chunks(turn(scheduler)) == [(request.request_id, 0, 9, True)]
    while scheduler.has_work():
        turn(scheduler)
    assert request.sequences[1].num_output == 2 and scheduler.pool.num_free == 5


def test_a_queue_that_most_leave_keeps_its_order_and_its_length() -> None:
    scheduler = make(max_batch_size=1)
    add(scheduler, prompt(3))
    turn(scheduler)
    waiting = [add(scheduler, prompt(3, 10 * number), max_tokens=1) for number in range(2, 202)]
    for request in waiting[::-1]:
        if request.request_id % 10:
            scheduler.abort(request)
            scheduler.check()
    left = [request.request_id for request in waiting if not request.request_id % 10]
    assert scheduler.num_waiting == len(left) == 20
    served = []
    while scheduler.has_work():
        served += ids(turn(scheduler).started)
    assert served == left and scheduler.num_waiting == 0


def test_abort_frees_everything_at_once_in_every_state() -> None:
    for steps in range(4):
        scheduler = make(max_batch_size=2, max_num_tokens=8)
        other = add(scheduler, prompt(4, 500))
        request = add(scheduler, prompt(10), n=3)
        step = None
        for _ in range(steps):
            step = scheduler.schedule()
            assert step is not None
            scheduler.update(step, [7] * step.num_rows)
        step = scheduler.schedule()
        scheduler.abort(request)
        scheduler.abort(request)
        assert request.finished and {seq.finish_reason for seq in request.sequences} == {"cancelled"}
        assert scheduler.pool.num_free == 63 - len(other.sequences[0].pages)
        scheduler.check()
        assert step is not None and all(event.seq.request is other for event in scheduler.update(step, [7] * 9))
        while scheduler.has_work():
            turn(scheduler)
        assert other.sequences[0].num_output == 8


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


# ---- micro-batches ------------------------------------------------------------------------------------------------


def test_micro_batches_take_turns_without_reading_results() -> None:
    scheduler = make(max_batch_size=8, micro_batches=2, tile=4)
    for _ in range(5):
        add(scheduler, prompt(2), max_tokens=20)
    steps = [scheduler.schedule() for _ in range(6)]
    assert all(step is not None for step in steps)
    assert [ids(step.decodes) for step in steps[1:]] == [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4], [0, 1, 2]]
    assert scheduler.schedule() is not None and scheduler.num_running == 5


def test_one_sequence_runs_one_step_ahead_of_the_host() -> None:
    scheduler = make(micro_batches=4)
    add(scheduler, prompt(2), max_tokens=20)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None and ids(second.decodes) == [0]
    assert scheduler.schedule() is None
    scheduler.update(first, [7])
    third = scheduler.schedule()
    assert third is not None and third.positions == [3]


def test_a_prompt_flows_through_the_pipeline_in_consecutive_steps() -> None:
    scheduler = make(micro_batches=4, max_num_tokens=4)
    add(scheduler, prompt(10), max_tokens=2)
    steps = [scheduler.schedule() for _ in range(3)]
    assert [chunks(step) for step in steps if step] == [[(0, 0, 4, False)], [(0, 4, 8, False)], [(0, 8, 10, True)]]


def test_a_prompt_that_fits_one_step_is_spread_over_the_stages() -> None:
    scheduler = make(micro_batches=2, max_num_tokens=32, tile=2)
    add(scheduler, prompt(40), max_tokens=2)
    steps = [scheduler.schedule() for _ in range(4)]
    assert [chunks(step) for step in steps if step] == [
        [(0, 0, 10, False)], [(0, 10, 20, False)], [(0, 20, 30, False)], [(0, 30, 40, True)]
    ]  # fmt: skip
    add(scheduler, prompt(9, 300), max_tokens=2)
    step = scheduler.schedule()
    assert step is not None and chunks(step) == [(1, 0, 8, False)], "short prompts are not cut into crumbs"


@pytest.mark.parametrize(("counts", "lengths"), [((), [8] * 4), ((3, 6), [12, 12, 8]), ((16,), [32]), ((2,), [8] * 4)])
def test_a_part_of_a_prompt_fills_a_compiled_step(counts: tuple[int, ...], lengths: list[int]) -> None:
    scheduler = make(micro_batches=2, tile=2, tile_counts=counts)
    add(scheduler, prompt(32), max_tokens=2)
    steps = [scheduler.schedule() for _ in lengths]
    assert [stop - start for step in steps if step for _, start, stop, _ in chunks(step)] == lengths


def test_whoever_is_preempted_in_a_micro_batch_is_not_in_it() -> None:
    scheduler = make(pages=1 + 14, page_size=1, micro_batches=2)
    for _ in range(4):
        add(scheduler, prompt(2), max_tokens=12)
    while scheduler.has_work():
        turn(scheduler)  # checks the slots and pages
    assert scheduler.num_preemptions > 0


def test_who_waited_longest_is_decoded_first() -> None:
    scheduler = make(max_batch_size=8, micro_batches=2, tile=4)
    for _ in range(4):
        add(scheduler, prompt(2), max_tokens=20)
    turn(scheduler)
    assert [ids(turn(scheduler).decodes) for _ in range(4)] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_the_last_chunk_is_cut_where_the_step_would_be_mostly_padding() -> None:
    options = {"max_num_tokens": 200, "max_seq_len": 150, "tile": 4, "max_tiles": 16, "tile_counts": (4, 8, 16)}
    scheduler = make(pages=100, **options)
    add(scheduler, prompt(20), max_tokens=2, ignore_eos=True)
    add(scheduler, prompt(15, 300), max_tokens=2, ignore_eos=True)
    step = turn(scheduler)
    assert chunks(step) == [(0, 0, 20, True), (1, 0, 12, False)], "nine tiles: eight now, the rest of one later"
    assert chunks(turn(scheduler)) == [(1, 12, 15, True)]
    for length, first in ((48, 48), (44, 32), (13, 13), (17, 16)):  # 12, 11, 4 and 5 tiles
        scheduler = make(pages=100, **options)
        add(scheduler, prompt(length), max_tokens=2, ignore_eos=True)
        assert chunks(turn(scheduler))[0][2] == first, length
    whole = make(pages=100, chunked_prefill=False, **options)
    add(whole, prompt(17), max_tokens=2, ignore_eos=True)
    assert chunks(turn(whole)) == [(0, 0, 17, True)]
