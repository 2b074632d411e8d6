"""Reading GGUF metadata: what all families have in common.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, prefixed with the architecture. Three
things are not in the metadata but in the tensors: whether the embeddings are tied, whether projections have biases, and
Llama 3.1's rope scaling, which llama.cpp stores as a divisor per frequency in `rope_freqs.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.layers.rope import RopeConfig
from jaxllm.models.config import ModelConfig
from jaxllm.models.fields import Fields, check_heads

FILE_TYPES = {0: "float32", 1: "float16"}
"""`general.file_type` of unquantised files; everything else counts as bfloat16."""


class GGUFFields(Fields):
    """Metadata seen with keys relative to the architecture, and the names of the tensors in the file."""

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tensors: Collection[str] | None = None,
        rope_factors: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        arch = str(metadata.get("general.architecture"))
        relative = {key.removeprefix(f"{arch}."): value for key, value in metadata.items()}
        super().__init__(relative, f"GGUF metadata of architecture {arch!r}")
        self.tensors = None if tensors is None else frozenset(tensors)
        self.rope_factors = rope_factors

    def scalar(self, key: str, default: int | None = None) -> int:
        """An integer that some files store once per layer; all layers must then agree."""
        value = self.get(key, default)
        if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
            if len(set(map(int, value))) != 1:
                raise self.error(f"{key} differs between layers ({list(value)[:8]}...), which is not supported")
            return int(value[0])
        return self.integer(key, default)

    def has(self, *names: str) -> bool:
        """Whether any of these tensors is in the file (llama.cpp's or Hugging Face's names); False when unknown."""
        return self.tensors is not None and any(name in self.tensors for name in names)


def rope_from_gguf(fields: GGUFFields, head_dim: int) -> RopeConfig:
    """The rope of the file's full-attention layers.

    Raises:
        ModelConfigError: an unknown scaling, partial rotation, or frequency divisors that are not Llama 3's.
    """
    theta = fields.number("rope.freq_base", 10_000.0)
    dimensions = fields.integer("rope.dimension_count", head_dim)
    if dimensions != head_dim:
        raise fields.error(f"rope.dimension_count {dimensions} of {head_dim}: partial rotary is not supported")
    if fields.rope_factors is not None:
        return _llama3_rope(fields, theta, np.asarray(fields.rope_factors, np.float64))
    if fields.has("rope_freqs.weight"):
        raise fields.error("the file has rope_freqs.weight: its values are needed to know the rope scaling")
    kind = fields.get("rope.scaling.type", "linear" if fields.get("rope.scale_linear") else "none")
    if kind == "none":
        return RopeConfig(theta=theta)
    factor = fields.number("rope.scaling.factor", fields.get("rope.scale_linear", 1.0))
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear" if factor != 1 else "none", factor=factor)
    if kind == "yarn":
        fields.refuse("rope.scaling.yarn_log_multiplier", 0, why="this yarn variant is not supported")
        attention_factor = fields.optional_number("rope.scaling.attn_factor")
        if attention_factor is not None:  # llama.cpp multiplies it with yarn's own factor
            attention_factor *= 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_max_position=fields.integer(
                "rope.scaling.original_context_length", fields.integer("context_length")
            ),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=attention_factor,
        )
    raise fields.error(f"rope.scaling.type {kind!r} is not supported, the supported ones are none, linear and yarn")


def _llama3_rope(fields: GGUFFields, theta: float, divisors: np.ndarray) -> RopeConfig:
    """The published Llama 3.x parameters whose divisors are these (they differ in the factor only)."""
    rope = RopeConfig(theta=theta, scaling="llama3", factor=float(divisors.max()), original_max_position=8192)
    if rope.factor == 1:
        return RopeConfig(theta=theta)
    wavelength = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((rope.original_max_position / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / rope.factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise fields.error("rope_freqs.weight does not hold Llama 3's rope scaling, other tables are not supported")
    return rope


def base_config(fields: GGUFFields, family: str, **extra: Any) -> ModelConfig:
    """What every family reads the same way; `extra` are the fields of `ModelConfig` that the family decides."""
    for key in ("expert_count", "attention.max_alibi_bias", "attention.clamp_kqv", "attn_logit_softcapping"):
        fields.refuse(key, 0, why="not supported")
    num_heads = fields.scalar("attention.head_count")
    num_kv_heads = fields.scalar("attention.head_count_kv", num_heads)
    hidden = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.key_length and attention.value_length differ, which is not supported")
    check_heads(fields, num_heads, num_kv_heads, head_dim)
    tokens = fields.get("tokenizer.ggml.tokens")
    stops = [fields.token_ids(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    rope = rope_from_gguf(fields, head_dim)
    max_position = fields.integer("context_length")
    if rope.scaling == "yarn":
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size", None if tokens is None else len(tokens)),
        hidden_size=hidden,
        intermediate_size=fields.scalar("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        # a file without an output matrix uses the embeddings
        tie_embeddings=not fields.has("output.weight", "lm_head.weight"),
        dtype=FILE_TYPES.get(fields.integer("general.file_type", 32, low=0), "bfloat16"),
        bos_token_id=next(iter(fields.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=tuple(dict.fromkeys(i for ids in stops for i in ids)),
        **extra,
    )
