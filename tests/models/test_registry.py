"""Published configs become the right ModelConfig in both dialects; what the decoder cannot do is refused by name."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.layers.rope import RopeConfig
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.registry import ModelConfigError, config_from_hf

sys.path.insert(0, str(Path(__file__).parent))

import published

LLAMA3_ROPE = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_max_position=8192)


@pytest.mark.parametrize("name", published.ALL)
def test_both_dialects_agree(name: str) -> None:
    config = published.ALL[name]
    assert config_from_hf(published.modern(config)) == config_from_hf(config)


@pytest.mark.parametrize("name", published.ALL)
def test_agrees_with_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = published.ALL[name]
    theirs = transformers.AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
    )
    theirs = getattr(theirs, "text_config", theirs)
    ours = config_from_hf(config)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or ours.head_dim)
    for mine, other in {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "max_position": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    }.items():
        assert getattr(ours, mine) == getattr(theirs, other), mine
    kinds = getattr(theirs, "layer_types", None)
    if kinds is not None:
        assert [window is not None for window in ours.windows] == [kind == "sliding_attention" for kind in kinds]
    if config["model_type"].startswith("gemma3"):
        assert ours.rope.theta == theirs.rope_parameters["full_attention"]["rope_theta"]
        assert ours.local_rope is not None
        assert ours.local_rope.theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    else:
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_llama() -> None:
    llama2 = config_from_hf(published.LLAMA_2_7B)
    assert (llama2.family, llama2.head_dim, llama2.num_kv_heads, llama2.dtype) == ("llama", 128, 32, "float16")
    assert llama2.rope == RopeConfig(theta=10_000.0)
    assert llama2.windows == (None,) * 32
    llama31 = config_from_hf(published.LLAMA_3_1_8B)
    assert llama31.rope == LLAMA3_ROPE
    assert (llama31.max_position, llama31.num_kv_heads, llama31.tie_embeddings) == (131072, 8, False)
    assert (llama31.bos_token_id, llama31.eos_token_ids) == (128000, (128001, 128008, 128009))
    smol = config_from_hf(published.SMOLLM2_135M)
    assert (smol.num_heads, smol.num_kv_heads, smol.head_dim, smol.tie_embeddings) == (9, 3, 64, True)
    assert smol.rope.theta == 100_000.0


def test_llama_without_kv_heads_is_multi_head() -> None:
    config = {key: value for key, value in published.LLAMA_2_7B.items() if key != "num_key_value_heads"}
    assert config_from_hf(config).num_kv_heads == 32


def test_llama_biases() -> None:
    config = config_from_hf({**published.LLAMA_2_7B, "attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_mistral_window() -> None:
    assert config_from_hf(published.MISTRAL_7B_V01).windows == (4096,) * 32
    assert config_from_hf(published.MISTRAL_7B_V03).windows == (None,) * 32
    without = {key: value for key, value in published.MISTRAL_7B_V01.items() if key != "sliding_window"}
    assert config_from_hf(without).windows == (4096,) * 32


def test_qwen() -> None:
    qwen2 = config_from_hf(published.QWEN2_5_7B)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.layer_windows) == (True, False, False, ())
    qwen3 = config_from_hf(published.QWEN3_8B)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim, qwen3.layer_windows) == (False, True, 128, ())


def test_mixtral() -> None:
    config = config_from_hf(published.MIXTRAL_8X7B)
    assert config.family == "mixtral" and config.windows == (None,) * 32 and config.rope.theta == 1e6
    assert config.experts is not None and config.sparse(0) and config.sparse(31)
    assert (config.experts.count, config.experts.chosen, config.experts.width) == (8, 2, 14336)
    assert config.experts.normalise
    assert checkpoint_shapes(config)["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)


def test_qwen3_moe() -> None:
    config = config_from_hf(published.QWEN3_30B_A3B)
    assert config.experts is not None and config.experts.normalise and config.qk_norm
    assert (config.num_experts, config.experts.chosen, config.experts.width) == (128, 8, 768)
    assert all(map(config.sparse, range(48)))
    assert checkpoint_shapes(config)["model.layers.0.mlp.experts.127.down_proj.weight"] == (2048, 768)
    newer = dict(published.QWEN3_30B_A3B)
    newer["num_local_experts"] = newer.pop("num_experts")  # as transformers 5 writes it
    assert config_from_hf(newer) == config
    some = config_from_hf({**published.QWEN3_30B_A3B, "mlp_only_layers": [1, 3], "decoder_sparse_step": 2})
    assert [i for i in range(8) if some.sparse(i)] == [5, 7]
    assert "model.layers.0.mlp.gate_proj.weight" in checkpoint_shapes(some)


def test_gpt_oss() -> None:
    config = config_from_hf(published.GPT_OSS_20B)
    assert config.experts is not None and config.sinks and config.qkv_bias and config.o_bias
    assert (config.num_experts, config.experts.chosen, config.experts.width, config.head_dim) == (32, 4, 2880, 64)
    assert config.windows == (128, None) * 12 and config.dtype == "bfloat16"
    assert (config.rope.scaling, config.rope.factor, config.rope.truncate) == ("yarn", 32.0, False)
    shapes = checkpoint_shapes(config)
    assert shapes["model.layers.23.self_attn.sinks"] == (64,)
    assert shapes["model.layers.0.mlp.router.bias"] == (32,)
    assert shapes["model.layers.0.mlp.experts.31.up_proj.bias"] == (2880,)
    little = ("layer_types", "rope_scaling", "rope_theta", "head_dim", "sliding_window")
    assert config_from_hf({k: v for k, v in published.GPT_OSS_20B.items() if k not in little}) == config


def test_deepseek_v3() -> None:
    config = config_from_hf(published.DEEPSEEK_V3)
    assert config.latent is not None and config.experts is not None
    assert (config.latent.width, config.head_dim, config.num_kv_heads, config.rope_dim) == (576, 576, 1, 64)
    assert [config.sparse(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    assert (config.num_experts, config.experts.groups, config.experts.groups_chosen) == (256, 8, 4)
    assert (config.experts.scale, config.experts.shared) == (2.5, 2048)
    assert config.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert config.max_position == 163840
    shapes = checkpoint_shapes(config)
    assert shapes["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.60.self_attn.kv_b_proj.weight"] == (128 * 256, 512)
    (pattern,) = config.unused_tensors
    assert re.search(pattern, "model.layers.61.enorm.weight") and not re.search(pattern, "model.layers.6.mlp.x")


def test_qwen_window_starts_at_max_window_layers() -> None:
    config = config_from_hf({**published.QWEN2_5_7B, "use_sliding_window": True, "max_window_layers": 21})
    assert config.windows == (None,) * 21 + (131072,) * 7
    everywhere_full = config_from_hf({**published.QWEN2_5_7B, "use_sliding_window": True})
    assert everywhere_full.layer_windows == ()


def test_qwen_yarn_extends_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_from_hf({**published.QWEN2_5_7B, "rope_scaling": scaling})
    assert config.rope == RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_position=32768)
    assert config.max_position == 131072


def test_gemma() -> None:
    small = config_from_hf(published.GEMMA_3_1B)
    assert small.windows[:7] == (512,) * 5 + (None, 512)
    assert small.windows.count(None) == 4
    assert (small.rope, small.local_rope) == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))
    assert (small.qk_norm, small.post_norms, small.norm_offset, small.tie_embeddings) == (True, True, 1.0, True)
    assert small.embedding_scale == math.sqrt(1152)
    assert small.scale == 1 / 16
    assert small.activation == "gelu_tanh"
    assert small.eos_token_ids == (1, 106)
    large = config_from_hf(published.GEMMA_3_4B)
    assert (large.num_heads, large.num_kv_heads, large.head_dim, large.vocab_size) == (8, 4, 256, 262208)
    assert large.rope == RopeConfig(theta=1e6, scaling="linear", factor=8.0)
    assert large.local_rope == RopeConfig(theta=1e4)
    assert (large.eos_token_ids, large.dtype, large.tie_embeddings) == ((1, 106), "bfloat16", True)
    assert large.windows.count(None) == 5


def test_generation_config_adds_end_tokens() -> None:
    config = config_from_hf(published.QWEN2_5_7B, {"eos_token_id": [151645, 151643]})
    assert config.eos_token_ids == (151645, 151643)


def test_model_type_is_enough() -> None:
    config = {key: value for key, value in published.QWEN3_8B.items() if key != "architectures"}
    assert config_from_hf(config).family == "qwen3"


LLAMA, QWEN, GEMMA = published.LLAMA_3_1_8B, published.QWEN2_5_7B, published.GEMMA_3_1B
LLAMA3_TABLE = LLAMA["rope_scaling"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "bert"}, "'bert' is not supported"),
        ({}, "neither architectures nor model_type"),
        ({**LLAMA, "architectures": "LlamaForCausalLM"}, "must be a list"),
        ({**LLAMA, "architectures": [{}]}, "not supported"),
        ({**LLAMA, "hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({**LLAMA, "hidden_size": None}, "hidden_size is missing"),
        ({**LLAMA, "hidden_size": "4096"}, "hidden_size is '4096'"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({**LLAMA, "hidden_size": 4100}, "not a multiple of 32 heads"),
        ({**LLAMA, "num_key_value_heads": 5}, "cannot share 5 KV heads"),
        ({**LLAMA, "head_dim": 63}, "63"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({**LLAMA, "vocab_size": -1}, "vocab_size is -1"),
        ({**LLAMA, "torch_dtype": "int8"}, "dtype 'int8'"),
        ({**LLAMA, "tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({**LLAMA, "eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "bits is missing"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts is 8: mixtures of experts are not supported for this"),
        (
            {**published.MIXTRAL_8X7B, "num_experts_per_tok": 9},
            "num_experts_per_tok is 9, but there are only 8 experts",
        ),
        ({**published.MIXTRAL_8X7B, "num_local_experts": 0}, "num_local_experts is 0"),
        (
            {**published.GPT_OSS_20B, "swiglu_limit": 10.0},
            "swiglu_limit is 10.0: the experts of gpt-oss are clamped at",
        ),
        ({**published.GPT_OSS_20B, "quantization_config": {"quant_method": "fp8"}}, "experts of gpt-oss are in MXFP4"),
        ({**published.DEEPSEEK_V3, "n_group": 7}, "n_group is 7, but 256 experts do not make groups"),
        ({**published.DEEPSEEK_V3, "topk_group": 9}, "topk_group is 9, but 8 experts do not fit 9 of 8"),
        (
            {**published.DEEPSEEK_V3, "architectures": ["DeepseekV2ForCausalLM"]},
            "scoring_func is 'sigmoid': DeepSeek-V2",
        ),
        ({**published.DEEPSEEK_V3, "scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({**published.DEEPSEEK_V3, "kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({**published.DEEPSEEK_V3, "quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes' is"),
        ({**published.QWEN3_30B_A3B, "mlp_only_layers": [48]}, "must list layers from 0 to 47"),
        ({**published.QWEN3_30B_A3B, "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({**LLAMA, "rope_interleaved": True}, "interleaved"),
        ({**LLAMA, "rope_theta": 0}, "rope_theta is 0"),
        ({**LLAMA, "rope_scaling": "linear"}, "expected a table"),
        ({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'.*yarn"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({**LLAMA, "rope_scaling": {**LLAMA3_TABLE, "low_freq_factor": None}}, "low_freq_factor is missing"),
        ({**LLAMA, "rope_scaling": {**LLAMA3_TABLE, "high_freq_factor": 1.0}}, "must be larger"),
        (
            {**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling": None},
            "partial",
        ),
        ({**published.MISTRAL_7B_V01, "sliding_window": -1}, "sliding_window is -1"),
        ({**published.MISTRAL_7B_V01, "attention_bias": True}, "attention_bias"),
        ({**QWEN, "use_mrope": True}, "multimodal"),
        ({**QWEN, "layer_types": ["full_attention"]}, "must list 28 layers"),
        ({**QWEN, "layer_types": ["sliding_attention"] * 28}, "no sliding_window"),
        ({**QWEN, "layer_types": ["linear_attention"] * 28}, "'linear_attention'"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({**GEMMA, "use_bidirectional_attention": True}, "causal"),
        ({**GEMMA, "hidden_activation": "tanh"}, "hidden_activation 'tanh'"),
        ({**GEMMA, "rope_parameters": {"rope_type": "default"}}, "one table per layer type"),
        ({**published.GEMMA_3_4B, "text_config": []}, "text_config"),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as error:
        config_from_hf(config)
    assert "\n" not in str(error.value)
