"""How a quantised matrix is kept: small values, and scales that make numbers of them."""

from __future__ import annotations

from dataclasses import dataclass
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
