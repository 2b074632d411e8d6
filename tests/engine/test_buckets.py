"""Every step that the scheduler can make has a bucket, and the picked one wastes least."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.buckets import Bucket, Picker, plan, powers_of_two
from jaxllm.engine.request import Request
from jaxllm.engine.scheduler import Scheduler
from jaxllm.sampling_params import SamplingParams

lists = st.none() | st.lists(st.integers(1, 80), min_size=1, max_size=4, unique=True).map(sorted)


@given(st.integers(1, 64), st.integers(1, 40), lists, lists, st.sampled_from([1, 4, 32]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_step_fits(
    batch: int, tiles: int, batch_sizes: list[int] | None, tile_counts: list[int] | None, tile: int, fine: bool
) -> None:
    buckets = plan(batch, tiles, batch_sizes=batch_sizes, tile_counts=tile_counts, fine=fine)
    assert len(set(buckets)) == len(buckets) and Bucket(0, 0) not in buckets
    assert all(b.decodes <= batch and b.tiles <= tiles for b in buckets), "larger than any step"
    picker = Picker(buckets, tile)
    for decodes in range(batch + 1):
        for count in range(tiles + 1):
            # with a single slot a step never has both
            if (decodes or count) and not (batch == 1 and decodes and count):
                bucket = picker.pick(decodes, count)
                assert bucket.decodes >= decodes and bucket.tiles >= count
                assert bucket.rows >= decodes + min(count, batch), "no more prompts than slots, or than tiles"
                others = [b for b in buckets if b.decodes >= decodes and b.tiles >= count]
                assert bucket.tokens(tile) == min(b.tokens(tile) for b in others)


@given(
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=20),
)
@settings(max_examples=80, deadline=None)
def test_real_steps_fit(batch: int, more_tokens: int, tile: int, load: list[tuple[int, int, int]]) -> None:
    tokens = batch + more_tokens
    tile = min(tile, tokens)
    tiles = -(-tokens // tile)
    picker = Picker(plan(batch, tiles, fine=batch % 2 == 0), tile)
    pool = PagePool(60, 4)
    scheduler = Scheduler(pool, max_batch_size=batch, max_num_tokens=tokens, max_seq_len=48, tile=tile, max_tiles=tiles)
    for i, (length, output, n) in enumerate(load):
        scheduler.add(Request(i, [1 + i] * length, SamplingParams(max_tokens=output, n=n)))
    while (step := scheduler.schedule()) is not None:
        count = sum(-(-(c.stop - c.start) // tile) for c in step.prefills)
        bucket = picker.pick(len(step.decodes), count)
        assert len(step.decodes) <= bucket.decodes and count <= bucket.tiles
        assert step.num_rows <= bucket.rows
        scheduler.update(step, [7] * step.num_rows)
    assert not scheduler.has_work()


def test_the_sampler_needs_few_sizes() -> None:
    buckets = plan(64, 16)
    assert len({bucket.rows for bucket in buckets}) <= len([b for b in buckets if not b.tiles]) + 3


def test_padding_on_a_gpu() -> None:
    """Prompt tiles are padded to less than twice as many beside any number of decodes, by few programs."""
    buckets = plan(256, 64)
    assert len(buckets) <= 13 + 2 * 7 + 1
    picker = Picker(buckets, 128)
    for decodes in (0, 1, 60, 256):
        assert all(picker.pick(decodes, tiles).tiles < 2 * tiles for tiles in range(1, 65))
    assert picker.pick(0, 64) == Bucket(0, 64, 8 + 64), "nothing but prompts: not a row more than they have"
    # one size of prompt chunks, alone, beside few decodes and beside all, and six of batches
    assert len(plan(256, 64, batch_sizes=[1, 8, 32, 64, 128, 256], tile_counts=[64])) == 9


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="no bucket holds 9 decodes and 1 tiles"):
        Picker(plan(8, 4), 1).pick(9, 1)


def test_powers() -> None:
    assert powers_of_two(10) == [1, 2, 4, 8, 10]
    assert powers_of_two(64, 2) == [1, 4, 16, 64]
    assert powers_of_two(1) == [1]
