"""How a quantised matrix is kept: small values, and scales that make numbers of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import ml_dtypes
import numpy as np

Kind = Literal["fp8", "int8", "int4"]
LIMITS: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
"""The largest value of a kind; those of integers are symmetric."""
SMALLEST_GROUP = 32
"""Scales of fewer inputs take more than they save: a matrix that could only be kept so is kept wide."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number is (value - zero) * scale.

    kind: fp8 (e4m3), int8, or int4, of which a byte has two, the first in its low bits.
    group: neighbouring inputs of a row that share a scale; None: all of a row.
    zeros: whether each group has a zero point; without, it is 0.
    """

    kind: Kind
    group: int | None = None
    zeros: bool = False

    @property
    def dtype(self) -> np.dtype:
        """Of the array that values are in."""
        return np.dtype({"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8, "int4": np.uint8}[self.kind])

    @property
    def per_byte(self) -> int:
        return 2 if self.kind == "int4" else 1

    @property
    def limit(self) -> float:
        return LIMITS[self.kind]

    def groups(self, columns: int) -> int:
        """Scales of a row; the last group may be shorter."""
        return 1 if self.group is None else -(-columns // self.group)


class Storage(Enum):
    """How a checkpoint stores a quantised matrix [F, D].

    SCALED: `weight` in e4m3 or int8 and `weight_scale` (`weight_scale_inv`), which it is multiplied with: one number, a
    column [F, 1], or one for each block of rows and inputs.
    PACKED: `weight_packed` int32 [F, D * bits / 32], the first input in the lowest bits, half of the range added to
    values, and `weight_scale` [F, G] (compressed-tensors).
    AWQ: `qweight` int32 [D, F / 8], `qzeros` [G, F / 8], `scales` [G, F]; the outputs of a word are in their own order.
    GPTQ: `qweight` int32 [D * bits / 32, F], `qzeros` [G, F * bits / 32], `scales` [G, F].
    """

    SCALED = "scaled"
    PACKED = "packed"
    AWQ = "awq"
    GPTQ = "gptq"


@dataclass(frozen=True, slots=True)
class Stored:
    """How the matrices of a checkpoint are stored.

    rows: of a block of SCALED. zero_offset: what zero points of GPTQ are stored without.
    """

    layout: Storage
    format: Format
    rows: int = 1
    zero_offset: int = 0
