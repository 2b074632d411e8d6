"""The running sequences of a scheduler: who has a slot, and in which order they would lose it."""

from __future__ import annotations

from bisect import insort

from jaxllm.engine.request import Sequence, SequenceStatus


class Running:
    """Sequences that have a slot: those whose prompt is under way, and those that decode.

    Both lists are in order of rank, so that the last one is the next to be preempted.
    """

    def __init__(self, slots: range) -> None:
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.slots = slots
        self.free_slots = list(reversed(slots))

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    def enter(self, seq: Sequence) -> None:
        """A waiting sequence gets a slot, and its prompt is under way."""
        seq.move(SequenceStatus.RUNNING)
        seq.slot = self.free_slots.pop()
        insort(self.prefilling, seq, key=_rank)

    def decode(self, seq: Sequence) -> None:
        """Its prompt is computed: from the next step on it decodes."""
        self.prefilling.remove(seq)
        insort(self.decoding, seq, key=_rank)

    def leave(self, seq: Sequence) -> None:
        """Its slot is free afterwards."""
        (self.decoding if seq in self.decoding else self.prefilling).remove(seq)
        self.free_slots.append(seq.slot)
        seq.slot = -1

    @property
    def lowest(self) -> Sequence:
        """The next to be preempted, where anybody decodes."""
        victim = self.decoding[-1]
        if self.prefilling and self.prefilling[-1].rank > victim.rank:
            return self.prefilling[-1]
        return victim

    def check(self) -> None:
        """Verify that slots, order and states are right; RuntimeError names what is not. For tests."""
        running = self.decoding + self.prefilling
        slots = [seq.slot for seq in running] + self.free_slots
        if sorted(slots) != list(self.slots):
            raise RuntimeError(f"slots are lost or given twice: {sorted(slots)}")
        if any(seq.status is not SequenceStatus.RUNNING for seq in running):
            raise RuntimeError("a sequence in the batch is not running")
        for group in (self.decoding, self.prefilling):
            if group != sorted(group, key=_rank):
                raise RuntimeError("the running sequences are not in order of rank")


def _rank(seq: Sequence) -> tuple[float, int, int]:
    return seq.rank
