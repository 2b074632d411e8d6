"""Rotary position embedding with the context extensions of the supported families.

Rotates the two halves of a head against each other, as Hugging Face checkpoints are laid out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base and, for extended contexts, how the frequencies are scaled.

    `scaling` is one of `none`, `linear`, `llama3` (Llama 3.1), `yarn` (https://arxiv.org/abs/2309.00071).
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies, float32 [head_dim / 2] in radians per position, and the factor on cos and sin."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    match rope.scaling:
        case "none":
            return inverse.astype(np.float32), 1.0
        case "linear":
            return (inverse / rope.factor).astype(np.float32), 1.0
        case "llama3":
            return _llama3(rope, inverse), 1.0
        case "yarn":
            return _yarn(rope, inverse, head_dim), _yarn_attention_factor(rope)
    raise ValueError(f"unknown rope scaling {rope.scaling!r}: expected none, linear, llama3 or yarn")


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inverse
    turns = rope.original_max_position / wavelength
    blend = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1 - blend) * inverse / rope.factor + blend * inverse).astype(np.float32)


def _yarn(rope: RopeConfig, inverse: np.ndarray, head_dim: int) -> np.ndarray:
    def dimension(turns: float) -> float:
        """The dimension whose wavelength makes `turns` rotations over the original context."""
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return (inverse / rope.factor * ramp + inverse * (1 - ramp)).astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def cos_sin(rope: RopeConfig, head_dim: int, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position, float32 [T, 1, head_dim / 2]; computed once a step and shared by all layers."""
    inverse, factor = frequencies(rope, head_dim)
    angle = positions_T.astype(jnp.float32)[:, None, None] * inverse
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor
