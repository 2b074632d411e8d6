"""Who waits, who runs and who has ended, and what each of these moves does to slots and pages."""

from __future__ import annotations

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.pages import Pages
from jaxllm.engine.request import FinishReason, Request, Sequence, SequenceStatus
from jaxllm.engine.running import Running
from jaxllm.engine.waiting import WaitingQueue

_WAITING, _RUNNING, _FINISHED = SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.FINISHED


class Roster:
    """The sequences of a scheduler's unfinished requests: everything that changes a sequence's status is here.

    waiting, running, pages: see their classes. Siblings come into the queue when the prompt of the first is computed.
    """

    def __init__(self, pool: PagePool, *, slots: range, guaranteed: bool, by_priority: bool) -> None:
        self.pool = pool
        self.waiting = WaitingQueue(by_priority=by_priority)
        self.running = Running(slots)
        self.pages = Pages(pool, guaranteed=guaranteed)
        self.num_preemptions = 0
        self.arrivals = 0
        self._requests: dict[int, Request] = {}  # unfinished ones

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    @property
    def num_tokens(self) -> int:
        """Known tokens of all unfinished sequences."""
        requests = self._requests.values()
        return sum(len(seq.tokens) for request in requests for seq in request.sequences if not seq.finished)

    def add(self, request: Request) -> None:
        """A request comes: its first sequence waits."""
        request.arrival = self.arrivals
        self.arrivals += 1
        self._requests[request.request_id] = request
        for seq in request.sequences:
            seq.rank = (-request.priority, request.arrival, seq.index)
        self.waiting.push(request.sequences[0])

    def start(self, seq: Sequence) -> None:
        """The head of the queue, which has its pages, runs."""
        self.waiting.pop()
        self.running.enter(seq)

    def decode(self, seq: Sequence) -> None:
        """The last of its prompt is on its way: it decodes from the next step on, and its siblings may come."""
        self.running.decode(seq)
        if not seq.request.forked:
            self._fork(seq.request)

    def abort(self, request: Request) -> None:
        """Cancel a request at once: its pages and slots are free when this returns. No-op when it is not here."""
        if self._requests.get(request.request_id) is not request:
            return
        for seq in request.sequences:
            if seq.status is not _FINISHED:
                self._end(seq, FinishReason.CANCELLED, None)

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End one sequence now. No-op when it has finished."""
        if seq.status is _FINISHED:
            return
        request = seq.request
        if not request.forked:
            self._fork(request)
        if len(request.sequences) > 1:
            self.pages.shared.hand_over(seq)
        self._end(seq, reason, stop_reason)

    def make_room(self, count: int, seq: Sequence) -> bool:
        """Free pages for a decoding sequence, by preemption if need be; False when it was itself the one to go."""
        pool = self.pool
        if pool.num_free >= count:
            return True
        self.pages.shared.strip_until(count)
        while pool.num_free < count:
            victim = self.running.lowest
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.move(_WAITING)
        self.num_preemptions += 1
        self.waiting.push(seq)

    def _fork(self, request: Request) -> None:
        """Let the siblings of the first sequence in: its prompt is computed, or never will be."""
        request.forked = True
        for sibling in request.sequences[1:]:
            if sibling.status is _WAITING:
                self.waiting.push(sibling)

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        request = seq.request
        was_running = seq.status is _RUNNING
        if was_running:
            self._leave(seq)
        elif seq.pages:
            self.pages.shared.strip(seq)
        seq.move(_FINISHED)
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        if not was_running and (request.forked or seq.index == 0):
            self.waiting.note_finished()
        if request.finished:
            self._requests.pop(request.request_id, None)

    def _leave(self, seq: Sequence) -> None:
        """Take a running sequence out of the batch: pages, slot and reservation are free afterwards."""
        self.running.leave(seq)
        self.pages.give_back(seq)

    def check(self) -> None:
        """Verify the invariants of the roster and its pool; RuntimeError names one that is broken. For tests."""
        self.running.check()
        running = self.running.decoding + self.running.prefilling
        self.pool.check([seq.pages for seq in running + self.pages.shared.heirs])
        if self.pages.reserved != sum(seq.max_pages for seq in running):
            raise RuntimeError(f"{self.pages.reserved} pages reserved, but the running sequences do not add up to that")
        self.waiting.check()
        if not self._requests and (running or self.pages.shared.heirs or self.waiting):
            raise RuntimeError("no request is left, but some of their sequences are")
