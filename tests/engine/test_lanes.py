"""Lanes: requests spread over the ranks of attention data parallelism, on a fake device for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.lanes import Lanes
from jaxllm.engine.request import FinishReason, Request, Sequence
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import LaneSteps
from tests.engine.fake_device import EOS, FakeDevice, Harness, Params, Truth
from tests.engine.test_scheduler_properties import operations, replay, schedulers


class FakeDevices:
    """One fake device for each lane."""

    def __init__(self, lanes: Lanes) -> None:
        self.devices = [FakeDevice(lane) for lane in lanes.lanes]
        self.truths: dict[Sequence, Truth] = {}
        self.sampled: dict[Sequence, int] = {}
        for device in self.devices:
            device.truths, device.sampled = self.truths, self.sampled

    def truth(self, seq: Sequence) -> Truth:
        return self.devices[0].truth(seq)

    def run(self, step: LaneSteps) -> list[list[int]]:
        slots = [seq.slot for seq in step.decodes] + [chunk.seq.slot for chunk in step.prefills]
        assert len(slots) == len(set(slots)), "lanes share a slot"
        assert {lane.repeats for lane in step.lanes} == {step.repeats}
        found = [device.run(lane) for device, lane in zip(self.devices, step.lanes, strict=True)]
        return [[token for tokens in repeat for token in tokens] for repeat in zip(*found, strict=True)]


@dataclass
class LaneHarness(Harness):
    """`Harness` for lanes; checks where each request goes."""

    scheduler: Any
    device: Any = field(init=False)
    assigned: list[tuple[int, Request]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = FakeDevices(self.scheduler)
        for index, lane in enumerate(self.scheduler.lanes):
            lane.add = self._watched(index, lane, lane.add)

    def _watched(self, index: int, lane: Scheduler, add: Any) -> Any:
        def watched(request: Request) -> None:
            assert lane.num_free_slots > lane.num_waiting
            for other in self.scheduler.lanes:
                if other.num_free_slots and not other.num_waiting:
                    assert lane.num_tokens <= other.num_tokens, "a lighter lane has room"
            self.assigned.append((index, request))
            add(request)

        return watched

    def add(self, prompt: list[int], params: Params, **kwargs: object) -> Request | None:
        request = Request(self.added, prompt, params, **kwargs)  # type: ignore[arg-type]
        for seq in request.sequences:
            seq.wait_for_token = params.wait_for_token
        self.added += 1
        try:
            self.scheduler.add(request)
        except ValueError:
            return None
        self.requests.append(request)
        return request

    def stop(self, seq: Sequence) -> None:
        if seq.request.request_id in self.scheduler._lane_of:
            super().stop(seq)

    def _schedule(self) -> Any:
        return self._repeat(self.scheduler.schedule())

    def drain(self) -> None:
        while self.scheduler.has_work() or self.inflight:
            self.advance()
        self.scheduler.check()
        assert not self.requests and not self.scheduler._lane_of
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(pool.num_free == pool.capacity for pool in self.scheduler.pools)


def make(
    count: int,
    *,
    pages: int = 64,
    page_size: int = 4,
    cache: bool = True,
    lane: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Lanes:
    options = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 64, "eos_token_ids": [EOS]} | (lane or {})
    lanes = [
        Scheduler(PagePool(pages, page_size, cache), first_slot=i * options["max_batch_size"], **options)
        for i in range(count)
    ]
    return Lanes(lanes, **kwargs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(2, 12), st.integers(1, 5), schedulers, st.integers(1, 3), st.booleans(),
    st.integers(0, 4), st.integers(0, 3), st.lists(operations, max_size=25), st.sampled_from([1, 1, 2, 4]),
)  # fmt: skip
def test_any_load_runs_to_its_end(
    count, pages, page_size, options, depth, balance, timeout, batching, load, repeats
) -> None:
    lanes = make(
        count, pages=pages, page_size=page_size, lane=options, balance=balance, timeout_iters=timeout,
        batching_wait_iters=batching, priority_queue=options["priority_queue"],
    )  # fmt: skip
    harness = LaneHarness(lanes, depth + options["micro_batches"] - 1, repeats)
    replay(harness, load)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.lists(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), max_size=6), min_size=1, max_size=40),
)
def test_token_counts_stay_within_the_bound(count, load) -> None:
    """Two lanes with room differ by at most the largest request, what the larger one has generated and what the
    smaller one has finished since the larger one was last given a request."""
    lanes = make(
        count, pages=20_000, lane={"max_batch_size": 300, "max_num_tokens": 20_000, "max_seq_len": 128}, cache=False
    )
    harness = LaneHarness(lanes)
    largest, generated, finished = 0, [0] * count, [[0] * count for _ in range(count)]
    for arrivals in load:
        for length, outputs in arrivals:
            harness.add([2] * length, Params(max_tokens=outputs, ignore_eos=True))
            largest = max(largest, length)
        step = lanes.schedule()
        for index, _ in harness.assigned:
            generated[index], finished[index] = 0, [0] * count
        harness.assigned.clear()
        if step is not None:
            for event in lanes.update(step, harness.device.run(step)[0]):
                home = next(index for index, lane in enumerate(step.lanes) if event.seq in lane.rows)
                generated[home] += 1
                if event.finished:
                    for other in range(count):
                        finished[other][home] += len(event.seq.tokens)
        tokens = [lane.num_tokens for lane in lanes.lanes]
        for a in range(count):
            for b in range(count):
                assert tokens[a] - tokens[b] <= largest + generated[a] + finished[a][b]


def test_arrivals_alone_differ_by_one_request_at_most() -> None:
    lanes = make(4, pages=1000, lane={"max_batch_size": 16, "max_num_tokens": 4000, "max_seq_len": 200})
    harness = LaneHarness(lanes)
    for length in (90, 3, 70, 70, 5, 1, 33, 90, 8, 17, 64, 2):
        harness.add([2] * length, Params(max_tokens=9, ignore_eos=True))
    lanes.schedule()
    tokens = [lane.num_tokens for lane in lanes.lanes]
    assert max(tokens) - min(tokens) <= 90 and sum(tokens) == 453 and min(tokens) > 0


def test_idle_lanes_have_empty_steps() -> None:
    lanes = make(3)
    harness = LaneHarness(lanes)
    harness.add([2, 3, 4], Params(max_tokens=3, ignore_eos=True))
    step = lanes.schedule()
    assert step is not None and [lane.num_rows for lane in step.lanes] == [1, 0, 0] and step.num_rows == 1
    lanes.update(step, harness.device.run(step)[0])
    harness.drain()


def test_prompts_wait_until_every_lane_has_one_but_not_for_ever() -> None:
    lanes = make(2, balance=True, timeout_iters=3, batching_wait_iters=0)
    harness = LaneHarness(lanes)

    def run() -> int:
        step = lanes.schedule()
        assert step is not None
        lanes.update(step, harness.device.run(step)[0])
        return len(step.prefills)

    for _ in range(2):
        harness.add([2] * 3, Params(max_tokens=50, ignore_eos=True))
    assert run() == 2  # nobody decodes yet: no reason to wait
    harness.add([2] * 3, Params(max_tokens=50, ignore_eos=True))
    assert [run() for _ in range(4)] == [0, 0, 0, 1]
    harness.add([2] * 3, Params(max_tokens=50, ignore_eos=True))
    assert run() == 0
    harness.add([2] * 9, Params(max_tokens=50, ignore_eos=True))  # now both have one
    assert run() == 2
    assert lanes.num_held_back == 4
    harness.add([2] * 3, Params(max_tokens=50, ignore_eos=True))
    assert [run() for _ in range(4)] == [0, 0, 0, 1], "and the next one waits as long"


def test_prompts_wait_for_more_of_them() -> None:
    lanes = make(2, balance=True, timeout_iters=3, batching_wait_iters=2)
    harness = LaneHarness(lanes)
    for _ in range(2):
        harness.add([2] * 3, Params(max_tokens=50, ignore_eos=True))
    counts = []
    for _ in range(7):
        step = lanes.schedule()
        assert step is not None
        lanes.update(step, harness.device.run(step)[0])
        counts.append(len(step.prefills))
        if len(counts) == 1:
            for _ in range(2):
                harness.add([2] * 3, Params(max_tokens=50, ignore_eos=True))
    assert counts == [2, 0, 0, 2, 0, 0, 0]


def test_steps_are_not_repeated_while_requests_wait_for_a_lane() -> None:
    lanes = make(2, lane={"max_batch_size": 1})
    harness = LaneHarness(lanes)
    for _ in range(2):
        harness.add([2] * 3, Params(max_tokens=30, ignore_eos=True))
    harness.advance()
    step = lanes.schedule()
    assert step is not None and step.num_rows == 2 and lanes.can_repeat(step, 4)
    harness.add([2] * 3, Params(max_tokens=30, ignore_eos=True))
    assert lanes.num_waiting == 1 and not lanes.can_repeat(step, 4)


def test_a_request_in_the_queue_can_be_cancelled() -> None:
    lanes = make(1, lane={"max_batch_size": 1})
    harness = LaneHarness(lanes)
    first = harness.add([2], Params(max_tokens=5, ignore_eos=True))
    second = harness.add([2], Params(max_tokens=5, n=2))
    lanes.schedule()
    assert first is not None and second is not None and lanes.num_waiting == 1
    lanes.abort(second)
    assert second.finished and [seq.finish_reason for seq in second.sequences] == [FinishReason.CANCELLED] * 2
    lanes.abort(second)
    lanes.abort(first)
    assert not lanes.has_work() and lanes.schedule() is None
    lanes.check()
