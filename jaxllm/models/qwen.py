"""Qwen2 and Qwen2.5 (biases on Q, K and V), Qwen3 (RMS norms on Q and K) and Qwen3-MoE (with experts besides).

https://arxiv.org/abs/2412.15115, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.models import gguf, hf
from jaxllm.models.config import ExpertsConfig, ModelConfig
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


def qwen3_moe_from_hf(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    num_layers = fields.integer("num_hidden_layers")
    # A window is every layer's here, unlike in the dense models.
    window = fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    windows = hf.layer_windows(fields, num_layers, window) or (window,) * num_layers
    # transformers 5 writes the number of experts under the name that Mixtral has for it.
    count = fields.integer("num_experts", fields.get("num_local_experts", 128))
    return hf.base_config(
        fields,
        "qwen3_moe",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        layer_windows=hf.uniform_windows(windows),
        experts=ExpertsConfig(
            count=count,
            chosen=hf.chosen_experts(fields, count, 8),
            width=fields.integer("moe_intermediate_size", 768),
            normalise=fields.flag("norm_topk_prob", False),
        ),
        sparse_layers=_sparse_layers(fields),
    )


def _sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for those of `mlp_only_layers`; empty when all have."""
    num_layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, Sequence) or not all(isinstance(i, int) and 0 <= i < num_layers for i in dense):
        raise fields.error(f"mlp_only_layers is {dense!r}, it must list layers from 0 to {num_layers - 1}")
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    return () if all(sparse) else sparse


def qwen2_from_gguf(fields: gguf.GGUFFields) -> ModelConfig:
    fields.refuse("attention.sliding_window", 0, why="sliding windows are not supported in Qwen GGUF files")
    return gguf.base_config(fields, "qwen2", qkv_bias=True)


def qwen3_from_gguf(fields: gguf.GGUFFields) -> ModelConfig:
    fields.refuse("attention.sliding_window", 0, why="sliding windows are not supported in Qwen GGUF files")
    bias = fields.has("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias")
    return gguf.base_config(fields, "qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True)
