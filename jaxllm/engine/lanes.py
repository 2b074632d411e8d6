"""Attention data parallelism on the host: each rank has requests, slots and pages of its own, a lane.

Requests wait in one queue until a lane can start them, and then go to the lane that holds the fewest tokens. So the
lanes differ by no more than the largest request, plus what sequences of one lane have generated and what sequences of
another have finished since it was last given one; and whatever finishes, the next requests restore the balance.

A step costs as much as its slowest rank. With `balance` prompts are therefore held back until every lane has some, as
TensorRT-LLM's attention_dp_config does: for at most `timeout_iters` steps, and then for `batching_wait_iters` more
steps in which more may arrive. Nothing is held back while a lane has nothing to decode, because it would idle.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from heapq import heappop, heappush

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import FinishReason, Request, Sequence, SequenceStatus
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Event, LaneSteps, Step


class Lanes:
    """Schedulers that share the steps of a device, seen as one; see the module and `Scheduler`.

    balance, timeout_iters, batching_wait_iters: see the module. priority_queue: as for the schedulers.
    """

    def __init__(
        self,
        lanes: Rows[Scheduler],
        *,
        balance: bool = False,
        timeout_iters: int = 50,
        batching_wait_iters: int = 10,
        priority_queue: bool = False,
    ) -> None:
        self.lanes = list(lanes)
        self.max_seq_len = min(lane.max_seq_len for lane in lanes)
        self.micro_batches = lanes[0].micro_batches
        self.num_held_back = 0
        self._balance = balance
        self._timeout_iters = timeout_iters
        self._batching_wait_iters = batching_wait_iters
        self._priority_queue = priority_queue
        self._arrivals = 0
        self._queue: list[tuple[tuple[float, int], Request]] = []
        self._queued: dict[int, Request] = {}  # the unfinished ones of the queue
        self._lane_of: dict[int, Scheduler] = {}
        self._waited = 0  # steps that prompts waited for every lane to have some
        self._batched = 0  # steps that they then waited for more

    # ---- requests come and go -------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return sum(lane.num_running for lane in self.lanes)

    @property
    def num_waiting(self) -> int:
        return len(self._queued) + sum(lane.num_waiting for lane in self.lanes)

    @property
    def num_preemptions(self) -> int:
        return sum(lane.num_preemptions for lane in self.lanes)

    @property
    def num_quiet_tokens(self) -> int:
        return sum(lane.num_quiet_tokens for lane in self.lanes)

    @property
    def pools(self) -> list[PagePool]:
        return [lane.pool for lane in self.lanes]

    def has_work(self) -> bool:
        return bool(self._queued) or any(lane.has_work() for lane in self.lanes)

    def validate(self, request: Request) -> None:
        """ValueError when a request can never run; any thread may call it."""
        if request.request_id in self._queued or request.request_id in self._lane_of:
            raise ValueError(f"request {request.request_id} was added before: use a new id")
        self.lanes[0].validate(request)

    def add(self, request: Request) -> None:
        """Puts a request into the common queue. ValueError when it can never run; then nothing has changed."""
        self.validate(request)
        key = (-request.priority if self._priority_queue else 0.0, self._arrivals)
        self._arrivals += 1
        heappush(self._queue, (key, request))
        self._queued[request.request_id] = request

    def abort(self, request: Request) -> None:
        """Cancels a request at once; no-op when it is not here."""
        lane = self._lane_of.pop(request.request_id, None)
        if lane is not None:
            lane.abort(request)
        elif self._queued.get(request.request_id) is request:
            del self._queued[request.request_id]
            for seq in request.sequences:
                seq.move(SequenceStatus.FINISHED)
                seq.finish_reason = FinishReason.CANCELLED

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends one sequence of a request that has a lane; no-op when it has finished."""
        if not seq.finished:
            self._lane_of[seq.request.request_id].finish(seq, reason, stop_reason)
            self._forget(seq.request)

    def _forget(self, request: Request) -> None:
        if request.finished:
            self._lane_of.pop(request.request_id, None)

    # ---- one step -------------------------------------------------------------------------------------------------

    def schedule(self) -> LaneSteps | None:
        """The next step of all lanes (a lane with nothing to do has an empty one), or None when no lane has any."""
        self._assign()
        prompts = not (self._balance and self._hold_prompts())
        steps = [lane.schedule(prompts, ahead=False) for lane in self.lanes]
        if not any(steps) and not prompts:
            steps = [lane.schedule(ahead=False) for lane in self.lanes]
        if not any(steps):
            steps = [lane.schedule() for lane in self.lanes]
        if not any(steps):
            return None
        for lane, step in zip(self.lanes, steps, strict=True):
            if step is None:
                lane.sit_out()
        return LaneSteps([step or Step() for step in steps])

    def can_repeat(self, step: LaneSteps, count: int) -> bool:
        """Whether all lanes may do their steps `count` times before the host hears of it, as `Scheduler.can_repeat`."""
        lanes = zip(self.lanes, step.lanes, strict=True)
        return not self._queued and all(lane.can_repeat(lane_step, count) for lane, lane_step in lanes)

    def repeat(self, step: LaneSteps, count: int) -> None:
        """Has a step done `count` times; `can_repeat` must have agreed."""
        step.repeats = count
        for lane, lane_step in zip(self.lanes, step.lanes, strict=True):
            lane.repeat(lane_step, count)

    def _assign(self) -> None:
        """Hands the next requests out, each to the lane with the fewest tokens of those that can start one."""
        if not self._queued:
            self._queue.clear()
            return
        # A lane whose own queue is not empty has no pages for a sequence that came before.
        room = {
            index: [lane.num_tokens, lane.num_free_slots, lane.max_num_tokens]
            for index, lane in enumerate(self.lanes)
            if lane.num_free_slots and not lane.num_waiting
        }
        while self._queue and room:
            _, request = heappop(self._queue)
            if self._queued.pop(request.request_id, None) is None:
                continue  # cancelled meanwhile
            index = min(room, key=lambda index: (room[index][0], index))
            lane, state = self.lanes[index], room[index]
            lane.add(request)
            self._lane_of[request.request_id] = lane
            length = len(request.prompt_token_ids)
            state[0] += length * len(request.sequences)
            state[1] -= 1
            state[2] -= length
            if min(state[1:]) <= 0:  # what comes later may find a better place in the next step
                del room[index]

    def _hold_prompts(self) -> bool:
        """Whether prompts wait in this step; counts the steps that they have waited."""
        if not all(lane.has_decodes for lane in self.lanes):
            self._waited = self._batched = 0
            return False
        if not any(lane.has_prompts for lane in self.lanes):
            return False
        if all(lane.has_prompts for lane in self.lanes):
            self._waited = 0
            hold = self._batched < self._batching_wait_iters
            self._batched = self._batched + 1 if hold else 0
        else:
            hold = self._waited < self._timeout_iters
            self._waited = self._waited + 1 if hold else 0
        self.num_held_back += hold
        return hold

    # ---- results --------------------------------------------------------------------------------------------------

    def update(self, step: Step | LaneSteps, tokens: Rows[int]) -> list[Event]:
        """Takes the sampled tokens of a step, in the order of its rows; call it once per step, in order."""
        events: list[Event] = []
        first = 0
        for lane, lane_step in zip(self.lanes, step.lanes, strict=True):
            found = lane.update(lane_step, tokens[first : first + lane_step.num_rows])
            for event in found:
                event.row += first
                if event.finished:
                    self._forget(event.seq.request)
            events += found
            first += lane_step.num_rows
        return events

    def check(self) -> None:
        """Verify the invariants of every lane; RuntimeError names one that is broken. For tests."""
        for lane in self.lanes:
            lane.check()
        if len({lane._num_steps for lane in self.lanes}) > 1:
            raise RuntimeError("the lanes count different steps")
        if any(request.finished for request in self._queued.values()):
            raise RuntimeError("a finished request waits for a lane")
        if not all(lane.has(request_id) for request_id, lane in self._lane_of.items()):
            raise RuntimeError("a request is counted to a lane that does not have it")
