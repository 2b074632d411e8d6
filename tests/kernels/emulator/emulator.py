"""Builds CUDA kernels for the CPU with g++ and the header of this folder, and runs them on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxllm.cache import cache_dir
from jaxllm.kernels.cuda import rtc

HERE = Path(__file__).parent
FLAGS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-DJAXLLM_EMULATE")
POISON = 0xFF
"""What results begin as: NaNs of every float format, and a large negative integer."""


class EmulatorError(AssertionError):
    """What a kernel must not do."""


class Kernels:
    """The kernels of `<source>.cu` with some macros defined.

    own: with an emulator of its own, which can run while others do.
    """

    def __init__(self, source: Path, macros: Mapping[str, object], *, own: bool = False):
        built = _build(source, tuple(sorted((k, str(v)) for k, v in macros.items())))
        if own:
            with tempfile.TemporaryDirectory() as folder:
                self.library = ctypes.CDLL(shutil.copy(built, Path(folder) / built.name))
        else:
            self.library = ctypes.CDLL(str(built))
        self.library.emulator_allocate.restype = ctypes.c_void_p
        self.library.emulator_allocate.argtypes = [ctypes.c_uint64]
        self.library.emulator_free.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.library.emulator_run.restype = ctypes.c_char_p

    def run(
        self,
        name: str,
        arguments: Sequence[np.ndarray],
        results: Sequence[tuple[tuple[int, ...], np.dtype]],
        *,
        grid: Sequence[int],
        threads: int,
        shared: int = 0,
        aliases: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """As `call.launch`; results are (shape, dtype). Odd seeds land asynchronous copies at once, even ones late.

        Raises EmulatorError for what the emulator finds (see cuda_on_cpu.h), and for arguments that were written to.
        """
        lib = self.library
        held = [_Memory(lib, np.ascontiguousarray(a)) for a in arguments]
        out = []
        for index, (shape, dtype) in enumerate(results):
            source = next((a for a, r in (aliases or {}).items() if r == index), None)
            empty = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, POISON, np.uint8)
            out.append(held[source] if source is not None else _Memory(lib, empty))
        memory = [*held, *out]
        pointers = (ctypes.c_void_p * len(memory))(*(m.address for m in memory))
        sizes = (ctypes.c_uint64 * len(memory))(*(m.size for m in memory))
        blocks = (ctypes.c_uint32 * 3)(*(*grid, 1, 1)[:3])
        call = getattr(lib, f"emulated_{name}")
        error = lib.emulator_run(call, len(memory), pointers, sizes, blocks, threads, shared, seed)
        if error:
            raise EmulatorError(error.decode())
        for index, (memory_of, before) in enumerate(zip(held, arguments, strict=True)):
            if index not in (aliases or {}) and memory_of.read() != np.ascontiguousarray(before).tobytes():
                raise EmulatorError(f"{name} wrote to argument {index}")
        return [
            np.frombuffer(m.read(), dtype).reshape(shape).copy() for m, (shape, dtype) in zip(out, results, strict=True)
        ]


class _Memory:
    """A copy of an array's bytes against a page that cannot be touched."""

    def __init__(self, library: ctypes.CDLL, array: np.ndarray):
        self.library, self.size = library, array.nbytes
        self.address = library.emulator_allocate(self.size)
        ctypes.memmove(self.address, array.ctypes.data, self.size)

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def __del__(self) -> None:
        self.library.emulator_free(self.address, self.size)


@functools.cache
def _build(source: Path, macros: tuple[tuple[str, str], ...]) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no g++")
    files = [source, *sorted(rtc.SOURCES.glob("*.cuh")), *sorted(HERE.glob("*.h")), HERE / "emulate.cc"]
    parts = [*(path.read_text() for path in files), *FLAGS, *map(str, macros)]
    key = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]
    path = cache_dir("emulated") / f"{source.stem}-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wrapped = Path(folder) / "kernel.cc"
        wrapped.write_text(f'#include "{source}"\n' + "\n".join(_entries(source.read_text(), macros)))
        built = Path(folder) / path.name
        includes = [f"-I{HERE}", f"-I{rtc.SOURCES}"]
        defines = [f"-D{name}={value}" for name, value in macros] + [f'-DKERNEL="{wrapped}"']
        command = [compiler, *FLAGS, *includes, *defines, str(HERE / "emulate.cc"), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[:4000]
        os.replace(built, path)
    return path


def _entries(source: str, macros: tuple[tuple[str, str], ...]) -> list[str]:
    """For each kernel a function that takes its pointers as an array. Lists of parameters may be macros."""
    out = []
    for name, value in macros:
        source = source.replace(name, value) if name.endswith("_PARAMETERS") else source
    for found in re.finditer(r'extern "C" __global__ void\s+(?:[A-Z_a-z]+\([^)]*\)+\s+)*(\w+)\(([^)]*)\)', source):
        count = found[2].count(",") + 1
        cast = ", ".join(f"(void*)p[{i}]" for i in range(count))
        types = ", ".join(["void*"] * count)
        out.append(
            f'extern "C" void emulated_{found[1]}(void** p) {{ ((void (*)({types}))(void*){found[1]})({cast}); }}'
        )
    return out
