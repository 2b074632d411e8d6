"""CUDA C++ to PTX with NVRTC, which comes with `jax[cuda12]` and `jax[cuda13]`: no compiler and no GPU is needed.

PTX is kept under `~/.cache/jaxllm/cuda` (or `$JAXLLM_CACHE/cuda`), by what it was made from.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxllm.cache import cache_dir, write_whole

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
ARCH = "compute_90a"
"""`a`: with what only Hopper has (wgmma, setmaxnreg), and so for Hopper alone."""
OPTIONS = (f"--gpu-architecture={ARCH}", "-std=c++17", "-default-device")
NEWEST_PTX = (8, 7)
"""The driver turns PTX into machine code, and refuses a version that is newer than itself. Newer compilers write their
own version whatever the code needs, so it is lowered to this one, which drivers since CUDA 12.8 take."""
LIBRARIES = (
    "nvidia/cu13/lib/libnvrtc.so*",
    "nvidia/cuda_nvrtc/lib/libnvrtc.so*",
    "nvidia/cuda_nvrtc/bin/nvrtc64*.dll",
)

_lock = threading.Lock()
_compiled: dict[str, str] = {}
_compiling: dict[str, threading.Lock] = {}


class CompileError(RuntimeError):
    """NVRTC is not there, or refused a source."""


@functools.cache
def _library() -> ctypes.CDLL:
    found = [
        path for root in sys.path for pattern in LIBRARIES for path in sorted(glob.glob(os.path.join(root, pattern)))
    ]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    names = [*found, f"{toolkit}/lib64/libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise CompileError("libnvrtc was not found (pip install nvidia-cuda-nvrtc; jax[cuda12] and jax[cuda13] bring it)")


def version() -> tuple[int, int]:
    """Of NVRTC. Raises CompileError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_ptx(name: str, macros: Mapping[str, object]) -> str:
    """The PTX of `<name>.cu` of this folder with these macros defined; from memory or disk where it was made before.

    Raises CompileError when NVRTC is missing or refuses the source; its message is the first error of the log.
    """
    source = (SOURCES / f"{name}.cu").read_text()
    headers = {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}
    options = [*OPTIONS, *(f"-D{key}={value}" for key, value in sorted(macros.items()))]
    parts = [source, *headers.values(), *options, str(version()), str(NEWEST_PTX)]
    key = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]
    with _lock:
        alone = _compiling.setdefault(key, threading.Lock())
    with alone:  # other sources are compiled meanwhile
        if key not in _compiled:
            path = cache_dir("cuda") / f"{name}-{key}.ptx"
            ptx = _read(path)
            if ptx is None:
                ptx = lower_version(_compile(f"{name}.cu", source, headers, options))
                _write(path, ptx)
            _compiled[key] = ptx
        return _compiled[key]


def lower_version(ptx: str) -> str:
    """The same PTX, its `.version` no newer than NEWEST_PTX."""
    found = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    if found is None or (int(found[1]), int(found[2])) <= NEWEST_PTX:
        return ptx
    return f"{ptx[: found.start()]}.version {NEWEST_PTX[0]}.{NEWEST_PTX[1]}{ptx[found.end() :]}"


def _read(path: Path) -> str | None:
    """A cached file; None where it is missing, or not all of it is there."""
    try:
        digest, _, ptx = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return ptx if digest == _digest(ptx) else None


def _write(path: Path, ptx: str) -> None:
    try:
        write_whole(path, f"{_digest(ptx)}\n{ptx}".encode())
    except OSError as error:
        logger.info("PTX is not kept: %s", error)


def _digest(ptx: str) -> str:
    return "// " + hashlib.sha256(ptx.encode()).hexdigest()


def _compile(name: str, source: str, headers: Mapping[str, str], options: list[str]) -> str:
    nvrtc, program = _library(), ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            lines = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise CompileError(f"NVRTC {version()} refused {name}: {first}")
        return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.value.decode()


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC failed: {_library().nvrtcGetErrorString(status).decode()}")
