"""Reading a Hugging Face `config.json`: what all families have in common.

Two dialects are understood. Up to transformers 4, `rope_theta` and `rope_scaling` stand side by side; transformers 5
writes one `rope_parameters`, and `dtype` instead of `torch_dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxllm.layers.rope import RopeConfig
from jaxllm.models import quantization
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields, check_heads

Activation = Literal["silu", "gelu_tanh", "gelu"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

DTYPES = ("float32", "bfloat16", "float16")

# Settings that a checkpoint of a supported architecture may carry and that would change its arithmetic.
UNSUPPORTED = {
    "no_rope_layers": "layers without rotary embeddings are not supported",
    "attention_chunk_size": "chunked attention is not supported",
    "rope_interleaved": "interleaved rotary embeddings are not supported",
    "use_mrope": "multimodal rotary embeddings are not supported",
    "alibi": "ALiBi is not supported, only rotary embeddings are",
    "embedding_multiplier": "scaled embeddings are not supported for this architecture",
    "residual_multiplier": "scaled residuals are not supported",
    "logits_scaling": "scaled logits are not supported",
    "attention_multiplier": "a custom attention scale is not supported for this architecture",
}


def rope_from_hf(fields: Fields, parameters: Mapping[str, Any], theta: float, max_position: int) -> RopeConfig:
    """One rope from a `rope_parameters` or `rope_scaling` table; `theta` is used where the table has none.

    Raises:
        ModelConfigError: an unknown rope type, partial rotation, or a scaling whose numbers are missing or senseless.
    """
    rope = Fields(parameters, f"{fields.where} rope")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.number("rope_theta", theta)
    rope.refuse("partial_rotary_factor", 1, why="partial rotary embeddings are not supported")
    original = rope.get("original_max_position_embeddings", fields.get("original_max_position_embeddings"))
    rope.defaults = {"original_max_position_embeddings": max_position if original is None else original}
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=_factor(rope))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error(f"high_freq_factor {high} must be larger than low_freq_factor {low}")
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=_factor(rope),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=rope.integer("original_max_position_embeddings"),
        )
    if kind == "yarn":
        original_max = rope.integer("original_max_position_embeddings")
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            factor=_factor(rope, max_position / original_max),
            original_max_position=original_max,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.optional_number("attention_factor"),
            # zero means absent here, as in transformers
            mscale=rope.optional_number("mscale") if rope.get("mscale") else None,
            mscale_all_dim=rope.optional_number("mscale_all_dim") if rope.get("mscale_all_dim") else None,
            truncate=rope.flag("truncate", True),
        )
    raise rope.error(f"rope_type {kind!r} is not supported, the supported ones are default, linear, llama3 and yarn")


def _factor(rope: Fields, default: float | None = None) -> float:
    factor = rope.number("factor", default)
    if factor < 1:
        raise rope.error(f"factor is {factor}, it must be at least 1")
    return factor


def common_rope(fields: Fields, max_position: int) -> RopeConfig:
    """The single rope of a model whose layers all use the same one."""
    parameters = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values()):
        nested = [value for value in parameters.values() if isinstance(value, Mapping)]
        if any(value != nested[0] for value in nested):
            raise fields.error("rope_parameters differ between layer types, which this architecture does not support")
        parameters = nested[0]
    fields.refuse("partial_rotary_factor", 1, why="partial rotary embeddings are not supported")
    return rope_from_hf(fields, parameters, fields.number("rope_theta", 10_000.0), max_position)


def layer_windows(fields: Fields, num_layers: int, window: int | None) -> tuple[int | None, ...] | None:
    """Window per layer as `layer_types` lists them, or None when the config has no such list."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, Sequence) or len(kinds) != num_layers:
        raise fields.error(f"layer_types must list {num_layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error(f"layer_types has {kind!r}, only full_attention and sliding_attention are supported")
        if kind == "sliding_attention" and window is None:
            raise fields.error("layer_types has sliding_attention but no sliding_window is set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def uniform_windows(windows: tuple[int | None, ...] | None) -> tuple[int | None, ...]:
    """The empty tuple, which means full attention everywhere, when no layer has a window."""
    return windows if windows and any(windows) else ()


def chosen_experts(fields: Fields, count: int, default: int) -> int:
    """How many of `count` experts a token gets."""
    chosen = fields.integer("num_experts_per_tok", default)
    if chosen > count:
        raise fields.error(f"num_experts_per_tok is {chosen}, but there are only {count} experts")
    return chosen


def base_config(fields: Fields, family: str, *, activation_key: str = "hidden_act", **extra: Any) -> ModelConfig:
    """What every family reads the same way; `extra` are the fields of `ModelConfig` that the family decides."""
    for key, why in UNSUPPORTED.items():
        fields.refuse(key, False, 0, [], {}, why=why)
    if "experts" not in extra:
        for key in ("num_local_experts", "num_experts"):
            fields.refuse(key, 0, why="mixtures of experts are not supported for this architecture")
    num_heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    if fields.get("head_dim") is None and hidden % num_heads:
        raise fields.error(f"hidden_size {hidden} is not a multiple of {num_heads} heads and head_dim is missing")
    head_dim = fields.integer("head_dim", hidden // num_heads)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    check_heads(fields, num_heads, num_kv_heads, head_dim)
    act = fields.get(activation_key, "silu")
    if act not in ACTIVATIONS:
        raise fields.error(
            f"{activation_key} {act!r} is not supported, the supported ones are {', '.join(ACTIVATIONS)}"
        )
    max_position = fields.integer("max_position_embeddings")
    rope = extra.pop("rope", None) or common_rope(fields, max_position)
    if rope.scaling == "yarn":
        # Qwen2.5 and Qwen3 leave max_position_embeddings at the length that the scaling starts from
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        activation=ACTIVATIONS[act],
        dtype=_dtype(fields),
        quantization=quantization.from_hf(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
        **extra,
    )


def _dtype(fields: Fields) -> str:
    name = str(fields.get("dtype", fields.get("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in DTYPES:
        raise fields.error(f"dtype {name!r} is not supported, the supported ones are {', '.join(DTYPES)}")
    return name
