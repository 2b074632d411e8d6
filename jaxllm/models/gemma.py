"""Gemma 3, the text model: five sliding-window layers to each full one, norms around every block, scaled embeddings.

https://arxiv.org/abs/2503.19786. The sliding layers rotate with a base of their own; only the full ones have their
frequencies scaled. Hugging Face multiplies the embeddings by sqrt(hidden_size) rounded to the dtype of the weights, so
the decoder must round `embedding_scale` in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from jaxllm.layers.rope import RopeConfig
from jaxllm.models import gguf, hf
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields

GLOBAL_THETA = 1_000_000.0
LOCAL_THETA = 10_000.0
WINDOW_PATTERN = 6
"""Every sixth layer sees everything."""

# Published configs of the multimodal sizes leave out whatever equals the architecture's default.
HF_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": WINDOW_PATTERN,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def _pattern(num_layers: int, window: int, period: int) -> tuple[int | None, ...]:
    return tuple(window if (layer + 1) % period else None for layer in range(num_layers))


def from_hf(fields: Fields) -> ModelConfig:
    """Reads the text model's settings; for the multimodal checkpoints these are the nested `text_config`."""
    fields.defaults = {**HF_DEFAULTS, **fields.defaults}
    fields.refuse("use_bidirectional_attention", False, why="only causal attention is supported")
    fields.refuse("attn_logit_softcapping", 0, why="soft-capped attention is not supported")
    num_layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window")
    windows = hf.layer_windows(fields, num_layers, window)
    if windows is None:
        windows = _pattern(num_layers, window, fields.integer("sliding_window_pattern"))
    rope, local_rope = _ropes(fields)
    bias = fields.flag("attention_bias", False)
    return hf.base_config(
        fields,
        "gemma3",
        activation_key="hidden_activation",
        rope=rope,
        local_rope=local_rope,
        layer_windows=hf.uniform_windows(windows),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=math.sqrt(fields.integer("hidden_size")),
        post_norms=True,
        norm_offset=1.0,
    )


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """The rope of the full layers and that of the sliding ones."""
    max_position = fields.integer("max_position_embeddings")
    parameters = fields.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or set(parameters) - {"full_attention", "sliding_attention"}:
        raise fields.error(f"rope_parameters is {parameters!r}, Gemma 3 keeps one table per layer type")
    full, local = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
    scaling = fields.get("rope_scaling") or {}
    for table in (full, local, scaling):
        if not isinstance(table, Mapping):
            raise fields.error(f"the rope settings {table!r} must be a table")
    full = {**full, **scaling}
    return (
        hf.rope_from_hf(fields, full, fields.number("rope_theta", GLOBAL_THETA), max_position),
        hf.rope_from_hf(fields, local, fields.number("rope_local_base_freq", LOCAL_THETA), max_position),
    )


def from_gguf(fields: gguf.GGUFFields) -> ModelConfig:
    num_layers = fields.integer("block_count")
    hidden = fields.integer("embedding_length")
    period = fields.scalar("attention.sliding_window_pattern", WINDOW_PATTERN)
    scale = fields.optional_number("attention.scale")
    if scale is None and num_layers == 62:
        # the 27B model alone scales by the width per head; llama.cpp knows it by its number of layers
        scale = (hidden / fields.scalar("attention.head_count")) ** -0.5
    config = gguf.base_config(
        fields,
        "gemma3",
        local_rope=RopeConfig(theta=fields.number("rope.freq_base_swa", LOCAL_THETA)),
        layer_windows=_pattern(num_layers, fields.integer("attention.sliding_window"), period),
        qk_norm=True,
        activation="gelu_tanh",
        attention_scale=scale,
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=math.sqrt(hidden),
        post_norms=True,
        norm_offset=1.0,
    )
    if fields.get("rope.freq_base") is None:
        return replace(config, rope=replace(config.rope, theta=GLOBAL_THETA))
    return config
