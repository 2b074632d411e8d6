"""Collectives over mesh axes, as the layout resolves them; nothing over one rank, where XLA would keep each as a copy.

Every function takes the mesh axes it works over, `layout.axes("ffn")` for example. Ranks are numbered over them row by
row, the first axis major: the order in which `PartitionSpec` places shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["group"], meta_fields=["axes", "add_up"])
@dataclass(frozen=True)
class Exchange:
    """Another way than XLA's to add up small arrays over some axes; it goes into a program as an argument.

    Sums through it must depend on one another, as those of a residual stream do: each rank must come to them in the
    same order, and programs run side by side what they can.

    Attributes:
      group: what tells a rank of its group.
      axes: those that it works over, all with more than one rank.
      add_up: (x, residual or None, group, ranks) -> the residual plus the sum; raises NotImplementedError for what XLA
        does better.
    """

    group: jax.Array
    axes: Axes
    add_up: Callable[[jax.Array, jax.Array | None, jax.Array, int], jax.Array] = field(repr=False)


_exchange: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def exchanging(exchange: Exchange | None) -> Iterator[None]:
    """`sum_partial` uses this while it is traced; to be entered anew in a function with a trace of its own."""
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


def current_exchange() -> Exchange | None:
    """What `exchanging` was entered with."""
    return _exchange.get()


def ranks(axes: Axes) -> int:
    """Number of ranks; a Python int, known while tracing."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def rank(axes: Axes) -> jax.Array | int:
    """This rank's number."""
    return lax.axis_index(axes) if ranks(axes) > 1 else 0


def all_reduce(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum of every rank's x, on every rank."""
    return lax.psum(x, axes) if ranks(axes) > 1 else x


def all_gather(x: jax.Array, axes: Axes) -> jax.Array:
    """Every rank's x, stacked along a new first axis."""
    return lax.all_gather(x, axes) if ranks(axes) > 1 else x[None]


def gather_rows(x: jax.Array, axes: Axes) -> jax.Array:
    """Every rank's rows, one rank's after the other's."""
    return lax.all_gather(x, axes, tiled=True) if ranks(axes) > 1 else x


def reduce_scatter_rows(x: jax.Array, axes: Axes) -> jax.Array:
    """This rank's rows of the sum of every rank's x: what `gather_rows` laid together, taken apart again."""
    return lax.psum_scatter(x, axes, tiled=True) if ranks(axes) > 1 else x


def sum_partial(x_TD: jax.Array, axes: Axes, tokens: Axes, residual_TD: jax.Array | None = None) -> jax.Array:
    """Adds up partial sums over `axes`, and the residual; small ones by the exchange that is there.

    Where the rows are those of several ranks (`tokens`), each keeps its own.
    """
    x_TD = reduce_scatter_rows(x_TD, tokens)
    axes, exchange = tuple(axis for axis in axes if axis not in tokens), _exchange.get()
    if exchange is not None and {axis for axis in axes if ranks((axis,)) > 1} == set(exchange.axes):
        try:
            return exchange.add_up(x_TD, residual_TD, exchange.group, ranks(axes))
        except NotImplementedError:
            pass
    x_TD = all_reduce(x_TD, axes)
    return x_TD if residual_TD is None else residual_TD + x_TD


def all_to_all(x: jax.Array, axes: Axes) -> jax.Array:
    """x[i] goes to rank i; the result's [j] came from rank j. The first axis is as long as there are ranks."""
    return lax.all_to_all(x, axes, 0, 0) if ranks(axes) > 1 else x


def ragged_all_to_all(
    rows: jax.Array,
    room: int,
    start_C: jax.Array,
    count_C: jax.Array,
    land_C: jax.Array,
    received_C: jax.Array,
    axes: Axes,
) -> jax.Array:
    """rows[start_C[i] :][: count_C[i]] go to rank i, into its result at land_C[i]; [room, ...], zero elsewhere.

    received_C: how many come from each rank. One collective on a GPU; elsewhere everybody's rows go to everybody.
    """
    if ranks(axes) == 1:
        raise ValueError("one rank has nobody to exchange rows with")

    def on_gpu(rows: jax.Array, *lengths: jax.Array) -> jax.Array:
        return lax.ragged_all_to_all(rows, jnp.zeros((room, *rows.shape[1:]), rows.dtype), *lengths, axis_name=axes)

    def elsewhere(
        rows: jax.Array, start_C: jax.Array, count_C: jax.Array, land_C: jax.Array, _: jax.Array
    ) -> jax.Array:
        rows_C = all_gather(rows, axes)
        start, count, land = (all_gather(x, axes)[:, rank(axes)] for x in (start_C, count_C, land_C))
        out = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
        for sender in range(ranks(axes)):
            place = jnp.arange(room) - land[sender]
            found = rows_C[sender].at[start[sender] + place].get(mode="fill", fill_value=0)
            here = (place >= 0) & (place < count[sender])
            out = jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), found, out)
        return out

    return lax.platform_dependent(rows, start_C, count_C, land_C, received_C, cuda=on_gpu, default=elsewhere)


def rotate(x: jax.Array, axis: str) -> jax.Array:
    """The x of the rank before, around a ring."""
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) if size > 1 else x
