"""Experts that are kept in e4m3, on layouts: the greedy tokens of one device with the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.registry import config_from_hf
from tests.golden import quantized_files

PROMPTS = [[5, 17, 99, 120, 33, 8, 64], [7], [150, 3, 3, 77, 201, 12, 9, 40, 41, 42, 100, 18], [9, 8, 7, 6]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "slots": {
        "tensor_parallel_size": 2,
        "moe_expert_parallel_size": 2,
        "moe_config": {
            "load_balancer": {"num_slots": 6, "layer_updates_per_iter": 1, "iters_per_reading": 2},
            "dispatch": "all_to_all",
        },
    },
    "all_to_all": {
        "tensor_parallel_size": 4,
        "moe_expert_parallel_size": 4,
        "enable_attention_dp": True,
        "moe_config": {"dispatch": "all_to_all"},
    },
    "replicate": {
        "tensor_parallel_size": 2,
        "moe_expert_parallel_size": 4,
        "enable_attention_dp": True,
        "moe_config": {"dispatch": "replicate"},
    },
    "stages": {"pipeline_parallel_size": 2, "moe_expert_parallel_size": 2, "moe_config": {"dispatch": "all_to_all"}},
}
MODELS = ("fp8_block_mixtral", "fp8_channel_mixtral", "fp8_block_deepseek")
FAST = {("fp8_block_mixtral", "slots")}
Checkpoint = Callable[[str], tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A quantised checkpoint by its name, and the tokens of a plain one."""

    @cache
    def make(name: str) -> tuple[Path, list[list[int]]]:
        shapes = checkpoint_shapes(config_from_hf(quantized_files.CASES[name].config))
        small, wide = quantized_files.write(name, shapes, tmp_path_factory.mktemp("model"))
        return small, tokens(wide)

    return make


def tokens(model: Path, **settings: Any) -> list[list[int]]:
    with LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_batch_size=4,
        max_num_tokens=48,
        max_seq_len=64,
        kv_cache_config={"tokens_per_block": 4, "max_tokens": 640},
        batch_buckets=[4],
        token_buckets=[48],
        progress=False,
        **settings,
    ) as llm:
        if settings:
            (stage, *_) = llm._engine._runner.stages
            experts = [spec.part for path, spec in stage.functions.specs.items() if ".mlp.gate_up.values" in path]
            assert experts and all(part is not None and part.format.kind == "fp8" for part in experts)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in FAST else pytest.mark.slow)
        for name in MODELS
        for layout in LAYOUTS
    ],
)
def test_layouts(name: str, layout: str, checkpoint: Checkpoint) -> None:
    model, wanted = checkpoint(name)
    assert tokens(model, **LAYOUTS[layout]) == wanted
