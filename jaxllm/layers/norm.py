"""Root-mean-square normalisation (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.kernels.linear.product import Activations
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.layers.quantize import param
from jaxllm.layers.stream import Stream, settle
from jaxllm.parallel.params import ParamSpec


class RMSNorm(nnx.Module):
    """Normalises the last axis in float32; the weight is float32 whatever the model's dtype."""

    def __init__(self, weight: ParamSpec, eps: float):
        self.weight = param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, (self.weight[...], self.eps))

    def settle(
        self, x: Stream, *, quantised: bool = False, blocked: int = 0, scaled: bool = False
    ) -> tuple[jax.Array, Activations, RMSNorm | None]:
        """x, summed; what to go on with; and the norm of that, which is this one unless it was made with the sum.

        quantised: what to go on with may be e4m3. blocked: it may be `BlockedTokens` of so many rows (0: not). scaled:
        it may be `ScaledTokens`.
        """
        norm = (self.weight[...], self.eps)
        x_TD, normed_TD = settle(x, norm, quantised=quantised, blocked=blocked, scaled=scaled)
        return (x_TD, x_TD, self) if normed_TD is None else (x_TD, normed_TD, None)
