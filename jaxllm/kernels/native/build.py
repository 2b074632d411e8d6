"""Compiles, caches, checks and registers the C++ kernels of this folder.

A kernel is compiled with the machine's own compiler and flags at first use, kept as a shared library under
`~/.cache/jaxllm/native` (or `$JAXLLM_CACHE/native`), and trusted once it has agreed with its reference on a small
input. Where any of that fails there is one warning, and XLA does the work. `JAXLLM_NATIVE=0` turns the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib

from jaxllm.cache import cache_dir

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-w", "-pthread")
TIMEOUT_S = 60

_lock = threading.Lock()
_usable: dict[str, bool] = {}
_warned = False


def available(name: str, check: Callable[[str], None]) -> bool:
    """Whether the kernel of `native/<name>.cc` can be called as the FFI target `jaxllm_<name>`.

    The first call builds and registers it and then runs `check(target)`, which raises if the kernel gives wrong
    results; later calls only look up the outcome. False without building anything in a process whose default backend is
    not the CPU, so that a GPU server never starts a compiler.
    """
    with _lock:
        if name not in _usable:
            if os.environ.get("JAXLLM_NATIVE") == "0" or jax.default_backend() != "cpu":
                return False
            try:
                target = f"jaxllm_{name}"
                symbol = getattr(load(name), target)
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="cpu")
                _outside_any_trace(check, target)
                _usable[name] = True
            except Exception as error:
                _usable[name] = False
                _warn(name, error)
        return _usable[name]


def _warn(name: str, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        reason = str(error).strip() or type(error).__name__
        logger.warning(
            "the native CPU kernel %r cannot be used, so XLA does its work, up to twice as slowly: %s", name, reason
        )


def _outside_any_trace(check: Callable[[str], None], target: str) -> None:
    """Runs the check in a thread of its own: traces are a thread's, and the caller may well be inside one."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                check(target)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"check-{target}", daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if thread.is_alive():
        raise RuntimeError(f"its check did not end within {TIMEOUT_S} s")
    if errors:
        raise RuntimeError(f"its check failed: {errors[0]}") from errors[0]


def load(name: str) -> ctypes.CDLL:
    """The shared library of a kernel, from the cache if it is there and loads, otherwise built."""
    path = library_path(name)
    if path.exists():
        try:
            return _open(path)
        except (OSError, RuntimeError) as error:
            logger.info("building %s again: %s", path, error)
    compile_to(name, path)
    return _open(path)


def _open(path: Path) -> ctypes.CDLL:
    # A truncated library can crash the process while it is mapped, so the bytes are compared before.
    if path.with_suffix(".sha256").read_text() != _digest(path.read_bytes()):
        raise RuntimeError("its checksum does not fit")
    return ctypes.CDLL(str(path))


def library_path(name: str) -> Path:
    """A path that names everything the library depends on: sources, flags, compiler, CPU and jaxlib."""
    sources = [SOURCES / "common.h", SOURCES / f"{name}.cc"]
    parts = [
        *(p.read_text() for p in sources),
        *FLAGS,
        compiler(),
        jaxlib.__version__,
        platform.machine(),
        _cpu_flags(),
    ]
    return cache_dir("native") / f"{name}-{_digest(chr(0).join(parts).encode())[:24]}.so"


def compile_to(name: str, path: Path) -> None:
    """Builds a kernel in a folder beside `path` and renames it there, so that other processes see all of it or nothing.

    Raises RuntimeError when the compiler fails or takes longer than TIMEOUT_S.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        command = [compiler(), *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCES / f"{name}.cc"), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} took longer than {TIMEOUT_S} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise RuntimeError(f"{command[0]} failed: {first}")
        checksum = built.with_suffix(".sha256")
        checksum.write_text(_digest(built.read_bytes()))
        os.replace(built, path)
        os.replace(checksum, path.with_suffix(".sha256"))


def compiler() -> str:
    """`$CXX`, or the first C++ compiler found. Raises RuntimeError when there is none."""
    for candidate in (os.environ.get("CXX", ""), *COMPILERS):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise RuntimeError(f"no C++ compiler found (looked for {', '.join(COMPILERS)}; set CXX to name another)")


@functools.cache
def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = {line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    return "\n".join(sorted(kept))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
