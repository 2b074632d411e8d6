"""Finds the devices while Python still imports: the driver of a GPU takes seconds to start, and nobody waits for it.

And what the machine has for those that are its CPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.engine.sizes import memory_fraction_variable
from jaxllm.settings import ConfigError, check_environment

if TYPE_CHECKING:
    import jax

THREADS = 4
"""Threads of XLA for each device that a CPU plays. Of its own accord it has one: a rank that waits for the others in a
collective holds it, so does an operation that waits for its parts, and where the parts of the last rank find none left
all stand still until XLA ends the process. With 4 a rank may wait for three of its operations at once beside."""


def look_early() -> threading.Thread:
    """Starts to look for devices, in a thread of its own; whoever needs them next waits for it within JAX.

    Settings of JAX that decide about devices have to be made before. Raises ConfigError, or what JAX raises while it is
    imported, when a variable of the environment has a value that JAX cannot take.
    """
    prepare()
    thread = threading.Thread(target=_look, name="jaxllm-devices", daemon=True)
    thread.start()
    return thread


def find() -> list[jax.Device]:
    """The devices there are. Raises ConfigError when JAX finds none, and says why."""
    import jax

    prepare()
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion is how JAX misses the plugin of a platform
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = " ".join(str(error).split()) or "the platform is not installed"
        raise ConfigError(
            f"JAX finds no devices (JAX_PLATFORMS = {wanted or ''!r}): {reason}; install what the platform needs, "
            'for NVIDIA GPUs pip install "jaxllm[cuda13]", or set JAX_PLATFORMS=cpu'
        ) from None


def prepare() -> None:
    """Sets the variables that are read when the first device is looked for; what the user has set stays."""
    check_environment()
    import jax

    os.environ.update(memory_fraction_variable())
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    named: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    cpus = max(named, int(forced[1]) if forced else 1)
    if cpus > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS * cpus))


def _look() -> None:
    import jax

    with contextlib.suppress(Exception):  # whoever needs a device hears of it
        jax.devices()


def host_memory() -> int:
    """Bytes of memory that this machine has, or the container that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # it says "max" where there is no limit
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)
