"""Rows of kernel benchmarks: how a kernel is timed, and how far it is from a reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

BANDWIDTH = 4.56e12
"""Bytes/s that an H200 reads, measured."""
FLOPS = 787e12
"""1/s of dense bfloat16 matrix products, measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """run gives the figures; "wrong" among them is an error beyond the row's tolerance."""

    name: str
    run: Callable[[], dict[str, Any]]


def time_call(program: Callable[..., Any], *arguments: Any, calls: int, seconds: float = 0.05) -> float:
    """Median seconds of one of the `calls` that a compiled program makes, of 7 repetitions of at least `seconds`.

    The calls of a program must depend on one another, or the graph runs them side by side; and together touch more
    than the 50 MB of the second cache, unless that is wanted.
    """
    jax.block_until_ready(program(*arguments))

    def run(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            out = program(*arguments)
        jax.block_until_ready(out)
        return time.perf_counter() - began

    times = max(2, min(200, int(seconds / max(run(3) / 3, 1e-6))))
    return statistics.median(run(times) for _ in range(7)) / times / calls


def rate(seconds: float, *, moved: float = 0, flops: float = 0) -> dict[str, float]:
    """Microseconds, and the share of the faster of the two bounds in percent."""
    floor = max(moved / BANDWIDTH, flops / FLOPS)
    return {"us": seconds * 1e6, "roof_percent": 100 * floor / seconds}


def difference(found: Any, wanted: Any) -> float:
    """Norm of the difference over the norm of what is wanted; NaN if either has one."""
    a, b = (np.asarray(x, np.float32) for x in (found, wanted))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30))


def decode_errors(found: Any, wanted: Any, positions: Any) -> tuple[float, float, bool]:
    """Of the (out, lse) of decode attention: difference, largest error of lse, and whether either is too much.

    Rows without a position are padding: finite, and with an lse that says nothing was seen.
    """
    real = np.asarray(positions) >= 0
    out, lse = (np.asarray(x, np.float32) for x in found)
    error = difference(out[real], np.asarray(wanted[0])[real])
    lse_error = float(np.abs(lse - np.asarray(wanted[1]))[real].max())
    finite = bool(np.isfinite(out).all() and (lse[~real] < -1e29).all())
    return error, lse_error, not (error < 6e-3 and lse_error < 5e-3 and finite)


def all_right(cases: Sequence[Any], errors: Callable[..., tuple[float, float, bool]]) -> dict[str, Any]:
    """The largest errors of all cases, and which of them are wrong."""
    with ThreadPoolExecutor(len(cases)) as pool:  # they compile side by side
        found = list(pool.map(lambda case: errors(*case), cases))
    wrong = [str(case) for case, (_, _, bad) in zip(cases, found, strict=True) if bad]
    return {
        "cases": len(cases),
        "difference": max(error for error, _, _ in found),
        "lse_error": max(error for _, error, _ in found),
        "wrong": "; ".join(wrong),
    }
