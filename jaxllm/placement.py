"""Which expert is in which slot: placements of experts on ranks that even out their load, and the moves between them.

A layer's experts are kept in slots, an equal number on each rank of expert parallelism; where there are more slots than
experts, loaded ones are in several. The tokens of an expert take its slots in turn. The way to choose follows EPLB (the
load balancer of DeepSeek-V3, arXiv 2412.19437, section 3.4): copies for those with the most tokens a copy, then the
heaviest copies first, each to the rank that has the least. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Slots = tuple[int, ...]
"""The expert of each slot of a layer; those of the first rank come first."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The slots of all layers. layers: those whose placement is given, by number; the others begin `in_turn`.

    online: placements change with the load, which is counted.
    """

    num_slots: int
    layers: tuple[tuple[int, Slots], ...] = ()
    online: bool = False

    def of(self, layer: int, num_experts: int) -> Slots:
        """The expert of each slot of a layer."""
        given = next((slots for number, slots in self.layers if number == layer), None)
        return in_turn(num_experts, self.num_slots) if given is None else given


def in_turn(num_experts: int, num_slots: int) -> Slots:
    """Experts in order, and the first ones once more in the slots that are left."""
    return tuple(slot % num_experts for slot in range(num_slots))


def table(slots: Sequence[int], num_experts: int) -> np.ndarray:
    """What a device needs to find an expert's slots: int32 [2 * E + S].

    First how many each expert has, then where they begin in the list of slots sorted by expert, which is the rest.
    """
    count = np.bincount(slots, minlength=num_experts)
    order = np.argsort(slots, kind="stable")
    return np.concatenate([count, np.cumsum(count) - count, order]).astype(np.int32)


def rank_loads(load: np.ndarray, slots: Sequence[int], ranks: int) -> np.ndarray:
    """Tokens of each rank, if `load` tokens of each expert take its slots in turn."""
    count = np.bincount(slots, minlength=len(load))
    each = (load / np.maximum(count, 1))[list(slots)]
    return each.reshape(ranks, -1).sum(axis=1)


def imbalance(load: np.ndarray, slots: Sequence[int], ranks: int) -> float:
    """Tokens of the busiest rank, relative to the mean of all; 1 is even."""
    loads = rank_loads(load, slots, ranks)
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0


def choose(load: np.ndarray, slots: Sequence[int], ranks: int) -> Slots:
    """Another placement, of the same number of slots, that evens out `load`; near to `slots`, so that little moves."""
    E, S = len(load), len(slots)
    load = np.maximum(np.asarray(load, float), 1e-9)
    copies = np.ones(E, int)
    for _ in range(S - E):
        # An expert twice on one rank would gain nothing.
        each = np.where(copies < ranks, load / copies, -1.0)
        copies[int(each.argmax())] += 1
    each = load / copies
    queue = np.repeat(np.arange(E), copies)
    queue = queue[np.argsort(-each[queue], kind="stable")]
    room, total = np.full(ranks, S // ranks), np.zeros(ranks)
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in queue:
        free = [rank for rank in range(ranks) if room[rank]]
        apart = [rank for rank in free if expert not in held[rank]] or free
        rank = min(apart, key=lambda rank: total[rank])
        held[rank].append(int(expert))
        room[rank] -= 1
        total[rank] += each[expert]
    return _near(held, slots, ranks)


def _near(held: list[list[int]], slots: Sequence[int], ranks: int) -> Slots:
    """The experts of each group on the rank that has most of them already, each in its old slot if it has one there."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    old = np.asarray(slots).reshape(ranks, -1)
    E = max(slots) + 1
    before = np.stack([np.bincount(row, minlength=E) for row in old])
    after = np.stack([np.bincount(row, minlength=E) for row in held])
    same = np.minimum(before[:, None], after[None]).sum(axis=2)
    out: list[int] = []
    for rank, group in zip(*linear_sum_assignment(-same), strict=True):
        left, row = list(held[group]), [-1] * old.shape[1]
        for place, expert in enumerate(old[rank].tolist()):
            if expert in left:
                row[place] = expert
                left.remove(expert)
        out += [left.pop(0) if expert < 0 else expert for expert in row]
    return tuple(out)


def moves(slots: Sequence[int], wanted: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The way from one placement to another: rounds of at most two copies (from slot, to slot), made at the same time.

    A round puts one slot right. No expert is ever without a slot.
    """
    now, rounds = list(slots), []
    for to in range(len(now)):
        while now[to] != wanted[to]:
            # The expert that has to leave goes where it is wanted, if it is nowhere else.
            leaving = now[to]
            source = now.index(wanted[to])
            if now.count(leaving) > 1 or leaving not in wanted:
                rounds.append([(source, to)])
                now[to] = wanted[to]
                continue
            other = next(slot for slot, expert in enumerate(wanted) if expert == leaving and now[slot] != leaving)
            rounds.append([(to, other), (other, to)])
            now[to], now[other] = now[other], now[to]
    return rounds
