"""`jaxllm bench comm`: collectives over the axes of the mesh, by size: time and bandwidth.

A program does one collective many times over, each on what the one before left, so that neither its launch nor the
host is measured. Bandwidth on the bus is what nccl-tests calls busbw: the bytes that each rank has to send, whatever
the algorithm, over the time; it compares with the speed of a link.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm  # type: ignore[import-untyped]

from jaxllm.bench.report import aligned, machine
from jaxllm.config import EngineConfig
from jaxllm.engine.devices import find
from jaxllm.kernels.all_reduce.api import all_reduce as all_reduce_few
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.parallel.collectives import (
    Axes,
    Exchange,
    all_reduce,
    all_to_all,
    exchanging,
    gather_rows,
    rank,
    ranks,
    reduce_scatter_rows,
    rotate,
    settle,
    sum_later,
)
from jaxllm.parallel.mesh import AXES, make_mesh
from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.engine.forward import StepFunctions

ITEM = 2  # bytes of bfloat16
SUMS = 64
"""Sums of a program of `sum_seconds`."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class CommRow:
    """One collective at one size.

    axes: of the mesh, joined by +. size: bytes on each rank, of the larger of what goes in and comes out.
    microseconds: of one. bus: GB/s, see the module.
    """

    collective: str
    axes: str
    ranks: int
    size: int
    microseconds: float
    bus: float


def _own_rows(x: jax.Array, axes: Axes) -> jax.Array:
    """This rank's share of the rows of x."""
    rows = x.shape[0] // ranks(axes)
    return jax.lax.dynamic_slice_in_dim(x, rank(axes) * rows, rows)


def _gather(x: jax.Array, axes: Axes) -> jax.Array:
    return gather_rows(_own_rows(x, axes), axes)


def _scatter(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, reduce_scatter_rows(x, axes), 0, 0)


def _exchange(x: jax.Array, axes: Axes) -> jax.Array:
    return all_to_all(x.reshape(ranks(axes), -1), axes).reshape(x.shape)


def _pass_on(x: jax.Array, axes: Axes) -> jax.Array:
    """To the next rank of the last axis; the ring that pipelines and ring attention use."""
    return rotate(x, axes[-1])


COLLECTIVES: dict[str, tuple[Callable[[jax.Array, Axes], jax.Array], Callable[[int], float]]] = {
    "all_reduce": (all_reduce, lambda n: 2 * (n - 1) / n),
    "all_gather": (_gather, lambda n: (n - 1) / n),
    "reduce_scatter": (_scatter, lambda n: (n - 1) / n),
    "all_to_all": (_exchange, lambda n: (n - 1) / n),
    "ppermute": (_pass_on, lambda n: 1.0),
}
"""By name: one step of the loop, from x to an x of the same shape, and the share of x that crosses the bus."""


def parse_sizes(text: str) -> list[int]:
    """`8K,1M` in bytes. Raises ConfigError."""
    sizes = []
    for part in text.split(","):
        digits, unit = part.strip().upper().rstrip("IB"), ""
        if digits[-1:] in UNITS and digits[-1:]:
            digits, unit = digits[:-1], digits[-1]
        if not digits.isdigit() or int(digits) < 1:
            raise ConfigError(f"--sizes = {text!r} must be bytes, with K, M or G, for example 8K,1M,256M")
        sizes.append(int(digits) * UNITS[unit])
    return sizes


def groups(mesh: Mesh) -> list[Axes]:
    """The axes that collectives run over: each that is larger than one, and what dense weights are split over."""
    single: list[Axes] = [(axis,) for axis in AXES if mesh.shape[axis] > 1]
    both = ("ep", "tp")
    return single + ([both] if all(mesh.shape[axis] > 1 for axis in both) else [])


def run_comm(
    config: EngineConfig, sizes: Sequence[int], collectives: Sequence[str] = tuple(COLLECTIVES), repeat: int = 3
) -> list[CommRow]:
    """Measures every collective over every group of axes of the layout, at every size.

    Raises:
        ConfigError: the layout has one device, or there is no collective of that name.
        ValueError: there are fewer devices than the layout needs.
    """
    for name in collectives:
        if name not in COLLECTIVES:
            raise ConfigError(f"--collectives = {name!r} is not known; use {', '.join(COLLECTIVES)}")
    devices = find()
    mapping = config.resolve_mapping(len(devices), devices[0].platform)
    mesh = make_mesh(mapping)
    if mapping.world_size == 1:
        raise ConfigError("one device has nobody to talk to; give --tp, --ep, --cp or --pp, for example --tp 2")
    rows = []
    # A ring has one axis.
    cases = [
        (axes, name, size)
        for axes in groups(mesh)
        for name in collectives
        for size in sizes
        if name != "ppermute" or len(axes) == 1
    ]
    for axes, name, size in tqdm(cases, "Measuring", unit=" sizes", disable=None):
        count = int(np.prod([mesh.shape[axis] for axis in axes]))
        elements = -(-size // (ITEM * count)) * count
        seconds = _measure(mesh, axes, COLLECTIVES[name][0], elements, repeat)
        bus = elements * ITEM * COLLECTIVES[name][1](count) / seconds / 1e9
        rows.append(CommRow(name, "+".join(axes), count, elements * ITEM, 1e6 * seconds, bus))
    return rows


def _measure(
    mesh: Mesh, axes: Axes, collective: Callable[[jax.Array, Axes], jax.Array], elements: int, repeat: int
) -> float:
    """Seconds of one collective on `elements` of each rank: the median of the repetitions."""
    times = max(4, min(200, 2**26 // (elements * ITEM)))
    everywhere = PartitionSpec(AXES)

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: collective(x, axes), x)

    sharding = jax.sharding.NamedSharding(mesh, everywhere)
    # Zeros: sums of sums stay finite.
    x = jax.jit(lambda: jnp.zeros(mesh.size * elements, jnp.bfloat16), out_shardings=sharding)()
    x = run(x).block_until_ready()
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        x = run(x).block_until_ready()
        found.append((time.perf_counter() - began) / times)
    return statistics.median(found)


def sum_seconds(functions: StepFunctions, tokens: int, repeat: int = 3) -> list[float]:
    """Seconds of one sum over the ranks of a decode step of `tokens` tokens, with the residual and the norm after it,
    by whatever the step itself would use; of each repetition. One rank: nothing, [0.0]."""
    layout, mesh, group, width = functions.layout, functions.mesh, functions.group, functions.cfg.hidden_size
    axes = layout.axes("ffn")
    if layout.size("ffn") == 1:
        return [0.0]
    norm = (jnp.ones(width, jnp.float32), 1e-5)
    # Small ones are over before the host has launched the next program on all GPUs, if that has only a few.
    sums = SUMS * (3 if tokens <= 16 else 1)
    words, specs = ([], []) if group is None else ([group.array], [group.spec])

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec(), check_vma=False)
    def run(x_TD: jax.Array, words: list[jax.Array]) -> jax.Array:
        exchange = None if group is None else Exchange(words[0], group.axes, all_reduce_few)
        part_TD = x_TD
        with exchanging(exchange):
            for _ in range(sums):
                x_TD, normed_TD = settle(sum_later(part_TD, axes, (), x_TD), norm)
                part_TD = rms_norm(x_TD, norm) if normed_TD is None else normed_TD
        return part_TD

    x_TD = jax.device_put(jnp.ones((tokens, width), layout.dtype), jax.sharding.NamedSharding(mesh, PartitionSpec()))
    run(x_TD, words).block_until_ready()
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        for _ in range(8):
            out = run(x_TD, words)
        out.block_until_ready()
        found.append((time.perf_counter() - began) / (8 * sums))
    if group is not None:
        group.raise_if_failed()
    return found


def emit(rows: Sequence[CommRow], json_path: str | None) -> None:
    """Prints the table; writes the JSON to `json_path` too ("-": to stdout, instead of the table)."""
    content: dict[str, Any] = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    if json_path == "-":
        json.dump(content, sys.stdout, indent=2)
        print()
        return
    cells = [["collective", "axes", "ranks", "size", "us", "GB/s on the bus"]]
    for row in rows:
        cells.append(
            [row.collective, row.axes, str(row.ranks), in_words(row.size), f"{row.microseconds:.1f}", f"{row.bus:.2f}"]
        )
    print("\n".join(aligned(cells)), flush=True)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")


def in_words(size: int) -> str:
    """Bytes as 8 KiB, 1 MiB."""
    for unit in ("G", "M", "K"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:g} {unit}iB"
    return f"{size} B"
