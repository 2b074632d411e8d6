"""Placements of experts: even, near to the last one, and reached without losing an expert on the way."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm import placement


def apply(slots: list[int], rounds: list[list[tuple[int, int]]], num_experts: int) -> list[int]:
    now = list(slots)
    for pairs in rounds:
        assert 1 <= len(pairs) <= 2
        for to, expert in [(to, now[source]) for source, to in pairs]:  # at the same time
            now[to] = expert
        assert set(now) == set(range(num_experts)), "an expert is gone"
    return now


@pytest.mark.parametrize(("E", "S", "ranks"), [(8, 8, 4), (8, 12, 4), (64, 80, 16), (6, 18, 3), (5, 5, 1)])
def test_moves_lead_from_one_placement_to_the_other(E: int, S: int, ranks: int) -> None:
    rng = np.random.default_rng(E + S)
    for _ in range(20):
        first, second = (rng.permutation([*range(E), *rng.integers(0, E, S - E)]).tolist() for _ in range(2))
        assert apply(first, placement.moves(first, second), E) == second
    assert placement.moves(first, first) == []


@pytest.mark.parametrize(("E", "S", "ranks", "most"), [(256, 288, 16, 1.1), (256, 256, 16, 1.5), (64, 72, 8, 1.15)])
def test_a_skewed_router_is_evened_out(E: int, S: int, ranks: int, most: float) -> None:
    rng = np.random.default_rng(0)
    load = rng.permutation(1e6 / np.arange(1, E + 1) ** 0.7)
    before = placement.in_turn(E, S)
    after = placement.choose(load, before, ranks)
    assert len(after) == S and set(after) == set(range(E))
    uneven, even = (placement.imbalance(load, slots, ranks) for slots in (before, after))
    assert even < most < uneven
    for row in np.reshape(after, (ranks, -1)):
        assert len(set(row)) == len(row), "two copies of an expert on one rank"


def test_what_is_even_stays_where_it_is() -> None:
    slots = placement.in_turn(16, 16)
    load = np.full(16, 100.0)
    assert placement.imbalance(load, placement.choose(load, slots, 4), 4) == 1.0
    skewed = np.where(np.arange(16) < 4, 400.0, 100.0)
    after = placement.choose(skewed, slots, 4)
    # of each rank at least the experts that it may keep stay in their slots
    assert sum(a == b for a, b in zip(slots, after, strict=True)) >= 4
    assert placement.choose(skewed, after, 4) == after


def test_the_table_of_a_device() -> None:
    found = placement.table([2, 0, 1, 0], 3)
    assert found.dtype == np.int32
    assert found.tolist() == [2, 1, 1, 0, 2, 3, 1, 3, 2, 0]


def test_loads_of_ranks() -> None:
    load = np.array([60.0, 10.0, 20.0])
    assert placement.rank_loads(load, [0, 1, 2, 0], 2).tolist() == [40.0, 50.0]
    assert placement.imbalance(load, [0, 1, 2, 0], 2) == pytest.approx(50 / 45)
    assert placement.imbalance(np.zeros(3), [0, 1, 2, 0], 2) == 1.0
