"""Whether CUDA kernels can be used, and how one is put into a compiled program.

A kernel is used on a device of compute capability 9.0 (H100, H200) where NVRTC is found and its check at start agreed
with its reference. Elsewhere there is one warning, and XLA does the work. `JAXLLM_CUDA=0` turns the kernels off, and
`JAXLLM_CUDA=-rope_write,-paged_decode` these two. `JAXLLM_CUDA=+residual_norm` uses one wherever it can be used, also
where it was not measured to be faster than XLA.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxllm.kernels.cuda import rtc

logger = logging.getLogger(__name__)

CAPABILITY = "9.0"
MAX_SHARED = 227 * 1024
"""Bytes of shared memory that one block may have."""
SMS = 132
"""Multiprocessors of an H100 or H200 (SXM)."""

Check = Callable[[], None]

_lock = threading.Lock()
_described: str | None = None
_refused: dict[str, str] = {}
_warned = False


def describe_target(capability: str | None) -> None:
    """Says that programs will be compiled for a GPU of this compute capability that is not here; None: not any more.

    A process without a GPU otherwise puts no CUDA kernels into its programs, and never starts NVRTC.
    """
    global _described
    if capability != _described:
        _described = capability
        jax.clear_caches()  # traces hold the choice of kernels


def require(kernel: str) -> None:
    """Raises NotImplementedError, which says why, where the CUDA kernel of this name cannot be used."""
    setting = os.environ.get("JAXLLM_CUDA", "")
    if setting == "0" or f"-{kernel}" in setting.split(","):
        raise NotImplementedError(f"JAXLLM_CUDA={setting}")
    capability = _described
    if capability is None:
        if jax.default_backend() != "gpu":
            raise NotImplementedError("no GPU")
        capability = str(getattr(jax.local_devices()[0], "compute_capability", "unknown"))
    if capability != CAPABILITY:
        refuse("", f"they are written for compute capability {CAPABILITY}, and this GPU has {capability}")
    elif "" not in _refused and kernel not in _refused:
        try:
            rtc.version()
        except rtc.CompileError as error:
            refuse("", str(error))
    for name in ("", kernel):
        if name in _refused:
            raise NotImplementedError(_refused[name])


def asked_for(kernel: str) -> bool:
    """Whether the kernel is to be used wherever it can be."""
    return f"+{kernel}" in os.environ.get("JAXLLM_CUDA", "").split(",")


def usable(kernel: str) -> bool:
    """Whether `require` has nothing against a kernel."""
    try:
        require(kernel)
    except NotImplementedError:
        return False
    return True


def refuse(kernel: str, reason: str) -> None:
    """Turns a kernel off for the rest of the process ("": all of them); the first time, with a warning."""
    global _warned
    with _lock:
        _refused.setdefault(kernel, reason)
        if not _warned:
            _warned = True
            what = f"the CUDA kernel {kernel!r} cannot be used" if kernel else "the CUDA kernels cannot be used"
            logger.warning("%s, so XLA does the work, more slowly: %s", what, reason)


def compile_or_refuse(kernel: str, source: str, macros: Mapping[str, object]) -> str:
    """The PTX of `<source>.cu`. Raises NotImplementedError where it cannot be made, after turning the kernel off."""
    try:
        return rtc.compile_ptx(source, macros)
    except rtc.CompileError as error:
        refuse(kernel, str(error))
        raise NotImplementedError(str(error)) from None


def check_all(checks: Mapping[str, Check]) -> dict[str, bool]:
    """Runs the check of each usable kernel on this process's first GPU; a kernel whose check raises is turned off.

    All at the same time: what they take is the compilers' time. Returns which of them agreed.
    """

    def run(kernel: str, check: Check) -> bool:
        try:
            with jax.default_device(jax.local_devices()[0]):
                check()
        except Exception as error:  # whatever a driver, a compiler or a wrong result makes of it
            refuse(kernel, f"its check failed: {str(error).strip() or type(error).__name__}")
            return False
        return True

    wanted = {kernel: check for kernel, check in checks.items() if usable(kernel)}
    if not wanted:
        return {}
    with ThreadPoolExecutor(len(wanted), "check") as pool:
        return dict(zip(wanted, pool.map(run, wanted, wanted.values()), strict=True))


def launch(
    name: str,
    ptx: str,
    arguments: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: Sequence[int],
    threads: int,
    shared: int = 0,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Runs the kernel `name` of a PTX module inside a program that is compiled for a GPU; can be part of a CUDA graph.

    The kernel's parameters are pointers: to every argument, then to every result.

    Args:
      grid: blocks in x, y and z (those left out are 1).
      threads: of a block.
      shared: bytes of dynamic shared memory, at most MAX_SHARED.
      aliases: argument to result that is the same memory: the kernel writes it in place.
    """
    if shared > MAX_SHARED:
        raise ValueError(f"{name} wants {shared} bytes of shared memory, and a block has at most {MAX_SHARED}")
    x, y, z = (*grid, 1, 1)[:3]
    attributes: dict[str, Any] = {"grid_x": x, "grid_y": y, "grid_z": z, "block_x": threads, "block_y": 1, "block_z": 1}
    attributes["shared_mem_bytes"] = shared
    call = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", tuple(results), input_output_aliases=dict(aliases or {}))
    return list(
        call(
            *arguments,
            name=name,
            kernel_type="ptx",
            kernel_data=ptx,
            **{key: np.int32(value) for key, value in attributes.items()},
        )
    )
