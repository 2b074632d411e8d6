"""What the engine's thread spends on each phase of a step."""

from __future__ import annotations

import time

Moment = tuple[float, float]


class HostClock:
    """Seconds by phase, on the wall and of the calling thread's CPU time.

    They differ by what the thread waits for: on a CPU, XLA's threads have the cores while the host prepares the next
    step.
    """

    def __init__(self, *phases: str):
        self.wall = dict.fromkeys(phases, 0.0)
        self.cpu = dict.fromkeys(phases, 0.0)

    @staticmethod
    def now() -> Moment:
        return time.perf_counter(), time.thread_time()

    def add(self, phase: str, since: Moment) -> Moment:
        """Counts the time since a moment to a phase; returns the present moment."""
        wall, cpu = now = self.now()
        self.wall[phase] += wall - since[0]
        self.cpu[phase] += cpu - since[1]
        return now

    def reset(self) -> None:
        for seconds in (self.wall, self.cpu):
            seconds.update(dict.fromkeys(seconds, 0.0))
