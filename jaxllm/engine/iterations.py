"""What every iteration of the engine looked like, for whoever watches it: the figures of TensorRT-LLM's /metrics."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

KEPT = 1000


@dataclass(frozen=True, slots=True)
class Iteration:
    """One step of the device, noted when its tokens arrived.

    number: counts from 1. ended: `time.time()`. seconds: since it was launched, or since the iteration before arrived.
    context, generation: prompt chunks and decodes in it. tokens: computed in it. running, waiting: sequences after it.
    pages_used: pages held after it. hits, misses, evictions: pages, since the start.
    """

    number: int
    ended: float
    seconds: float
    context: int
    generation: int
    tokens: int
    running: int
    waiting: int
    pages_used: int
    hits: int
    misses: int
    evictions: int


class IterationLog:
    """The last iterations. The engine's thread adds, any thread reads; reading takes nothing away."""

    def __init__(self) -> None:
        self._kept: deque[Iteration] = deque(maxlen=KEPT)
        self._launched: deque[float] = deque()
        self._arrived = 0.0
        self._number = 0
        self.total_seconds = 0.0

    def launched(self) -> None:
        """A step is on its way."""
        self._launched.append(time.perf_counter())

    def arrived(self) -> float:
        """The oldest step on its way is back; returns the seconds it took, without those of the step before it."""
        now = time.perf_counter()
        began = max(self._launched.popleft(), self._arrived)
        self._arrived = now
        self._number += 1
        self.total_seconds += now - began
        return now - began

    def add(self, seconds: float, *figures: int) -> None:
        """Notes the step that arrived last; `figures` are those of `Iteration` from `context` on."""
        self._kept.append(Iteration(self._number, time.time(), seconds, *figures))

    def since(self, number: int) -> list[Iteration]:
        """The kept iterations after the given number, oldest first."""
        if not self._kept or self._number <= number:
            return []
        # A copy first: the engine's thread may append meanwhile, which ends an iteration over the deque.
        return [iteration for iteration in self._kept.copy() if iteration.number > number]
