"""Parallel sizes as the user writes them, and the order of ranks they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CpType(Enum):
    """The kinds of context parallelism, by the names of TensorRT-LLM's `tensorrt_llm.mapping.CpType`."""

    ULYSSES = 0
    STAR = 1
    RING = 2
    HELIX = 3


@dataclass(frozen=True, slots=True)
class Mapping:
    """Sizes of the four mesh axes. Ranks are numbered row-major over `("pp", "cp", "ep", "tp")`, tp fastest."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.ep

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Axis sizes in mesh order."""
        return (self.pp, self.cp, self.ep, self.tp)
