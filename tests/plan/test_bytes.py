"""What a plan says an engine will allocate is what it then allocates, on every device."""

from __future__ import annotations

import gc
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm import LLM
from jaxllm.config import EngineConfig
from jaxllm.plan.find import find_model
from jaxllm.plan.gpus import find_gpu
from jaxllm.plan.plan import Plan, make_plan
from tests.tiny_llm import MODEL

pytestmark = pytest.mark.timeout(600)

TOLERANCE = 0.03
SIZES = {
    "dtype": "float32",
    "max_batch_size": 4,
    "max_num_tokens": 32,
    "max_seq_len": 64,
    "batch_buckets": [4],
    "token_buckets": [32],
    "kv_cache_config": {"tokens_per_block": 4, "max_tokens": 2048},
}


def allocated() -> Counter[int]:
    """Bytes of all arrays by device id."""
    gc.collect()
    # By address: looking at a shard makes an array of its own, alive and over the same memory, for the next count.
    buffers = {
        (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
    }
    found: Counter[int] = Counter()
    for (device, _), size in buffers.items():
        found[device] += size
    return found


def check(model: Any, **settings: Any) -> Plan:
    config = EngineConfig(model=str(model), **settings)
    plan = make_plan(find_model(config.model), config, config.resolve_mapping(8), find_gpu("h200"))
    assert plan.ok, plan.problems
    before = allocated()
    with LLM(model, skip_tokenizer_init=True, progress=False, **settings) as llm:
        stats = llm.get_stats()
        engine = allocated()
        engine.subtract(before)
    devices = [engine[device.id] for device in jax.devices()]
    size = plan.mapping.world_size // plan.mapping.pp
    for rank, found in enumerate(devices):
        planned = 0
        if rank < plan.mapping.world_size:
            stage = plan.stages[rank // size]
            planned = stage.weights + stage.kv + stage.buffers
        assert abs(found - planned) <= TOLERANCE * planned, (rank, found, planned)
    pools = plan.mapping.ep * plan.mapping.tp if plan.mapping.attention_dp else 1
    assert stats["pages"] == pools * (plan.pages - 1)
    return plan


def test_what_was_there_before_is_counted_once() -> None:
    mesh = jax.make_mesh((8,), ("tp",))
    kept = jax.device_put(jnp.ones(8000), jax.NamedSharding(mesh, jax.P("tp")))
    before = allocated()
    assert allocated() == before and sum(before.values()) >= kept.nbytes


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 5},  # six heads on five ranks
    {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"tensor_parallel_size": 3, "pipeline_parallel_size": 2},
    {"tensor_parallel_size": 4, "enable_attention_dp": True},
    *(
        {"tensor_parallel_size": 2, "context_parallel_size": 2, "cp_config": {"cp_type": kind, **keys}}
        for kind, keys in (("RING", {}), ("ULYSSES", {}), ("HELIX", {}), ("STAR", {"block_size": 16}))
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiny(layout: dict[str, Any]) -> None:
    check(MODEL, **SIZES, **layout)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("mixtral", {"tensor_parallel_size": 2, "moe_expert_parallel_size": 4}),
        slow("deepseek_v3", {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2}),
        slow("mixtral_window", {"tensor_parallel_size": 3}),  # 5 experts of 37 columns
        slow("qwen3_moe", {"moe_expert_parallel_size": 2, "pipeline_parallel_size": 2}),  # a dense layer between
    ],
    ids=str,
)
def test_experts(model: str, layout: dict[str, Any]) -> None:
    check(MODEL.parent / model, **SIZES, **layout)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        slow(MODEL, {"quantization": "fp8"}),
        (MODEL, {"quantization": "fp8", "quantize_lm_head": True, "tensor_parallel_size": 3}),
        slow(MODEL, {"quantization": "int8", "pipeline_parallel_size": 2}),
        slow(MODEL.parent / "mixtral", {"quantization": "fp8", "moe_expert_parallel_size": 2}),
    ],
    ids=str,
)
def test_quantised(model: Any, settings: dict[str, Any]) -> None:
    wide = SIZES | {"kv_cache_config": {"tokens_per_block": 4, "max_tokens": 256}}
    plan = check(model, **wide, **settings)
    settings = {**settings, "quantization": None, "quantize_lm_head": False}
    config = EngineConfig(model=str(model), **wide, **settings)
    unquantised = make_plan(find_model(config.model), config, config.resolve_mapping(8), find_gpu("h200"))
    assert plan.stages[0].weights < 0.7 * unquantised.stages[0].weights


def test_the_page_pool_is_a_good_part_of_it() -> None:
    """Otherwise the test above would see nothing but weights."""
    few = check(MODEL, **SIZES)
    many = check(MODEL, **SIZES | {"kv_cache_config": {"tokens_per_block": 4, "max_tokens": 8192}})
    assert many.stages[0].kv > 3.9 * few.stages[0].kv > few.stages[0].weights / 2


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_smollm2(ranks: int) -> None:
    settings = SIZES | {"kv_cache_config": {"tokens_per_block": 32, "max_tokens": 8192}, "max_seq_len": 256}
    # A plan is for GPUs, which expand quantised weights.
    check("smollm2-135m", **settings, tensor_parallel_size=ranks, dequantize_weights=True)
