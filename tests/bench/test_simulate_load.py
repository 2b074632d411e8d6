"""The cost model of scripts/simulate_load.py, on loads that can be added up by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "simulate_load.py"
    spec = importlib.util.spec_from_file_location("simulate_load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("first", [False, True])
def test_one_wave(simulation: ModuleType, first: bool) -> None:
    """Four prompts of a tile fill one step, and decode together: 1 ms a token of the bucket, 1 ms for 1000 of KV."""
    costs = simulation.Costs({0: 0.0, 10_000: 10_000.0}, kv_bytes=10**9, bandwidth=1.0)
    run = simulation.simulate([(128, 3)] * 4, costs, slots=8, chunk=512, tiles=[4], pages=100, first=first)
    assert run.output_tokens == 12 and run.steps == 3 and run.mixed == 0 and run.preemptions == 0
    # prompts alone; then 8 rows of decodes, and 4 contexts of 128 tokens, then of 129
    assert run.seconds == pytest.approx(1e-3 * (512 + (8 + 4 * 128) + (8 + 4 * 129)))
    assert run.real == 4 * 128 + 8 and run.padded == 2 * 4
    assert len(run.ttft) == 4 and run.itl == pytest.approx([8 + 4 * 128] * 4 + [8 + 4 * 129] * 4)


def test_filling_the_batch_first_holds_decodes_back(simulation: ModuleType) -> None:
    costs = simulation.Costs({0: 1.0, 10_000: 1.0}, kv_bytes=0, bandwidth=1.0)
    load = [(256, 8)] * 6
    mixed, filled = (
        simulation.simulate(load, costs, slots=8, chunk=256, tiles=[2], pages=100, first=first)
        for first in (False, True)
    )
    assert (mixed.mixed, max(mixed.itl)) == (5, pytest.approx(1))
    assert (filled.mixed, max(filled.itl)) == (0, pytest.approx(6)), "the first request waits for five others' prompts"
