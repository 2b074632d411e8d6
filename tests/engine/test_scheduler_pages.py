"""The scheduler's pages, one rule at a time: what is found again, who is preempted, and what siblings share."""

import pytest

from jaxllm.engine.request import Request, SequenceStatus
from jaxllm.engine.scheduler import Scheduler
from tests.engine.scheduling import add, chunks, ids, make, prompt, turn

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
