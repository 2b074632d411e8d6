"""Finds the devices while Python still imports: the driver of a GPU takes seconds to start, and nobody waits for it.

And what the machine has for those that are its CPU.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from jaxllm.engine.sizes import memory_fraction_variable


def look_early() -> threading.Thread:
    """Starts to look for devices, in a thread of its own; whoever needs them next waits for it within JAX.

    Settings of JAX that decide about devices have to be made before.
    """
    os.environ.update(memory_fraction_variable())  # read when the first device is looked for
    thread = threading.Thread(target=_look, name="jaxllm-devices", daemon=True)
    thread.start()
    return thread


def _look() -> None:
    import jax

    with contextlib.suppress(RuntimeError):  # whoever needs a device hears of it
        jax.devices()


def host_memory() -> int:
    """Bytes of memory that this machine has, or the container that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # it says "max" where there is no limit
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)
