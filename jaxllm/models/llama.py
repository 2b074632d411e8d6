"""Llama 1 to 3.x, TinyLlama, SmolLM2 and every other model that calls itself a Llama."""

from __future__ import annotations

from jaxllm.models import gguf, hf
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields


def from_hf(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    return hf.base_config(fields, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def from_gguf(fields: gguf.GGUFFields) -> ModelConfig:
    # llama.cpp files Mistral under llama as well, without any mark of its window
    window = fields.optional_integer("attention.sliding_window")
    num_layers = fields.integer("block_count")
    return gguf.base_config(
        fields,
        "llama",
        layer_windows=(window,) * num_layers if window else (),
        qkv_bias=fields.has("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
        o_bias=fields.has("blk.0.attn_output.bias", "model.layers.0.self_attn.o_proj.bias"),
        mlp_bias=fields.has("blk.0.ffn_gate.bias", "model.layers.0.mlp.gate_proj.bias"),
    )
