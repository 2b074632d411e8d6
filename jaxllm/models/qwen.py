"""Qwen2 and Qwen2.5 (biases on Q, K and V) and Qwen3 (RMS norms on Q and K, https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from jaxllm.models import gguf, hf
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields

QWEN3_HEAD_DIM = 128


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """With `use_sliding_window`, layers from `max_window_layers` on have the window, those before it do not."""
    num_layers = fields.integer("num_hidden_layers")
    used = fields.flag("use_sliding_window", False)
    # Qwen2's default of 4096 applies to an absent key, not to an explicit null
    absent = "sliding_window" not in fields.values
    window = (4096 if absent else fields.optional_integer("sliding_window")) if used else None
    windows = hf.layer_windows(fields, num_layers, window)
    if windows is None:
        first = fields.integer("max_window_layers", 28, low=0)
        windows = tuple(window if layer >= first else None for layer in range(num_layers))
    return hf.uniform_windows(windows)


def qwen2_from_hf(fields: Fields) -> ModelConfig:
    return hf.base_config(fields, "qwen2", qkv_bias=True, layer_windows=_windows(fields))


def qwen3_from_hf(fields: Fields) -> ModelConfig:
    fields.defaults = {**fields.defaults, "head_dim": QWEN3_HEAD_DIM}
    bias = fields.flag("attention_bias", False)
    return hf.base_config(fields, "qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, layer_windows=_windows(fields))


def qwen2_from_gguf(fields: gguf.GGUFFields) -> ModelConfig:
    fields.refuse("attention.sliding_window", 0, why="sliding windows are not supported in Qwen GGUF files")
    return gguf.base_config(fields, "qwen2", qkv_bias=True)


def qwen3_from_gguf(fields: gguf.GGUFFields) -> ModelConfig:
    fields.refuse("attention.sliding_window", 0, why="sliding windows are not supported in Qwen GGUF files")
    bias = fields.has("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias")
    return gguf.base_config(fields, "qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True)
