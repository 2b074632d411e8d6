"""The schedule of prefill attention: what each tile sees, and the order of the tiles."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxllm.kernels.paged_attention import tiles


@pytest.mark.parametrize("shape", [(4, 128, 4), (3, 45, 3), (5, 7, 16), (2, 300, 1), (6, 50, 7)])
def test_schedule_tells_what_each_tile_sees(shape: tuple[int, int, int]) -> None:
    R, Q, group = shape
    rng = np.random.default_rng(0)
    last = rng.integers(-1, 500, (R, Q)).astype(np.int32)
    first = (last - rng.integers(-3, 200, (R, Q))).astype(np.int32)
    last[0], first[0] = np.arange(Q), 0
    last[1] = -1
    lines = np.asarray(jax.jit(lambda *a: tiles.schedule(*a, group=group, width=9, pages=77))(last, first))
    per_row = -(-Q * group // tiles.ROWS)
    assert lines[0, :4].tolist() == [R * per_row, 9, Q, 77]
    assert len(lines) == 1 + R * per_row == 1 + tiles.num_tiles(R, Q, group)
    wanted, work = {}, {}
    for r in range(R):
        for t in range(per_row):
            tokens = np.unique(np.arange(t * tiles.ROWS, min((t + 1) * tiles.ROWS, Q * group)) // group)
            lo, hi = np.maximum(first[r, tokens], 0), last[r, tokens]
            lo, hi = lo[hi >= lo], hi[hi >= lo]
            key = (r, t * tiles.ROWS)
            wanted[key] = (lo.min(), hi.max(), lo.max(), hi.min()) if len(lo) else None
            work[key] = hi.max() // tiles.KEYS - lo.min() // tiles.KEYS + 1 if len(lo) else 0
    found = {(line[0], line[1]): line[2:6] for line in lines[1:].tolist()}
    assert found.keys() == wanted.keys()
    for key, sees in wanted.items():
        assert tuple(found[key]) == sees if sees else found[key][1] == -1
    order = [work[line[0], line[1]] for line in lines[1:].tolist()]
    assert order == sorted(order, reverse=True) and min(order) == 0


def test_many_tiles_are_turned_round() -> None:
    rows = tiles.SORTED + 5
    last = np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], (rows, 2))
    lines = np.asarray(tiles.schedule(last, np.zeros_like(last), group=1, width=1, pages=1))
    assert lines[1:, 0].tolist() == list(range(rows))[::-1]
