"""Mistral: a Llama whose layers may all have a sliding window (https://arxiv.org/abs/2310.06825)."""

from __future__ import annotations

from jaxllm.models import hf
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields


def from_hf(fields: Fields) -> ModelConfig:
    num_layers = fields.integer("num_hidden_layers")
    # Only an explicit null switches the window off: the architecture's default is a window of 4096 tokens.
    absent = "sliding_window" not in fields.values
    window = 4096 if absent else fields.optional_integer("sliding_window")
    windows = hf.layer_windows(fields, num_layers, window)
    if windows is None:
        windows = (window,) * num_layers
    fields.refuse("attention_bias", False, why="Mistral models have no attention biases")
    return hf.base_config(fields, "mistral", layer_windows=hf.uniform_windows(windows))
