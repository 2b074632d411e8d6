"""Where the time of a kernel whose blocks go through phases together goes, by the marks of `timeline.cuh`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MARKS = 20
"""Of a warp: the clock before the first phase and after each, then the GPU's time at both ends."""


def phases(times: np.ndarray, names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Of each phase the shortest, the median and the longest time of a warp; how late blocks begin; all of a layer.

    times: uint32 [L, blocks, warps, MARKS], of L layers or launches. In us, by the clocks of multiprocessors, which are
    compared with the GPU's for that.
    """
    marks = times.reshape(len(times), -1, MARKS)
    cycles = (marks[:, :, 1 : len(names) + 1] - marks[:, :, : len(names)]).astype(np.float64)
    nanoseconds = (marks[:, :, -1] - marks[:, :, -2]).astype(np.float64)
    each = 1e-3 * nanoseconds.mean() / cycles.sum(2).mean()
    found = {
        name: (float(us.min()), float(np.median(us)), float(us.max()))
        for name, us in zip(names, np.moveaxis(each * cycles, 2, 0), strict=True)
    }
    first = marks[:, :, -2].min(1)
    late = 1e-3 * (marks[:, :, -2] - first[:, None])
    whole = 1e-3 * (marks[:, :, -1] - first[:, None]).max(1)
    found["begins late"] = (float(late.min()), float(np.median(late)), float(late.max()))
    found["all"] = (float(whole.min()), float(np.median(whole)), float(whole.max()))
    return found
