"""The plan of published models: their sizes, what does not fit and what would, and the JSON."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jaxllm.config import EngineConfig
from jaxllm.mapping import CpType, Mapping
from jaxllm.plan.find import find_model, shipped
from jaxllm.plan.gpus import GPUS, find_gpu
from jaxllm.plan.plan import Plan, make_plan, usable_memory
from jaxllm.plan.report import text
from jaxllm.plan.roofline import Load
from tests.tiny_llm import MODEL


def plan(model: str, gpu: str = "h200", load: Load | None = None, devices: int | None = None, **settings: Any) -> Plan:
    config = EngineConfig(model=model, **settings)
    known = find_model(model, quantised=config.dtype == "auto")
    return make_plan(known, config, config.resolve_mapping(devices), find_gpu(gpu), load)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("TinyLlama-1.1B", 1.100, 1.100),
        ("Llama-3.1-8B", 8.030, 8.030),
        ("Llama-3.1-70B", 70.554, 70.554),
        ("Llama-3.3-70B", 70.554, 70.554),
        ("Llama-3.1-405B", 405.854, 405.854),
        ("Mixtral-8x7B", 46.703, 12.88),  # published: 46.7 and 12.9
        ("DeepSeek-V3", 671.03, 37.55),  # published: 671 and 37
    ],
)
def test_shipped_models_have_their_published_sizes(name, billions, active):
    assert name in shipped()
    model = find_model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.001 if billions < 500 else 0.01)
    assert model.active / 1e9 == pytest.approx(active, abs=0.05)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("llama-3.1-70b", "Llama-3.1-70B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3.3-70B"),
        ("Qwen/Qwen3-235B-A22B", "Qwen3-235B-A22B"),
        ("meta-llama/Llama-3.1-405B-Instruct", "Llama-3.1-405B"),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama-3.1-8B"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B"),
        ("tinyllama", "TinyLlama-1.1B"),
        ("deepseek-ai/DeepSeek-V3-Base", "DeepSeek-V3"),
        (str(MODEL), "qwen3"),
        (str(MODEL / "config.json"), "qwen3"),
    ],
)
def test_names(given, found):
    assert find_model(given).name == found


def test_llama_70b_on_four():
    """By hand: 70.55 B parameters of 2 bytes over 4, and 80 layers x 2 x 8 heads x 128 x 2 bytes over 4 a token."""
    found = plan("Llama-3.1-70B", tensor_parallel_size=4)
    (stage,) = found.stages
    assert found.ok and stage.weights == pytest.approx(70.554e9 * 2 / 4, rel=1e-3)
    assert stage.kv == found.pages * 32 * 80 * 2 * 2 * 128 * 2
    assert found.pool_tokens == (found.pages - 1) * 32
    free = usable_memory(GPUS["h200"]) - stage.weights
    page = stage.kv // found.pages  # one of them is nobody's
    assert 0.9 * free - page < stage.kv - page <= 0.9 * free
    assert stage.total + stage.free == usable_memory(GPUS["h200"])


def test_kv_heads_are_copied_beyond_their_number():
    eight, sixteen = (plan("Llama-3.1-405B", tensor_parallel_size=n).stages[0].weights for n in (8, 16))
    assert sixteen > eight / 2 * 1.005
    few = plan("Llama-3.1-405B", tensor_parallel_size=8, kv_cache_config={"max_tokens": 3200}).stages[0].kv
    more = plan("Llama-3.1-405B", tensor_parallel_size=16, kv_cache_config={"max_tokens": 3200}).stages[0].kv
    assert few == more  # one KV head each


def test_stages():
    found = plan("Llama-3.1-70B", pipeline_parallel_size=3, pp_partition=[20, 40, 20])
    assert [len(stage.layers) for stage in found.stages] == [20, 40, 20]
    one = plan("Llama-3.1-70B", tensor_parallel_size=2).stages[0].weights
    assert sum(stage.weights for stage in found.stages) == pytest.approx(2 * one, rel=1e-4)
    assert len({stage.kv // len(stage.layers) for stage in found.stages}) == 1  # the same pages in all stages
    middle = found.stages[1]
    assert middle.weights < 2 * found.stages[0].weights and middle.buffers < found.stages[2].buffers


def test_a_tied_table_is_counted_once_on_one_stage_and_twice_on_two():
    table = 49152 * 576 * 2
    one, two = plan("smollm2-135m"), plan("smollm2-135m", pipeline_parallel_size=2)
    assert sum(stage.weights for stage in two.stages) - one.stages[0].weights == table


@pytest.mark.parametrize("kind", [CpType.RING, CpType.STAR, CpType.HELIX])
def test_a_context_spread_over_cp(kind):
    kv = {"max_tokens": 128 * 1000}
    found = plan("Llama-3.1-8B", context_parallel_size=4, cp_config={"cp_type": kind}, kv_cache_config=kv)
    alone = plan("Llama-3.1-8B", kv_cache_config=kv)
    assert found.stages[0].kv == pytest.approx(alone.stages[0].kv / 4, rel=0.05)
    split = found.stages[0].weights / alone.stages[0].weights
    assert split == 1 if kind is not CpType.HELIX else 0.25 < split < 0.5


def test_attention_dp():
    kv = {"max_tokens": 3200}
    found = plan("Llama-3.1-8B", tensor_parallel_size=4, enable_attention_dp=True, kv_cache_config=kv)
    split = plan("Llama-3.1-8B", tensor_parallel_size=4, kv_cache_config=kv)
    attention = 32 * (6144 + 4096) * 4096 * 2
    assert found.stages[0].weights - split.stages[0].weights == attention * 3 // 4
    assert found.stages[0].kv == 4 * split.stages[0].kv and found.pool_tokens == 4 * split.pool_tokens


def test_experts():
    """The page's two layouts: experts over ep, the rest over ep x tp, so both give each device a sixteenth."""
    found = plan("DeepSeek-V3", tensor_parallel_size=16, moe_expert_parallel_size=4, devices=16)
    assert found.mapping == Mapping(tp=4, ep=4) and found.ok
    # fp8 with a float32 scale for 128 inputs of a row; attention's low-rank projections are on every device, the tables
    # and what makes keys and values of latents are in bfloat16
    assert 671e9 / 16 * (1 + 4 / 128) < found.stages[0].weights < 671e9 / 16 * (1 + 4 / 128) * 1.04
    assert found.stages[0].kv == found.pages * 32 * 61 * 576 * 2  # latents, on every device
    wide = plan("DeepSeek-V3", dtype="bfloat16", tensor_parallel_size=16, devices=16)
    assert wide.stages[0].weights == pytest.approx(2 * found.stages[0].weights / (1 + 4 / 128), rel=0.05)
    assert not found.notes and not wide.notes and found.model.kind == "deepseek_v3, fp8 weights"
    assert wide.stages[0].kv == wide.pages * 32 * 61 * 576 * 2
    mixtral = plan("Mixtral-8x7B", tensor_parallel_size=2, moe_expert_parallel_size=4, devices=8)
    assert mixtral.stages[0].weights == pytest.approx(46.703e9 * 2 / 8, rel=1e-3)


def test_wide_expert_parallelism():
    """Attention data-parallel, experts over all 16 devices: each has all of attention, and a 16th of the rest."""
    settings = {"tensor_parallel_size": 16, "moe_expert_parallel_size": 16, "enable_attention_dp": True}
    settings |= {"devices": 16, "dtype": "bfloat16", "max_batch_size": 64, "max_num_tokens": 4096}
    limit = {"moe_config": {"max_num_tokens": 8192}}
    found = plan("DeepSeek-V3", **settings, **limit)
    assert found.mapping == Mapping(ep=16, attention_dp=True) and found.ok
    attention = 61 * (1536 * 7168 + 576 * 7168 + 24576 * 1536 + 32768 * 512 + 7168 * 16384)
    split = 58 * 256 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432 + 58 * 3 * 7168 * 2048 + 2 * 129280 * 7168
    router = 58 * 256 * 7168
    assert found.stages[0].weights == pytest.approx(2 * (attention + split / 16 + router), rel=1e-3)
    assert found.pool_tokens == 16 * (found.pages - 1) * 32, "each device has the pages of its own requests"
    # 16 lanes of 4096 prompt tokens would be too many for the experts at a time.
    whole = plan("DeepSeek-V3", **settings)
    assert not whole.ok and "a step needs" in whole.problems[0]
    assert whole.stages[0].activations > 1.5 * found.stages[0].activations
    few = plan("DeepSeek-V3", **settings | {"max_batch_size": 8}, **limit)
    steps = (found.prompt_collectives, found.decode_collectives, few.decode_collectives)
    exchanged = ["tokens to their experts" in {c.where for c in step} for step in steps]
    assert exchanged == [True, True, False], "few tokens are not worth the messages"
    small = {"moe_config": {"load_balancer": {"num_slots": 288}, **limit["moe_config"]}}
    copies = plan("DeepSeek-V3", **settings, **small)
    assert copies.stages[0].weights - found.stages[0].weights == pytest.approx(2 * 58 * 2 * 3 * 7168 * 2048, rel=1e-3)


def test_speeds_at_the_roofline():
    """Llama-3.1-8B on an H200 by hand: 16.06 GB at 4.3 TB/s; 1000 tokens x 2 x 7 B operations at 787 TF/s."""
    (one, *_, many) = plan("Llama-3.1-8B", load=Load(1000, 1000)).speeds
    table = 128256 * 4096 * 2
    assert one.tpot == pytest.approx((16.06e9 - table + 1500 * 131072) / 4.3e12, rel=0.01)
    assert one.ttft == pytest.approx(2 * 1000 * 6.98e9 / 787e12, rel=0.05)
    assert many.batch == 256 and many.tpot > 3 * one.tpot and many.throughput > 20 * one.throughput
    assert plan("Llama-3.1-8B", tensor_parallel_size=2).speeds[0].tpot > one.tpot / 2


@pytest.mark.parametrize(
    ("settings", "problem", "fits"),
    [
        ({"model": "Llama-3.1-405B", "tensor_parallel_size": 4}, "the weights take 189.0 GiB of", Mapping(tp=8)),
        ({"model": "Llama-3.1-70B", "tensor_parallel_size": 128}, "64 attention heads", Mapping(pp=2, tp=64)),
        ({"model": "Llama-3.1-8B", "pipeline_parallel_size": 64}, "at most 32", Mapping(pp=32, tp=2)),
        (
            {"model": "Llama-3.1-8B", "max_batch_size": 2048, "max_num_tokens": 524288},
            "a step needs .* lower kv_cache_config.free_gpu_memory_fraction, max_num_tokens",
            None,
        ),
    ],
    ids=str,
)
def test_what_does_not_fit(settings, problem, fits):
    found = plan(**settings)
    assert not found.ok and re.search(problem, found.problems[0]), found.problems
    assert fits is None or fits in found.nearest, found.nearest
    assert "does not fit: " in text(found) and "what fits: " in text(found)
    for near in found.nearest:
        sizes = {"tensor_parallel_size": near.tp, "pipeline_parallel_size": near.pp}
        assert plan(**{**settings, **sizes}).ok


def test_fp8() -> None:
    """Half of the bytes of what is quantised, and prompts at the speed of products in e4m3."""
    settings = {"max_batch_size": 8, "max_seq_len": 4096}
    wide, found = (plan("Llama-3.1-8B", **settings, quantization=kind) for kind in (None, "fp8"))
    tables = 2 * 2 * 128256 * 4096
    assert found.stages[0].weights - tables == pytest.approx((wide.stages[0].weights - tables) / 2, rel=0.002)
    assert wide.speeds[0].ttft / found.speeds[0].ttft == pytest.approx(1440 / 787, rel=0.05)
    # Of experts, too: 1536 tokens for each of a chunk of 24576.
    settings = {"max_batch_size": 8, "max_num_tokens": 24576}
    load = Load(input=24576, output=1)
    both = [plan("Qwen3-30B-A3B", load=load, **settings, quantization=kind).speeds[0] for kind in (None, "fp8")]
    matrices = 48 * (8 * 3 * 2048 * 768 + 2048 * 128 * (32 + 4 + 4 + 32))
    assert both[0].ttft - both[1].ttft == pytest.approx(2 * matrices * 24576 * (1 / 787e12 - 1 / 1440e12), rel=0.01)
    settings = {"max_batch_size": 8, "max_seq_len": 4096}
    small = plan("Llama-3.1-8B", **settings, kv_cache_config={"dtype": "fp8"})
    assert small.stages[0].kv / small.pages == wide.stages[0].kv / wide.pages / 2
