"""From a checkpoint to sharded arrays: each device's part of each parameter is read on its own, straight into place."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxllm.kernels.linear.blocks import Packing
from jaxllm.parallel.mesh import sharding
from jaxllm.parallel.params import ParamSpec
from jaxllm.weights.packed import choose_packings, read_packed, unpacked_ranges
from jaxllm.weights.quantized import load_quantized, rounded
from jaxllm.weights.source import CheckpointError, Source, bounds, unreadable

IGNORED = (
    r"(^|\.)rotary_emb\.inv_freq$",  # older exports store the rope table
    r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\.",  # the text model of a multimodal checkpoint
)


def load_params(
    specs: Mapping[str, ParamSpec],
    shapes: Mapping[str, tuple[int, ...]],
    source: Source,
    mesh: Mesh,
    *,
    keep_quantized: bool = False,
    ignore: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Reads every parameter of a model onto its devices.

    Host memory beyond what the devices hold stays within a few times the largest parameter, whatever the model's size:
    parameters in flight together are no larger than the largest one, and each device gets only its own slices.

    Args:
        specs: the parameters by path.
        shapes: the shape that each checkpoint tensor must have, by its name.
        source: the checkpoint; must stay open until this returns.
        keep_quantized: matrices whose blocks the CPU kernels understand stay as they are in the checkpoint.
        ignore: regular expressions (searched) of tensor names that may be in the checkpoint without being needed.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: tensors are missing, extra, misshaped, cut off or of a dtype without support; lists them all.
    """
    check(specs, shapes, source, ignore)
    layouts = {path: sharding(mesh, spec.axes) for path, spec in specs.items()}
    packings = choose_packings(specs, layouts, source) if keep_quantized else {}
    groups: dict[str, dict[str, str]] = {}  # the paths of a parameter's parts by their names; "" for one that has none
    for path, spec in specs.items():
        key = path if spec.part is None else path.removesuffix(f".{spec.part.name}")
        groups.setdefault(key, {})["" if spec.part is None else spec.part.name] = path

    def load_group(paths: Mapping[str, str]) -> dict[str, jax.Array]:
        if "" in paths:
            path = paths[""]
            return {path: _load_one(specs[path], packings.get(path), layouts[path], source)}
        parts = {name: specs[path] for name, path in paths.items()}
        found = load_quantized(parts, {name: layouts[path] for name, path in paths.items()}, source)
        return {path: found[name] for name, path in paths.items()}

    costs = {
        key: sum(_host_bytes(specs[path], packings.get(path), layouts[path]) for path in paths.values())
        for key, paths in groups.items()
    }
    budget = max(costs.values(), default=0)
    workers = min(4, os.cpu_count() or 1)
    params: dict[str, jax.Array] = {}
    pending: deque[tuple[str, Future[dict[str, jax.Array]]]] = deque()
    in_flight = 0
    with _bar(sum(costs.values()), progress) as bar, ThreadPoolExecutor(workers, "load") as pool:

        def finish_oldest() -> int:
            key, future = pending.popleft()
            params.update(future.result())
            bar.update(costs[key])
            return costs[key]

        try:
            for key, paths in groups.items():
                while pending and (in_flight + costs[key] > budget or len(pending) > workers):
                    in_flight -= finish_oldest()
                pending.append((key, pool.submit(load_group, paths)))
                in_flight += costs[key]
            while pending:
                finish_oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return params


def check(
    specs: Mapping[str, ParamSpec], shapes: Mapping[str, tuple[int, ...]], source: Source, ignore: Sequence[str] = ()
) -> None:
    """Compares the checkpoint with what the model needs, without reading data; see `load_params`."""
    found = source.tensors
    needed = dict.fromkeys([*shapes, *(name for spec in specs.values() for name in spec.names())])
    ignored = re.compile("|".join(f"(?:{p})" for p in (*IGNORED, *ignore)))
    problems = [f"{name}: missing (the model needs it)" for name in needed if name not in found]
    problems += [f"{name}: unknown to this model" for name in found if name not in needed and not ignored.search(name)]
    problems += [
        f"{name}: shape {list(found[name].shape)}, but the model needs {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != tuple(shape) and (found[name].shape or not found[name].problem)
    ]
    problems += [
        f"{name}: values in {found[name].dtype} without scales: config.json does not say how they are quantised"
        for name in needed
        if name in found and (found[name].dtype.kind in "iu" or found[name].dtype.itemsize == 1)
    ]
    problems += unreadable(found, needed)
    if problems:
        raise CheckpointError(f"{source.name} does not fit the model", problems)


def _stored_as(spec: ParamSpec, packing: Packing | None) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array that holds a parameter."""
    if packing is None:
        return spec.shape, np.dtype(spec.dtype)
    rows, columns = spec.shape
    return packing.shape(rows, columns), np.dtype(np.uint8)


def _host_bytes(spec: ParamSpec, packing: Packing | None, layout: NamedSharding) -> int:
    """Bytes that this process reads for the parameter: its distinct slices, each once."""
    shape, dtype = _stored_as(spec, packing)
    indices = layout.addressable_devices_indices_map(shape).values()
    shards = {bounds(i or (), shape) for i in indices}
    return sum(int(np.prod([b - a for a, b in shard])) * dtype.itemsize for shard in shards)


def _load_one(spec: ParamSpec, packing: Packing | None, layout: NamedSharding, source: Source) -> jax.Array:
    shape, _ = _stored_as(spec, packing)
    slices: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        # replicas ask for the same slice again
        key = bounds(index or (), shape)
        if key not in slices:
            if packing is None:
                slices[key] = read_slice(spec, key, source)
            else:
                slices[key] = read_packed(spec, packing, unpacked_ranges(key), source)
        return slices[key]

    array = jax.make_array_from_callback(shape, layout, read)
    # waiting here bounds the host copies that are alive
    return array.block_until_ready()


def read_slice(spec: ParamSpec, ranges: Sequence[tuple[int, int]], source: Source) -> np.ndarray:
    """The part `ranges` ((start, stop) per dimension) of a parameter, in its dtype."""
    if spec.stacked:
        out = np.empty([b - a for a, b in ranges], spec.dtype)
        for number, matrix in enumerate(spec.unstack()[slice(*ranges[0])]):
            out[number] = read_slice(matrix, ranges[1:], source)
        return out
    start, stop = ranges[spec.axis]
    before = [slice(a, b) for a, b in ranges[: spec.axis]]
    after = [slice(a, b) for a, b in ranges[spec.axis + 1 :]]
    out = np.empty([b - a for a, b in ranges], spec.dtype)
    at = 0
    for segment in spec.segments:
        low, high = max(start, at), min(stop, at + segment.size)
        if low < high:
            target = out[(*[slice(None)] * spec.axis, slice(low - start, high - start))]
            if segment.name is None:
                target[...] = 0
            else:
                rows = slice(segment.start + low - at, segment.start + high - at)
                index = (*before, rows, *after)
                if spec.rounded is None or source.quantization(segment.name) == spec.rounded:
                    values = source.read(segment.name, index)
                else:
                    # The largest number of a whole row decides.
                    row = source.read(segment.name, (index[0], slice(None)))
                    values = rounded(row, spec.rounded)[:, index[1]]
                if spec.offset:
                    values = values.astype(np.float32) + np.float32(spec.offset)
                if target.shape == out.shape and values.dtype == out.dtype:
                    return values
                target[...] = values
        at += segment.size
    return out


def _bar(total: int, progress: bool):  # type: ignore[no-untyped-def]  # tqdm has no types
    from tqdm import tqdm

    # disable=None shows the bar on a terminal only
    return tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=None if progress else True)
