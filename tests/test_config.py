"""Settings: what is refused, and that every refusal is one line that names the value and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.config import AttentionDpConfig, CpConfig, EngineConfig, KvCacheConfig, SchedulerConfig
from jaxllm.mapping import CpType, StarConfig
from jaxllm.mapping import Mapping as ParallelMapping
from jaxllm.settings import ConfigError, merge_settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_paralel_size": 2}, "unknown setting 'tensor_paralel_size'; did you mean 'tensor_parallel_size'"),
        ({"kv_cache_config": {"max_token": 1}}, "of KvCacheConfig 'max_token'; did you mean 'max_tokens'"),
        ({"qqqq": 1}, "the valid ones are attention_dp_config, batch_buckets"),
        ({"dtype": "fp8"}, "dtype = 'fp8': must be 'auto'"),
        ({"load_format": "fast"}, "load_format = 'fast'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size = 0"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size = '2'"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size = True"),
        ({"model": " "}, "model is empty"),
        ({"max_seq_len": 1}, "max_seq_len = 1"),
        ({"seed": -1}, "seed = -1"),
        ({"pipeline_parallel_size": 2, "pp_partition": [1, 2, 3]}, "3 stages, but pipeline_parallel_size = 2"),
        ({"pipeline_parallel_size": 2, "pp_partition": [4, 0]}, "every stage needs at least one layer"),
        ({"pp_partition": "4"}, "pp_partition = '4'"),
        ({"context_parallel_size": 0}, "context_parallel_size = 0"),
        ({"moe_expert_parallel_size": 0}, "moe_expert_parallel_size = 0 must be an integer of at least 1"),
        ({"tensor_parallel_size": 4, "moe_tensor_parallel_size": 3}, "does not divide tensor_parallel_size = 4; use"),
        (
            {"tensor_parallel_size": 8, "moe_expert_parallel_size": 4, "moe_tensor_parallel_size": 4},
            "contradicts tensor_parallel_size = 8; leave moe_tensor_parallel_size out, or use 8 (for 32 devices) or 2",
        ),
        ({"moe_config": {"backend": "CUTLAS"}}, "moe_config.backend = 'CUTLAS' is unknown; did you mean 'CUTLASS'?"),
        ({"moe_config": {"backend": "qqqq"}}, "moe_config.backend = 'qqqq' is unknown; use AUTO or XLA"),
        ({"moe_config": {"dispatch": "raged"}}, "dispatch = 'raged': must be 'auto', 'replicate'"),
        ({"moe_config": {"load_balancer": "eplb.yaml"}}, "cannot read the config file 'eplb.yaml': No such file"),
        ({"moe_config": {"load_balancer": {"slots": 8}}}, "of MoeLoadBalancerConfig 'slots'; did you mean 'num_slots'"),
        ({"moe_config": {"load_balancer": {"num_slots": 0}}}, "num_slots = 0: must be greater than or equal to 1"),
        (
            {"moe_config": {"load_balancer": {"initial_global_assignments": {"a": [0]}}}},
            "initial_global_assignments names layer 'a', which is no number",
        ),
        ({"moe_config": {"max_num_tokens": 0}}, "max_num_tokens = 0: must be greater than or equal to 1"),
        ({"moe_config": {"dispatch": "ragged", "exchange_from": 8}}, "exchange_from = 8 has no meaning with dispatch"),
        ({"cp_config": {"cp_type": "rung"}}, "cp_type = 'rung' is not a kind of context parallelism; use ULYSSES, ST"),
        ({"cp_config": {"cp_type": 4}}, "cp_type = 4 is not"),
        ({"cp_config": {"cp_type": True}}, "cp_type = True is not"),
        (
            {"cp_config": {"cp_type": "RING", "block_size": 64}},
            "cp_config.block_size = 64 belongs to cp_type STAR, not RING, which takes cp_type",
        ),
        (
            {"cp_config": {"cp_type": "STAR", "tokens_per_block": 32}},
            "belongs to cp_type HELIX, not STAR, which takes cp_type, block_size and cp_anchor_size",
        ),
        ({"cp_config": {"cp_type": "STAR", "block_size": 64, "cp_anchor_size": 65}}, "the anchor is at most a block"),
        ({"cp_config": {"cp_type": "STAR", "block_size": 0}}, "block_size = 0"),
        ({"cp_config": {"cp_type": "HELIX", "tokens_per_block": 16}}, "differs from kv_cache_config.tokens_per_block"),
        ({"cp_config": {"cptype": "RING"}}, "of CpConfig 'cptype'; did you mean 'cp_type'"),
        ({"attention_dp_config": {"timeout_iters": -1}}, "timeout_iters = -1"),
        ({"attention_dp_config": {"balance": True}}, "of AttentionDpConfig 'balance'; did you mean 'enable_balance'"),
        ({"enable_attention_dp": "yes"}, "enable_attention_dp = 'yes'"),
        ({"orchestrator_type": "ray"}, "orchestrator_type = 'ray'"),
        ({"backend": "tensorrt"}, "backend = 'tensorrt': choosing another runtime is not supported yet; leave"),
        ({"max_beam_width": 4}, "max_beam_width = 4: beam search is not supported"),
        ({"cuda_graph_config": {"enable_padding": True}}, "batch_buckets names batch sizes"),
        ({"max_batch_size": 8, "max_num_tokens": 4}, "max_num_tokens = 4 is less than max_batch_size = 8"),
        ({"max_batch_size": 8, "batch_buckets": [1, 4]}, "batch_buckets end at 4"),
        ({"batch_buckets": [4, 1]}, "ascending"),
        ({"token_buckets": []}, "positive"),
        ({"skip_tokenizer_init": True, "tokenizer": "x"}, "contradicts"),
        ({"kv_cache_config": {"tokens_per_block": 48}}, "power of two, for example 64"),
        ({"kv_cache_config": {"free_gpu_memory_fraction": 1.5}}, "free_gpu_memory_fraction = 1.5"),
        ({"kv_cache_config": {"free_gpu_memory_fraction": float("nan")}}, "free_gpu_memory_fraction = nan"),
        ({"kv_cache_config": {"max_tokens": 8}}, "less than one page"),
        ({"kv_cache_config": 7}, "kv_cache_config = 7"),
        ({"scheduler_config": {"capacity_scheduler_policy": "STATIC_BATCH"}}, "STATIC_BATCH"),
        ({"pytorch_backend_config": {"x": 1}}, "only 'enable_overlap_scheduler'"),
        (
            {"pytorch_backend_config": {"enable_overlap_scheduler": True}, "disable_overlap_scheduler": True},
            "contradicts",
        ),
    ],
)
def test_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model": "m"} | settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_all_problems_are_named():
    with pytest.raises(ConfigError, match=r"dtype.*max_batch_size"):
        EngineConfig(model="m", dtype="fp8", max_batch_size=0)
    with pytest.raises(ConfigError, match="'model'"):
        EngineConfig()


def test_accepted_forms():
    config = EngineConfig(
        model=Path("/m"),
        kv_cache_config=KvCacheConfig(max_tokens=64),
        scheduler_config={"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        moe_expert_parallel_size=1,
        orchestrator_type=None,
        backend="pytorch",
        attn_backend="TRTLLM",
        max_beam_width=1,
        enable_iter_perf_stats=True,
        enable_attention_dp=False,
        trust_remote_code=False,
    )
    assert config.model == "/m" and config.kv_cache_config.max_tokens == 64
    assert config.scheduler_config == SchedulerConfig(capacity_scheduler_policy="GUARANTEED_NO_EVICT")
    assert EngineConfig(model="m", kv_cache_config=None).kv_cache_config == KvCacheConfig()


def test_kinds_of_context_parallelism():
    for kind in CpType:
        for spelling in (kind, kind.name, kind.name.lower(), kind.value):
            assert EngineConfig(model="m", cp_config={"cp_type": spelling}).cp_config.cp_type is kind
    assert EngineConfig(model="m").cp_config == EngineConfig(model="m", cp_config=None).cp_config == CpConfig()
    assert CpConfig().cp_type is CpType.ULYSSES and CpConfig().star is None
    assert CpConfig(cp_type="STAR").star == StarConfig(4096, 4096)
    assert CpConfig(cp_type="STAR", block_size=64).star == StarConfig(64, 64)
    assert CpConfig(cp_type="STAR", block_size=64, cp_anchor_size=8).star == StarConfig(64, 8)


def test_the_layout_of_a_config():
    page = {"enable_balance": True, "timeout_iters": 10, "batching_wait_iters": 5}
    config = EngineConfig(
        model="m",
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        pp_partition=[3, 5],
        context_parallel_size=2,
        cp_config=CpConfig(cp_type=CpType.HELIX),
        moe_expert_parallel_size=2,
        enable_attention_dp=True,
        attention_dp_config=page,
    )
    rest = {"pp": 2, "cp": 2, "cp_type": CpType.HELIX, "attention_dp": True, "pp_partition": (3, 5)}
    assert config.resolve_mapping(16) == ParallelMapping(tp=2, ep=2, **rest)
    assert config.resolve_mapping(8) == ParallelMapping(tp=1, ep=2, **rest)
    assert config.attention_dp_config == AttentionDpConfig(**page)
    assert AttentionDpConfig() == AttentionDpConfig(enable_balance=False, timeout_iters=50, batching_wait_iters=10)


def test_overlap_in_the_older_spelling(caplog):
    for enabled in (True, False):
        caplog.clear()
        config = EngineConfig(model="m", pytorch_backend_config={"enable_overlap_scheduler": enabled})
        assert config.disable_overlap_scheduler is not enabled
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.endswith(f"write disable_overlap_scheduler: {str(not enabled).lower()}")


def test_yaml(tmp_path):
    file = tmp_path / "config.yml"
    file.write_text("model: m\nkv_cache_config:\n  free_gpu_memory_fraction: 0.95\n  tokens_per_block: 16\n")
    config = EngineConfig.from_yaml(file, max_batch_size=4, kv_cache_config={"tokens_per_block": 64})
    assert config.max_batch_size == 4
    assert config.kv_cache_config == KvCacheConfig(free_gpu_memory_fraction=0.95, tokens_per_block=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold settings"),
        ("1: 2\n", "must hold settings"),
        ("a: [1\n", "not valid YAML"),
        ("model: m\nbatchsize: 3\n", "unknown setting 'batchsize'"),
        ("model: m\nseed: 3\nmax_seq_len: 9\nseed: 4\n", "'seed' is given twice in the mapping that starts in line 1"),
        ("model: m\nkv_cache_config:\n  dtype: auto\n  dtype: fp8\n", "'dtype' is given twice"),
        (b"\xff\xfe\x00", "UTF-8"),
        (None, "cannot read the config file"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    file = tmp_path / "config.yml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_yaml(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_merge_keeps_what_is_not_overridden():
    merged = merge_settings({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4})
    assert merged == {"a": {"x": 1, "y": 3}, "b": 1, "c": 4}
