"""Keeps a CPU that plays several devices from being given more programs than it can finish.

XLA:CPU has 32 programs of a device on their way at most. A launch beyond that holds one of the threads that programs
run on until there is room, and of those there are only as many as cores, or as devices where they are more. In the
program that runs, the ranks wait for one another in each collective, every one on a thread: when none is left for one
of them all stand still, and after 40 seconds XLA ends the process. A GPU's stream takes whatever is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import jax
from jax.sharding import Mesh

LIMIT = 8
"""Programs on their way at most, those of all engines of the process: a quarter of what the runtime allows."""

_launches = count(1)


class Paced:
    """A compiled program, each LIMIT-th launch of which, counted over all of them, waits until its results are there.

    Launches of several devices are worked on in their order, so that then none is left of those before.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        self._program = program

    def __call__(self, *args: Any) -> Any:
        results = self._program(*args)
        if next(_launches) % LIMIT == 0:
            jax.block_until_ready(results)
        return results

    def __getattr__(self, name: str) -> Any:
        """What else a compiled program can be asked for."""
        return getattr(self._program, name)


def paced(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The program for the devices of `mesh`, paced where several of them are this process's CPU."""
    devices = mesh.local_devices
    return Paced(program) if len(devices) > 1 and devices[0].platform == "cpu" else program
