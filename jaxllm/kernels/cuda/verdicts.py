"""Which kernels agreed with their references here before, so that a process need not compile and run checks again.

A verdict holds for the kernels' sources, the compilers and the driver that it was made with, and for GPUs of its kind;
it lies under `~/.cache/jaxllm/cuda` (or `$JAXLLM_CACHE/cuda`). Only what agreed is kept: a kernel that was wrong is
checked at every start.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import jax
import jaxlib

from jaxllm.cache import cache_dir, write_whole
from jaxllm.kernels.cuda import rtc

logger = logging.getLogger(__name__)

DRIVER = Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver for Linux says which one it is."""


class Verdicts:
    """The kernels whose checks agreed. `read` where it can be told what they hold for, otherwise nothing is known."""

    def __init__(self, path: Path | None):
        self._path = path
        self._passed = _read(path) if path is not None else frozenset[str]()

    @classmethod
    def read(cls) -> Verdicts:
        """Those for this process's first GPU and what it runs."""
        try:
            driver = DRIVER.read_text()
        except OSError:
            return cls(None)
        device = jax.local_devices()[0]
        parts = [driver, device.device_kind, device.client.platform_version, jax.__version__, jaxlib.__version__]
        key = _digest([*map(str, parts), str(rtc.version()), _sources()])
        return cls(cache_dir("cuda") / f"agreed-{key[:32]}.txt")

    def __contains__(self, kernel: str) -> bool:
        return kernel in self._passed

    def add(self, kernels: set[str]) -> None:
        """Keeps that these agreed. Where the file cannot be written they are checked again by the next process."""
        self._passed |= kernels
        if self._path is None or not kernels:
            return
        lines = "\n".join(sorted(self._passed | _read(self._path)))
        try:
            write_whole(self._path, f"{_digest([lines])}\n{lines}".encode())
        except OSError as error:
            logger.info("verdicts on kernels are not kept: %s", error)


def _read(path: Path) -> frozenset[str]:
    try:
        digest, _, lines = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return frozenset()
    return frozenset(lines.split("\n")) if digest == _digest([lines]) else frozenset()


def _sources() -> str:
    """Of all that a check compiles and compares: CUDA sources, the wrappers around them, and the references."""
    root = rtc.SOURCES.parent
    found = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))
    return _digest([part for path in found for part in (str(path.relative_to(root)), path.read_text())])


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(chr(0).join(parts).encode()).hexdigest()
