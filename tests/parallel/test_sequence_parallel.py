"""Sequence parallelism: the residual stream of long steps split over the ranks of a tensor parallel group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.config import EngineConfig
from jaxllm.engine.buckets import Bucket
from jaxllm.mapping import CpType, Mapping
from jaxllm.parallel import layout as layout_module
from jaxllm.parallel.layout import SPREAD_BYTES, Layout
from jaxllm.plan.compile import HLO_NAMES, compile_step
from jaxllm.plan.find import find_model
from jaxllm.plan.gpus import find_gpu
from jaxllm.plan.plan import make_plan
from tests.tiny_llm import MODEL, make_llm, prompts

BF16 = np.dtype("bfloat16")


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Split however short a step is."""
    monkeypatch.setattr(layout_module, "SPREAD_BYTES", 0)
    yield


def test_long_steps_are_split() -> None:
    layout = Layout(Mapping(tp=4), BF16)
    rows = SPREAD_BYTES // (2 * 4096)
    assert layout.spread(rows, 4096) == ("ep", "tp")
    assert layout.spread(rows - 4, 4096) == ()
    assert layout.spread(rows + 1, 4096) == (), "rows that do not divide stay together"
    assert layout.spread(rows // 2, 8192) == ("ep", "tp")
    assert Layout(Mapping(), BF16).spread(rows, 4096) == ()
    assert Layout(Mapping(tp=4, attention_dp=True), BF16).spread(rows, 4096) == ()
    assert Layout(Mapping(tp=2, cp=2, cp_type=CpType.HELIX), BF16).spread(rows, 4096) == ("ep", "tp", "cp")
    assert Layout(Mapping(tp=2, cp=2, cp_type=CpType.RING), BF16).stream(rows, 4096)[0] == ("cp", "ep", "tp")


Answer = tuple[list[list[int]], list[np.ndarray]]


def answer(**settings: Any) -> Answer:
    """Tokens, and logprobs of the prompts."""
    params = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    with make_llm(reuse=False, **settings) as llm:
        outputs = llm.generate(prompts(6, seed=7, low=9), params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    logprobs = [[e.logprob for entry in c.prompt_logprobs[1:] for e in entry.values()] for c in completions]
    return [c.token_ids for c in completions], [np.array(of_prompt) for of_prompt in logprobs]


@cache
def one_device(star: bool) -> Answer:
    return answer(cp_config={"cp_type": "STAR", "block_size": 8, "cp_anchor_size": 4} if star else None)


CP = {kind: {"context_parallel_size": 2, "cp_config": {"cp_type": kind}} for kind in ("RING", "ULYSSES", "HELIX")}
CP["STAR"] = {"context_parallel_size": 2, "cp_config": {"cp_type": "STAR", "block_size": 8, "cp_anchor_size": 4}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp2pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    **{f"tp2{kind}": {"tensor_parallel_size": 2, **settings} for kind, settings in CP.items()},
}


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_answer_of_one_device(name: str) -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    star = name.endswith("STAR")
    tokens, logprobs = answer(**LAYOUTS[name])
    assert tokens == one_device(star)[0]
    for found, wanted in zip(logprobs, one_device(star)[1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives(name: str) -> None:
    """Reduce-scatters and all-gathers in place of the all-reduces, and as the plan counts them."""
    settings = LAYOUTS[name] | ({"cp_config": {"cp_type": "STAR", "block_size": 32}} if name.endswith("STAR") else {})
    config = EngineConfig(
        model=str(MODEL), dtype="float32", max_batch_size=8, kv_cache_config={"max_tokens": 1024}, **settings
    )
    plan = make_plan(find_model(config.model), config, config.resolve_mapping(8), find_gpu("h200"))
    found: Counter[str] = Counter()
    for stage in compile_step(plan, jax.devices(), Bucket(0, 2)):
        assert stage.difference < 0.001, stage
        found.update(stage.collectives)
    planned: Counter[str] = Counter()
    for c in plan.prompt_collectives:
        if c.kind != "send":
            planned[HLO_NAMES[c.kind]] += c.count
    assert found == planned
    layers = plan.model.num_layers
    assert found["reduce-scatter"] == 2 * layers + 1
    # The row to sample from; and the anchors of star attention.
    assert found["all-reduce"] == (1 + layers if name.endswith("STAR") else 1)
