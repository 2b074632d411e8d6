"""Parameters that are kept quantised: as the checkpoint has them, or rounded while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.formats import Format
from jaxllm.kernels.linear.quantized import dequantize, quantize, round_groups
from jaxllm.parallel.params import ParamSpec
from jaxllm.weights.source import QuantizedRows, Source, bounds

Ranges = tuple[tuple[int, int], ...]
CHUNK = 1 << 24
"""Numbers that are rounded at a time: what is wide of a matrix on the host."""


def load_quantized(
    specs: Mapping[str, ParamSpec], layouts: Mapping[str, NamedSharding], source: Source
) -> dict[str, jax.Array]:
    """The arrays of one parameter by the names of its parts, each device's part read on its own.

    Where the checkpoint has the matrix in the same format, its values and scales are taken as they are; where not, it
    is rounded, and rows that are split over devices are read whole by each process, for the sake of their largest
    numbers.
    """
    part = specs["values"].part
    assert part is not None
    reader = _Reader(part.whole, part.format, part.origin, source)
    indices = {name: layouts[name].addressable_devices_indices_map(spec.shape) for name, spec in specs.items()}
    arrays: dict[str, list[jax.Array]] = {name: [] for name in specs}
    # Replicas ask for the same again.
    slices: dict[tuple[Ranges, Ranges], dict[str, np.ndarray]] = {}
    for device in indices["values"]:
        ranges = {name: bounds(indices[name][device] or (), spec.shape) for name, spec in specs.items()}
        key = ranges["values"], ranges["scale"]
        if key not in slices:
            slices[key] = reader.read(*key)
        for name in specs:
            arrays[name].append(jax.device_put(slices[key][name], device))
    made = {
        name: jax.make_array_from_single_device_arrays(spec.shape, layouts[name], arrays[name])
        for name, spec in specs.items()
    }
    # waiting here bounds the host copies that are alive
    return jax.block_until_ready(made)


class _Reader:
    """Reads parts of a matrix, or of a stack of them, in `kept`, from a checkpoint that has (or gets) `origin`."""

    def __init__(self, whole: ParamSpec, kept: Format, origin: Format, source: Source) -> None:
        self.matrices = whole.unstack() if whole.stacked else [whole]
        self.stacked = whole.stacked
        self.kept = kept
        self.origin = origin
        self.source = source
        # A matrix whose rows are split is rounded once for all devices.
        self._rounded: dict[tuple[str, int, int], QuantizedRows] = {}

    def read(self, values: Ranges, scale: Ranges) -> dict[str, np.ndarray]:
        """values, scale, zero: the ranges of the arrays of one device."""
        if not self.stacked:
            return self._matrix(self.matrices[0], values, scale)
        found = [self._matrix(one, values[1:], scale[1:]) for one in self.matrices[slice(*values[0])]]
        return {name: np.stack([one[name] for one in found]) for name in found[0]}

    def _matrix(self, spec: ParamSpec, values: Ranges, scale: Ranges) -> dict[str, np.ndarray]:
        rows, (begin, end), kept = values[0], values[1], self.kept
        columns = (begin * kept.per_byte, end * kept.per_byte)
        shape = (rows[1] - rows[0], scale[1][1] - scale[1][0])
        # Padding is 0 times 1.
        q = np.zeros((shape[0], columns[1] - columns[0]), np.int8 if kept.kind == "int4" else kept.dtype)
        out_scale, out_zero = np.ones(shape, np.float32), np.zeros(shape, np.int8)
        start, stop = (rows, columns)[spec.axis]
        at = 0
        for segment in spec.segments:
            first, last = max(start, at), min(stop, at + segment.size)
            if first < last and segment.name is not None:
                here = slice(first - start, last - start)
                if spec.axis == 0:
                    taken = slice(segment.start + first - at, segment.start + last - at)
                    found = self._rows(segment.name, taken, slice(*columns))
                    groups = self._groups(scale[1])
                    q[here] = found.values
                    out_scale[here] = found.scale[:, groups]
                    if found.zero is not None:
                        out_zero[here] = found.zero[:, groups]
                else:
                    offset = segment.start - at
                    found = self._rows(segment.name, slice(*rows), slice(offset + first, offset + last))
                    q[:, here] = found.values
                    places, groups = self._overlap(first, last, offset, scale[1], found.scale.shape[1])
                    out_scale[:, places] = found.scale[:, groups]
                    if found.zero is not None:
                        out_zero[:, places] = found.zero[:, groups]
            at += segment.size
        if kept.kind == "int4":
            q = (q[:, 0::2] & 15 | q[:, 1::2] << 4).view(np.uint8)
        return {"values": q, "scale": out_scale} | ({"zero": out_zero} if kept.zeros else {})

    def _groups(self, wanted: tuple[int, int]) -> np.ndarray:
        """Which of the checkpoint's groups each of the groups [wanted) of a part that is not cut by columns is of."""
        if self.kept.group is None or self.origin.group is None:
            return np.zeros(wanted[1] - wanted[0], int)
        return np.arange(*wanted) * self.kept.group // self.origin.group

    def _overlap(
        self, first: int, last: int, offset: int, wanted: tuple[int, int], groups: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The places in the part of the scales of columns [first, last), and which of the checkpoint's go there."""
        if self.kept.group is None or self.origin.group is None:
            return np.zeros(1, int), np.zeros(1, int)
        numbers = np.arange(first // self.kept.group, -(-last // self.kept.group))
        return numbers - wanted[0], np.minimum((numbers * self.kept.group + offset) // self.origin.group, groups - 1)

    def _rows(self, name: str, rows: slice, columns: slice) -> QuantizedRows:
        if self.source.quantization(name) == self.origin:
            return self.source.read_quantized(name, rows, columns)
        key = (name, rows.start, rows.stop)
        if key not in self._rounded:
            self._rounded[key] = round_rows(self.source, name, rows, self.origin)
        found = self._rounded[key]
        return QuantizedRows(found.values[:, columns], found.scale, found.zero)


def round_rows(source: Source, name: str, rows: slice, format: Format) -> QuantizedRows:
    """Rows of a tensor rounded to a format without zero points, a chunk after the other."""
    D = source.tensors[name].shape[-1]
    step = max(1, CHUNK // max(D, 1))
    chunks = [
        _round(source.read(name, (slice(start, min(start + step, rows.stop)), slice(None))), format)
        for start in range(rows.start, rows.stop, step)
    ]
    values, scales = zip(*chunks, strict=True)
    return QuantizedRows(np.concatenate(values), np.concatenate(scales))


def _round(wide: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    with jax.default_device(_cpu()):
        values, scale = _round_groups(wide, format)
    return np.asarray(values), np.asarray(scale)


_round_groups = partial(jax.jit, static_argnums=1)(round_groups)


def _cpu() -> jax.Device:
    """Where numbers are rounded: on the host, unless JAX was told to do without it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def rounded(wide: np.ndarray, format: Format) -> np.ndarray:
    """A matrix as it is after it was rounded to a format, float32."""
    with jax.default_device(_cpu()):
        return np.asarray(_round_trip(wide, format))


@partial(jax.jit, static_argnums=1)
def _round_trip(wide: jax.Array, format: Format) -> jax.Array:
    return dequantize(quantize(wide, format), np.float32)
