"""The work of prefill attention, cut into tiles for the CUDA kernels (`cuda/prefill.cuh`) and put in order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ROWS = 128
"""Query rows of a tile: tokens of one prompt row times the query heads of one KV head."""

LINE = 8
"""Numbers of a line of the schedule."""

SORTED = 2048
"""Schedules of at most so many tiles are sorted by comparing all pairs: two small fusions, where a sort is a kernel."""

KEYS = 64
"""Work is counted in blocks of so many keys."""

LARGEST = jnp.iinfo(jnp.int32).max


def num_tiles(rows: int, queries: int, group: int) -> int:
    """Tiles of one KV head."""
    return rows * -(-queries * group // ROWS)


def schedule(positions_RQ: jax.Array, first_RQ: jax.Array, *, group: int, width: int, pages: int) -> jax.Array:
    """The tiles of all rows, those with the most visible keys first: int32 [1 + tiles, LINE].

    The first line is the number of tiles, `width`, Q and `pages`. The others are: the tile's row, the first of its
    query rows, the first and last key that any of its query rows sees (last -1: none), and the first and last key that
    all of those see that see any; then zeros.

    Args:
      positions_RQ, first_RQ: the last and first key that each query token sees; it sees none where last < first.
      group: query heads of a KV head: query row i of a row belongs to its token i // group.
      width: pages of a row.
      pages: of the pool.
    """
    R, Q = positions_RQ.shape
    per_row = num_tiles(1, Q, group)
    first_RQ = jnp.maximum(first_RQ, 0)
    sees_RQ = positions_RQ >= first_RQ

    def of_tiles(x_RQ: jax.Array, otherwise: int) -> jax.Array:
        rows = jnp.repeat(jnp.where(sees_RQ, x_RQ, otherwise), group, axis=1)
        rows = jnp.pad(rows, ((0, 0), (0, per_row * ROWS - Q * group)), constant_values=otherwise)
        return rows.reshape(R * per_row, ROWS)

    first = of_tiles(first_RQ, LARGEST).min(1)
    last = of_tiles(positions_RQ, -1).max(1)
    full_from, full_to = of_tiles(first_RQ, -1).max(1), of_tiles(positions_RQ, LARGEST).min(1)
    at = jnp.arange(R * per_row, dtype=jnp.int32)
    zero = jnp.zeros_like(at)
    lines = jnp.stack([at // per_row, at % per_row * ROWS, first, last, full_from, full_to, zero, zero], axis=1)
    work = jnp.where(last < 0, 0, last // KEYS - first // KEYS + 1)
    header = jnp.zeros((1, LINE), jnp.int32).at[0, :4].set(jnp.asarray([R * per_row, width, Q, pages], jnp.int32))
    return jnp.concatenate([header, lines[_longest_first(work)]])


def _longest_first(work: jax.Array) -> jax.Array:
    """Indices of tiles by falling work; those of a prompt rise, so that many are only turned round."""
    at = jnp.arange(work.shape[0], dtype=jnp.int32)
    if len(at) > SORTED:
        return at[::-1]
    ahead = (work[None, :] > work[:, None]) | ((work[None, :] == work[:, None]) & (at[None, :] < at[:, None]))
    rank = ahead.sum(1, dtype=jnp.int32)
    return jnp.where(rank[None, :] == at[:, None], at[None, :], 0).sum(1, dtype=jnp.int32)
