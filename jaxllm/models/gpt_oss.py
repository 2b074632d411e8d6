"""gpt-oss (arXiv 2508.10925): attention sinks, a window in every other layer, biases, experts in MXFP4 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.kernels.linear.reference import ALPHA, LIMIT
from jaxllm.models import hf
from jaxllm.models.config import ExpertNames, ExpertsConfig, ModelConfig
from jaxllm.models.fields import Fields

NAMES = ExpertNames(router="router", interleaved=True)
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def from_hf(fields: Fields) -> ModelConfig:
    quantised = fields.get("quantization_config", {})
    if not isinstance(quantised, Mapping) or quantised.get("quant_method", "mxfp4") != "mxfp4":
        raise fields.error(f"quantization_config is {quantised!r}: experts of gpt-oss are in MXFP4 or not quantised")
    absent: dict[str, Any] = {"rope_theta": 150_000.0, "head_dim": 64, "sliding_window": 128}
    if fields.get("dtype", fields.get("torch_dtype")) is None:
        absent["dtype"] = "bfloat16"
    if fields.get("rope_scaling") is None and fields.get("rope_parameters") is None:
        absent["rope_scaling"] = YARN
    values = {key: value for key, value in fields.values.items() if key != "quantization_config"}
    fields = Fields(values, fields.where, {**absent, **fields.defaults})
    fields.refuse("swiglu_limit", LIMIT, why=f"the experts of gpt-oss are clamped at {LIMIT}")
    fields.refuse("swiglu_alpha", ALPHA, why=f"the gates of gpt-oss have a slope of {ALPHA}")
    num_layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window")
    windows = hf.layer_windows(fields, num_layers, window)
    if windows is None:
        windows = tuple(None if layer % 2 else window for layer in range(num_layers))
    count, bias = fields.integer("num_local_experts", 128), fields.flag("attention_bias", True)
    config = hf.base_config(
        fields,
        "gpt_oss",
        layer_windows=hf.uniform_windows(windows),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        experts=ExpertsConfig(
            count=count,
            chosen=hf.chosen_experts(fields, count, 4),
            width=fields.integer("intermediate_size"),
            router_bias=True,
            biases=True,
            names=NAMES,
        ),
    )
    return replace(config, activation="swiglu_clamped")
