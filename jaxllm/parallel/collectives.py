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
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["group"],
    meta_fields=["axes", "add_up", "scatter", "gather", "quantises"],
)
@dataclass(frozen=True)
class Exchange:
    """Another way than XLA's to add up small arrays over some axes; it goes into a program as an argument.

    Sums through it must depend on one another, as those of a residual stream do: each rank must come to them in the
    same order, and programs run side by side what they can.

    Attributes:
      group: what tells a rank of its group.
      axes: those that it works over, all with more than one rank.
      add_up: (x, residual or None, group, ranks, norm or None) -> the residual plus the sum, and the norm of it or
        None; raises NotImplementedError for what XLA does better.
      scatter: (x, residual or None, group, ranks) -> this rank's rows of the sum of every rank's x, plus the residual;
        as `add_up`. None: by XLA.
      gather: (x, group, ranks) -> the rows of all ranks; likewise.
      quantises: `add_up` takes an `Unfinished` x with a norm, and `quantised` for that norm in e4m3.
    """

    group: jax.Array
    axes: Axes
    add_up: Callable[..., tuple[jax.Array, Any | None]] = field(repr=False)
    scatter: Callable[..., jax.Array] | None = field(default=None, repr=False)
    gather: Callable[..., jax.Array] | None = field(default=None, repr=False)
    quantises: bool = False


class Unfinished(Protocol):
    """A product that its consumer finishes."""

    def finish(self) -> jax.Array: ...


@partial(jax.tree_util.register_dataclass, data_fields=["part_TD", "residual_TD"], meta_fields=["axes"])
@dataclass(frozen=True)
class Unsummed:
    """The residual plus the sum of every rank's part over `axes`, which `settle` makes."""

    part_TD: jax.Array | Unfinished
    residual_TD: jax.Array
    axes: Axes


Stream = jax.Array | Unsummed
"""A residual stream, the last sum of which may still have to be made."""


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
    """Every rank's rows, one rank's after the other's; few of them by the exchange that is there."""
    exchange = _exchange_over(axes)
    if exchange is not None and exchange.gather is not None and _in_order(axes, exchange):
        try:
            return exchange.gather(x, exchange.group, ranks(axes))
        except NotImplementedError:
            pass
    return lax.all_gather(x, axes, tiled=True) if ranks(axes) > 1 else x


def reduce_scatter_rows(x: jax.Array, axes: Axes, residual: jax.Array | None = None) -> jax.Array:
    """This rank's rows of the sum of every rank's x: what `gather_rows` laid together, taken apart again; plus the
    residual of these rows."""
    exchange = _exchange_over(axes)
    if exchange is not None and exchange.scatter is not None and _in_order(axes, exchange):
        try:
            return exchange.scatter(x, residual, exchange.group, ranks(axes))
        except NotImplementedError:
            pass
    x = lax.psum_scatter(x, axes, tiled=True) if ranks(axes) > 1 else x
    return x if residual is None else residual + x


def sum_partial(x_TD: jax.Array, axes: Axes, tokens: Axes, residual_TD: jax.Array | None = None) -> jax.Array:
    """Adds up partial sums over `axes`, and the residual; small ones by the exchange that is there.

    Where the rows are those of several ranks (`tokens`), each keeps its own.
    """
    rest = tuple(axis for axis in axes if axis not in tokens)
    if ranks(rest) == 1:
        return reduce_scatter_rows(x_TD, tokens, residual_TD)
    x_TD, axes = reduce_scatter_rows(x_TD, tokens), rest
    exchange = _exchange_over(axes)
    if exchange is not None:
        try:
            return exchange.add_up(x_TD, residual_TD, exchange.group, ranks(axes))[0]
        except NotImplementedError:
            pass
    x_TD = all_reduce(x_TD, axes)
    return x_TD if residual_TD is None else residual_TD + x_TD


def sum_later(x_TD: jax.Array | Unfinished, axes: Axes, tokens: Axes, residual_TD: jax.Array) -> Stream:
    """`sum_partial`, but what an exchange adds up is left to `settle`, for the norm that comes next."""
    exchange = _exchange_over(axes)
    if ranks(tokens) > 1 or exchange is None:
        return sum_partial(_finished(x_TD), axes, tokens, residual_TD)
    return Unsummed(x_TD if exchange.quantises else _finished(x_TD), residual_TD, axes)


def _finished(x_TD: jax.Array | Unfinished) -> jax.Array:
    return x_TD if isinstance(x_TD, jax.Array) else x_TD.finish()


def settle(
    x: Stream, norm: tuple[jax.Array, float] | None = None, *, quantised: bool = False
) -> tuple[jax.Array, Any | None]:
    """The residual stream x_TD, summed, and what a norm (weight and epsilon) makes of it where that is to be had.

    quantised: that may be in e4m3, as `add_up` makes it.
    """
    if not isinstance(x, Unsummed):
        return x, None
    exchange = _exchange_over(x.axes)
    if exchange is not None and norm is not None:
        try:
            options = {"quantised": True} if quantised and exchange.quantises else {}
            return exchange.add_up(x.part_TD, x.residual_TD, exchange.group, ranks(x.axes), norm, **options)
        except NotImplementedError:
            pass
    return sum_partial(_finished(x.part_TD), x.axes, (), x.residual_TD), None


def exchange_rows(x_N: jax.Array, axes: Axes) -> jax.Array | None:
    """Every rank's x, float32 [ranks, N], by the exchange that is there; None where there is none.

    It is the sum of what has a rank's own row and zeros: one launch in the step's graph, where a collective of XLA
    would be the only one of a step, and end its graph.
    """
    exchange = _exchange_over(axes)
    if exchange is None:
        return None
    size = x_N.shape[0]
    row_N = jnp.pad(x_N, (0, -size % 4))  # units of 16 bytes
    own_RN = jnp.where((jnp.arange(ranks(axes)) == rank(axes))[:, None], row_N, 0.0)
    try:
        return exchange.add_up(own_RN, None, exchange.group, ranks(axes))[0][:, :size]
    except NotImplementedError:
        return None


def _exchange_over(axes: Axes) -> Exchange | None:
    """What adds up over these axes; None: XLA."""
    exchange = _exchange.get()
    wide = {axis for axis in axes if ranks((axis,)) > 1}
    return exchange if exchange is not None and wide == set(exchange.axes) else None


def _in_order(axes: Axes, exchange: Exchange) -> bool:
    """Whether ranks have the same numbers over these axes as in the group."""
    return tuple(axis for axis in axes if axis in exchange.axes) == exchange.axes


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
