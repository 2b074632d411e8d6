"""How attention heads, FFN columns and vocabulary rows are laid out over tensor-parallel ranks when they do not divide.

A KV head with its group of G query heads is cut into `parts` units, each with one copy of the KV head and
ceil(G / parts) query heads. Every rank gets the same number of units; what is missing is padded with zero weights,
whose output the zero columns of the output projection remove. SmolLM2 (9 query heads, 3 KV heads):

    tp 1:  3 units a rank, 3 query heads each                 nothing padded
    tp 2:  2 units a rank, 3 query heads each                 1 KV head of zeros on the second rank
    tp 8:  1 unit a rank, 2 query heads each                  KV heads replicated twice, 2 ranks of zeros
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.parallel.params import Segment


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Heads on each of `ranks` shards: `kv_heads` KV heads with `group` query heads each, padded and replicated."""

    ranks: int
    num_heads: int
    num_kv_heads: int
    parts: int
    kv_heads: int
    group: int

    @classmethod
    def plan(cls, num_heads: int, num_kv_heads: int, ranks: int) -> HeadLayout:
        """The layout with the fewest KV heads a rank (KV memory), then the fewest query heads a rank (work).

        Raises ValueError when there are more ranks than query heads.
        """
        if ranks > num_heads:
            raise ValueError(
                f"{ranks} tensor-parallel ranks are more than the model's {num_heads} attention heads: "
                f"use at most tensor_parallel_size={num_heads}"
            )
        group = num_heads // num_kv_heads
        per_rank = {p: (ceil_div(num_kv_heads * p, ranks), ceil_div(group, p)) for p in range(1, group + 1)}
        parts = min(per_rank, key=lambda p: per_rank[p])
        kv, g = per_rank[parts]
        return cls(ranks, num_heads, num_kv_heads, parts, kv, g)

    @property
    def q_heads(self) -> int:
        """Query heads on each rank, padding included."""
        return self.kv_heads * self.group

    def units(self, rank: int) -> list[tuple[int | None, int, int]]:
        """The units of one rank as (KV head or None for padding, first query head, number of real query heads)."""
        out: list[tuple[int | None, int, int]] = []
        per_kv = self.num_heads // self.num_kv_heads
        for unit in range(rank * self.kv_heads, (rank + 1) * self.kv_heads):
            kv, part = divmod(unit, self.parts)
            start = min(part * self.group, per_kv)
            real = min(self.group, per_kv - start)
            out.append((kv, kv * per_kv + start, real) if kv < self.num_kv_heads else (None, 0, 0))
        return out

    def q_segments(self, name: str, rank: int, head_dim: int) -> list[Segment]:
        """Rows of the query projection (or columns of the output projection) that one rank holds."""
        out = []
        for _, first, real in self.units(rank):
            if real:
                out.append(Segment(name, first * head_dim, (first + real) * head_dim))
            if real < self.group:
                out.append(Segment(None, 0, (self.group - real) * head_dim))
        return out

    def kv_segments(self, name: str, rank: int, head_dim: int) -> list[Segment]:
        """Rows of the key or value projection that one rank holds."""
        return [
            Segment(None, 0, head_dim) if kv is None else Segment(name, kv * head_dim, (kv + 1) * head_dim)
            for kv, _, _ in self.units(rank)
        ]


def split_segments(name: str, size: int, ranks: int, rank: int) -> list[Segment]:
    """The rank's share of `size` rows cut into equal parts of ceil(size / ranks), padded with zeros at the end."""
    part = ceil_div(size, ranks)
    lo, hi = min(rank * part, size), min((rank + 1) * part, size)
    out = [Segment(name, lo, hi)] if hi > lo else []
    if hi - lo < part:
        out.append(Segment(None, 0, part - (hi - lo)))
    return out
