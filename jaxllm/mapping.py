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
class StarConfig:
    """Star attention: tokens of a context block, and those of the anchor that every block sees (at most a block)."""

    block_size: int
    anchor_size: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """The parallel layout. Ranks are numbered row-major over `("pp", "cp", "ep", "tp")`, tp fastest.

    cp_type: how the context is parallel; None when cp is 1 (STAR also on one rank: it is another attention).
    attention_dp: requests, not heads, are split over the ep * tp ranks of a stage.
    pp_partition: layers of each stage; None for as even as possible.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    cp_type: CpType | None = None
    star: StarConfig | None = None
    attention_dp: bool = False
    pp_partition: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.ep

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Axis sizes in mesh order."""
        return (self.pp, self.cp, self.ep, self.tp)
