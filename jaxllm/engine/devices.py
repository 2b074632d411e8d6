"""Finds the devices while Python still imports: the driver of a GPU takes seconds to start, and nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import threading

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
