"""What `jaxllm.kernels.cuda.call` compiles and launches goes to the emulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from tests.kernels.emulator.emulator import Kernels


class Launches:
    """Takes the place of NVRTC and of a GPU until the test ends.

    seed: of the emulator; may be set anew. grid: of all launches, in place of their own. ran: names of the kernels.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0, grid: Sequence[int] | None = None) -> None:
        self.seed = seed
        self.grid = grid
        self.ran: list[str] = []
        monkeypatch.setattr(call, "compile_or_refuse", self._compile)
        monkeypatch.setattr(call, "launch", self._launch)

    def _compile(self, kernel: str, source: str, macros: Mapping[str, object]) -> Kernels:
        return Kernels(rtc.SOURCES / f"{source}.cu", macros)

    def _launch(
        self,
        name: str,
        kernels: Kernels,
        operands: Sequence[Any],
        results: Sequence[Any],
        *,
        grid: Sequence[int],
        threads: int,
        shared: int = 0,
        aliases: Mapping[int, int] | None = None,
    ) -> list[np.ndarray]:
        self.ran.append(name)
        arrays = [np.asarray(operand) for operand in operands]
        shapes = [(result.shape, np.dtype(result.dtype)) for result in results]
        how: dict[str, Any] = {"threads": threads, "shared": shared, "aliases": aliases, "seed": self.seed}
        return kernels.run(name, arrays, shapes, grid=self.grid or grid, **how)
