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


def ends(times: np.ndarray, names: Sequence[str], apart: int = 0) -> dict[str, list[tuple[float, ...]]]:
    """When phases end, in us after the last block has ended the layer before.

    For each phase that of the first, the median and the last warp, each the median of layers; of the blocks after the
    first `apart`, and then of these. times: uint32 [L, blocks, warps, MARKS], of L layers of one launch.
    Multiprocessors have clocks of their own, which are compared with the GPU's at all ends of layers.
    """
    count = len(names)
    marks = (times - times[0, :, :1, :1]).astype(np.int32).astype(np.int64)  # modulo 2^32
    clock = (times[..., -2:] - times[0, 0, 0, -2]).astype(np.int32).astype(np.int64)
    each = float((clock[-1, ..., 1] - clock[0, ..., 0]).mean() / (marks[-1, ..., count] - marks[0, ..., 0]).mean())
    offset = (clock - each * marks[..., [0, count]]).mean((0, 2, 3))  # of blocks
    at = 1e-3 * (each * marks[..., : count + 1] + offset[None, :, None, None])
    since = at[1:] - at[:-1, apart:, :, count].max((1, 2))[:, None, None, None]
    groups = (since[:, apart:], since[:, :apart]) if apart else (since,)
    return {
        name: [
            tuple(float(np.median(of(group[..., phase], axis=(1, 2)))) for of in (np.min, np.median, np.max))
            for group in groups
        ]
        for phase, name in enumerate(names, 1)
    }
