"""Memory that several GPUs of this process can write to, from the CUDA driver: XLA's allocator has no say in it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ALREADY_ENABLED = 704
PORTABLE_MAPPED = 3  # host memory that all contexts, and their kernels, can use


class DriverError(RuntimeError):
    """The CUDA driver is not there, or refused."""


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise DriverError(f"the CUDA driver was not found: {error}") from None
    return library


def _do(name: str, *arguments: Any, accept: Sequence[int] = ()) -> None:
    status = getattr(_library(), name)(*arguments)
    if status and status not in accept:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name} failed: {(text.value or b'').decode() or status}")


def _device(ordinal: int) -> ctypes.c_int:
    device = ctypes.c_int()
    _do("cuInit", 0)
    _do("cuDeviceGet", ctypes.byref(device), ordinal)
    return device


class PeerMemory:
    """`size` bytes on each of some GPUs, which all of them can write to, and one word of host memory.

    They begin as zeros, those from `ones_from` on as ones.

    Raises DriverError where one of the GPUs cannot reach another's memory.
    """

    def __init__(self, ordinals: Sequence[int], size: int, ones_from: int | None = None):
        self.ordinals = list(ordinals)
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._addresses: dict[int, int] = {}
        self._word = ctypes.c_void_p()
        devices = {ordinal: _device(ordinal) for ordinal in self.ordinals}
        for a in self.ordinals:
            for b in self.ordinals:
                can = ctypes.c_int(1)
                if a != b:
                    _do("cuDeviceCanAccessPeer", ctypes.byref(can), devices[a], devices[b])
                if not can.value:
                    raise DriverError(f"GPU {a} cannot reach the memory of GPU {b}")
        self._devices = devices
        try:
            for ordinal, device in devices.items():
                context = ctypes.c_void_p()
                _do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
                self._contexts[ordinal] = context
            for ordinal in self.ordinals:
                with self._current(ordinal):
                    for other in self.ordinals:
                        if other != ordinal:
                            peer = self._contexts[other]
                            _do("cuCtxEnablePeerAccess", peer, ctypes.c_uint(0), accept=(ALREADY_ENABLED,))
                    address = ctypes.c_uint64()
                    _do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
                    self._addresses[ordinal] = address.value
                    _do("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
                    if ones_from is not None:
                        rest = ctypes.c_uint64(address.value + ones_from), ctypes.c_ubyte(0xFF)
                        _do("cuMemsetD8_v2", *rest, ctypes.c_size_t(size - ones_from))
                    _do("cuCtxSynchronize")
            with self._current(self.ordinals[0]):
                _do("cuMemHostAlloc", ctypes.byref(self._word), ctypes.c_size_t(64), ctypes.c_uint(PORTABLE_MAPPED))
                ctypes.memset(self._word, 0, 64)
        except DriverError:
            self.close()
            raise

    @contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        _do("cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            yield
        finally:
            _do("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def address(self, ordinal: int) -> int:
        """Of the memory of a GPU."""
        return self._addresses[ordinal]

    @property
    def word_address(self) -> int:
        """Of the word in host memory, for the host and for every GPU."""
        return self._word.value or 0

    @property
    def word(self) -> int:
        """What the word holds: 0 at first."""
        return ctypes.c_uint32.from_address(self.word_address).value if self.word_address else 0

    def close(self) -> None:
        """Frees the memory, once the GPUs have done what they were given to do."""
        free: list[tuple[int, Callable[[], None]]] = []
        for ordinal, address in self._addresses.items():
            free.append((ordinal, functools.partial(_do, "cuMemFree_v2", ctypes.c_uint64(address))))
        if self._word:
            free.append((self.ordinals[0], functools.partial(_do, "cuMemFreeHost", self._word)))
        for ordinal in self._contexts:
            with self._current(ordinal):
                _do("cuCtxSynchronize")
        for ordinal, call in free:
            with self._current(ordinal):
                call()
        for ordinal in self._contexts:
            _do("cuDevicePrimaryCtxRelease_v2", self._devices[ordinal])
        self._addresses, self._word, self._contexts = {}, ctypes.c_void_p(), {}
