"""Root-mean-square normalisation (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.linear import param
from jaxllm.parallel.params import ParamSpec


class RMSNorm(nnx.Module):
    """Normalises the last axis in float32; the weight is float32 whatever the model's dtype."""

    def __init__(self, weight: ParamSpec, eps: float):
        self.weight = param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...]).astype(x.dtype)
