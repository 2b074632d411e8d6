"""Every head is on exactly one rank, in order, and padding is zero."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.parallel.heads import HeadLayout, split_segments

pytestmark = pytest.mark.quick

H = 4


@st.composite
def layouts(draw: st.DrawFn) -> HeadLayout:
    kv = draw(st.integers(1, 12))
    heads = kv * draw(st.integers(1, 10))
    return HeadLayout.plan(heads, kv, draw(st.integers(1, heads)))


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_every_query_head_once_with_its_own_kv_head(layout: HeadLayout) -> None:
    per_kv = layout.num_heads // layout.num_kv_heads
    heads: list[int] = []
    for rank in range(layout.ranks):
        units = layout.units(rank)
        assert len(units) == layout.kv_heads
        for kv, first, real in units:
            assert 0 <= real <= layout.group
            if kv is None:
                assert real == 0
            for head in range(first, first + real):
                assert head // per_kv == kv
                heads.append(head)
    assert heads == list(range(layout.num_heads)), "each once, in order"


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_segments_fill_every_rank_alike(layout: HeadLayout) -> None:
    per_kv = layout.num_heads // layout.num_kv_heads
    rows: list[int] = []
    for rank in range(layout.ranks):
        q, k = layout.q_segments("q", rank, H), layout.kv_segments("k", rank, H)
        assert sum(s.size for s in q) == layout.q_heads * H
        assert sum(s.size for s in k) == layout.kv_heads * H
        # row by row: which head of the checkpoint is it, None for zeros
        held_q = [None if s.name is None else (s.start + i) // H for s in q for i in range(s.size)]
        held_k = [None if s.name is None else (s.start + i) // H for s in k for i in range(s.size)]
        rows += [s.start + i for s in q if s.name for i in range(s.size)]
        for i, head in enumerate(held_q):
            if head is not None:
                assert held_k[i // H // layout.group * H] == head // per_kv, "next to its KV head"
    assert rows == list(range(layout.num_heads * H))


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_nothing_is_wasted(layout: HeadLayout) -> None:
    assert layout.kv_heads >= math.ceil(layout.num_kv_heads / layout.ranks)
    if layout.num_kv_heads % layout.ranks == 0:
        assert (layout.kv_heads, layout.q_heads) == (
            layout.num_kv_heads // layout.ranks,
            layout.num_heads // layout.ranks,
        )
    if layout.ranks >= layout.num_kv_heads:
        assert layout.kv_heads == 1


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "group", "padded"),
    [(1, 3, 3, 9), (2, 2, 3, 12), (3, 1, 3, 9), (4, 1, 3, 12), (8, 1, 2, 16), (9, 1, 1, 9)],
)
def test_smollm2(ranks: int, kv_heads: int, group: int, padded: int) -> None:
    layout = HeadLayout.plan(9, 3, ranks)
    assert (layout.kv_heads, layout.group, layout.q_heads * ranks) == (kv_heads, group, padded)


def test_more_ranks_than_heads() -> None:
    with pytest.raises(ValueError, match="use at most tensor_parallel_size=9"):
        HeadLayout.plan(9, 3, 10)


@given(st.integers(1, 300), st.integers(1, 16))
def test_split(size: int, ranks: int) -> None:
    parts = [split_segments("w", size, ranks, rank) for rank in range(ranks)]
    assert {sum(s.size for s in part) for part in parts} == {-(-size // ranks)}
    assert [s.start + i for part in parts for s in part if s.name for i in range(s.size)] == list(range(size))
