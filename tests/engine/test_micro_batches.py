"""The scheduler with micro-batches, one rule at a time: who is decoded when, and how prompts are spread."""

import pytest

from tests.engine.scheduling import add, chunks, ids, make, prompt, turn


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
