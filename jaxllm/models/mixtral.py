"""Mixtral: a Mistral with a mixture of experts in every layer (https://arxiv.org/abs/2401.04088)."""

from __future__ import annotations

from jaxllm.models import hf
from jaxllm.models.config import ExpertNames, ExpertsConfig, ModelConfig
from jaxllm.models.fields import Fields

NAMES = ExpertNames(module="block_sparse_moe", gate="w1", up="w3", down="w2")


def from_hf(fields: Fields) -> ModelConfig:
    num_layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window")
    windows = hf.layer_windows(fields, num_layers, window)
    if windows is None:
        windows = (window,) * num_layers
    fields.refuse("attention_bias", False, why="Mixtral models have no attention biases")
    return hf.base_config(
        fields,
        "mixtral",
        layer_windows=hf.uniform_windows(windows),
        experts=ExpertsConfig(
            count=fields.integer("num_local_experts", 8),
            chosen=hf.chosen_experts(fields, fields.integer("num_local_experts", 8), 2),
            width=fields.integer("intermediate_size"),
            names=NAMES,
        ),
    )
