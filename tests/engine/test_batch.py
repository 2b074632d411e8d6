"""A packed step unpacks to what was scheduled, and page tables follow the scheduler."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jaxllm.engine.batch import BatchShape, Packer
from jaxllm.engine.blocks import PagePool
from jaxllm.engine.buckets import Bucket, Picker, plan
from jaxllm.engine.request import Request
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Step
from jaxllm.mapping import Mapping
from jaxllm.parallel.layout import Layout
from jaxllm.sampling_params import SamplingParams

SLOTS, TILE, WIDTH, PAGE = 4, 8, 8, 4


def make_packer(mapping: Mapping | None = None, width: int = WIDTH) -> Packer:
    layout = Layout(mapping or Mapping(), np.dtype(np.float32))
    return Packer(tile=TILE, width=width, max_batch_size=SLOTS, layout=layout, page_size=PAGE)


def test_parts_lie_end_to_end() -> None:
    shape = BatchShape(Bucket(3, 4, chunks=2), TILE, WIDTH)
    parts = shape.unpack(np.arange(shape.length))
    assert [part.size for part in parts] == list(shape.sizes) == [35, 35, 5, 5, 7 * WIDTH, 0]
    assert np.concatenate([part.ravel() for part in parts]).tolist() == list(range(shape.length))
    assert parts.pages_RW.shape == (7, WIDTH)


def test_an_empty_step_is_all_padding() -> None:
    packer = make_packer()
    packed = packer.pack(Step(), Bucket(2, 1))
    _, positions, slots, _, pages, _ = packed.shape.unpack(packed.data[0, 0])
    assert (positions == -1).all() and (slots == SLOTS).all() and (pages == 0).all()
    assert packed.rows.size == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_pages", [13, 60])
def test_steps_of_a_real_scheduler(num_pages: int, overlap: bool) -> None:
    """With 12 pages sequences are preempted and slots and pages change hands."""
    rng = random.Random(num_pages)
    tokens = SLOTS + 2 * TILE
    tiles = -(-tokens // TILE)
    picker = Picker(plan(SLOTS, tiles), TILE)
    packer = make_packer()
    scheduler = Scheduler(
        PagePool(num_pages, PAGE), max_batch_size=SLOTS, max_num_tokens=tokens, max_seq_len=WIDTH * PAGE, tile=TILE,
        max_tiles=tiles,
    )  # fmt: skip
    requests = []
    for i in range(40):
        prompt = [rng.randrange(3, 99) for _ in range(rng.randint(1, 20))]
        requests.append(Request(i, prompt, SamplingParams(max_tokens=rng.randint(1, 12), n=rng.choice((1, 1, 3)))))
        scheduler.add(requests[-1])
    flights: list[Step] = []
    while True:
        step = scheduler.schedule()
        if step is not None:
            check(packer, picker, step)
            flights.append(step)
            if rng.random() < 0.05:
                scheduler.abort(rng.choice(requests))
        if flights and (step is None or len(flights) > overlap):
            done = flights.pop(0)
            scheduler.update(done, [rng.randrange(3, 99) for _ in range(done.num_rows)])
        elif step is None:
            break
    assert all(request.finished for request in requests)
    assert (scheduler.num_preemptions > 0) == (num_pages == 13)


def check(packer: Packer, picker: Picker, step: Step) -> None:
    bucket = picker.pick(*packer.needs(step))
    packed = packer.pack(step, bucket)
    tokens, positions, slots, last, pages, _ = packed.shape.unpack(packed.data[0, 0])
    assert packed.data.dtype == np.int32 and len(packed.rows) == step.num_rows
    used = np.zeros(len(tokens), bool)
    sampled = np.zeros(len(slots), bool)

    for i, (seq, position) in enumerate(zip(step.decodes, step.positions, strict=True)):
        row = packed.rows[i]
        at = last[row]
        assert row == i and at < bucket.decodes
        assert positions[at] == position and slots[row] == seq.slot
        assert pages[i, : len(seq.pages)].tolist() == seq.pages
        assert len(seq.pages) * PAGE > position
        used[at] = sampled[row] = True

    row = bucket.decodes
    for i, chunk in enumerate(step.prefills, len(step.decodes)):
        count = -(-(chunk.stop - chunk.start) // TILE)
        start = bucket.decodes + (row - bucket.decodes) * TILE
        length = chunk.stop - chunk.start
        assert tokens[start : start + length].tolist() == chunk.seq.tokens[chunk.start : chunk.stop]
        assert positions[start : start + length].tolist() == list(range(chunk.start, chunk.stop))
        for tile in range(row, row + count):
            assert pages[tile, : len(chunk.seq.pages)].tolist() == chunk.seq.pages
        result = packed.rows[i]
        assert last[result] == start + length - 1
        assert slots[result] == (chunk.seq.slot if chunk.samples else packer.spare_slot)
        used[start : start + length] = True
        sampled[result] = True
        row += count

    assert (positions[~used] == -1).all()
    assert (slots[~sampled] == packer.spare_slot).all()
    real = slots[slots != packer.spare_slot]
    assert len(set(real.tolist())) == len(real)
