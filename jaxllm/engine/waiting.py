"""The waiting queue: sequences that have no slot yet, or have lost it."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from jaxllm.engine.request import Sequence


class WaitingQueue:
    """A heap of waiting sequences, by arrival or by priority and arrival.

    A preempted sequence keeps its arrival and so comes out in front of those of its own priority. Sequences that finish
    while they wait stay in the heap until they surface or are the majority of it, so that a cancel costs no search.
    """

    def __init__(self, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._heap: list[tuple[tuple[float, int, int], Sequence]] = []
        self._stale = 0

    def __len__(self) -> int:
        return len(self._heap) - self._stale

    def push(self, seq: Sequence) -> None:
        """Add a waiting sequence."""
        key = seq.rank if self._by_priority else (0.0, seq.rank[1], seq.rank[2])
        heappush(self._heap, (key, seq))

    def peek(self) -> Sequence | None:
        """The sequence to be served next, or None."""
        while self._heap and self._heap[0][1].finished:
            heappop(self._heap)
            self._stale -= 1
        return self._heap[0][1] if self._heap else None

    def num_tokens(self, enough: int) -> int:
        """Known tokens of the waiting sequences; counts no further than `enough`."""
        total = 0
        for _, seq in self._heap:
            if not seq.finished:
                total += len(seq.tokens)
                if total >= enough:
                    break
        return total

    def pop(self) -> None:
        """Remove the sequence that `peek` returned."""
        heappop(self._heap)

    def note_finished(self) -> None:
        """Tell the queue that one of its sequences has just finished."""
        self._stale += 1
        if self._stale > 64 and self._stale * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].finished]
            heapify(self._heap)
            self._stale = 0

    def check(self) -> None:
        """Verify that the counts are right and nobody is in the queue twice; RuntimeError. For tests."""
        alive = sum(not seq.finished for _, seq in self._heap)
        if alive != len(self):
            raise RuntimeError(f"{alive} sequences wait, but {len(self)} are counted")
        if len({id(seq) for _, seq in self._heap}) != len(self._heap):
            raise RuntimeError("a sequence is twice in the queue")
