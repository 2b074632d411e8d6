"""What the scheduler decides for one step of the device, and what comes back from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.engine.request import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens [start, stop) of a sequence, to be computed in one step; `samples`: a token is sampled after the last."""

    seq: Sequence
    start: int
    stop: int
    samples: bool


@dataclass(slots=True)
class Step:
    """One step of the device. Result rows: one per decode, then one per chunk (ignored unless it samples).

    `positions[i]` is the position whose KV decode i writes; its input token is the last one sampled in its slot.
    `grown` are the indices of the decodes that got a page for it.
    `started` are the sequences that got their slot in this step: the state of the slot has to be initialised.
    Pack a step before calling the scheduler again: page lists change when a sequence is cancelled or preempted.

    repeats: decode steps that the device does one after the other, without the host; more than one only where there is
    nothing but decodes. `counts[i]`, then, is how many of them decode i takes part in.
    """

    decodes: list[Sequence] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    repeats: int = 1
    counts: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[Sequence]:
        """The sequence of each result row."""
        return self.decodes + [chunk.seq for chunk in self.prefills]

    @property
    def lanes(self) -> list[Step]:
        """This step as the only lane; see `LaneSteps`."""
        return [self]

    @property
    def num_rows(self) -> int:
        """Result rows of this step."""
        return len(self.decodes) + len(self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        decodes = len(self.decodes) if self.repeats == 1 else sum(self.counts)
        return decodes + sum(chunk.stop - chunk.start for chunk in self.prefills)


@dataclass(slots=True)
class LaneSteps:
    """One step of the device with several lanes, each of which has requests, slots and pages of its own.

    Result rows: those of the first lane's Step, then those of the second's, and so on.
    """

    lanes: list[Step]
    repeats: int = 1

    @property
    def decodes(self) -> list[Sequence]:
        return [seq for lane in self.lanes for seq in lane.decodes]

    @property
    def prefills(self) -> list[Chunk]:
        return [chunk for lane in self.lanes for chunk in lane.prefills]

    @property
    def started(self) -> list[Sequence]:
        return [seq for lane in self.lanes for seq in lane.started]

    @property
    def rows(self) -> list[Sequence]:
        """The sequence of each result row."""
        return [seq for lane in self.lanes for seq in lane.rows]

    @property
    def num_rows(self) -> int:
        """Result rows of this step."""
        return sum(lane.num_rows for lane in self.lanes)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(lane.num_tokens for lane in self.lanes)


@dataclass(slots=True)
class Event:
    """A new token of a sequence, the result row it came from, and whether the sequence ended with it."""

    seq: Sequence
    token: int
    finished: bool
    row: int
