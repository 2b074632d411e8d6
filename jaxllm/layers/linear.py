"""Matrix products with weights kept as checkpoints keep them, `[out, in]`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.kernels.linear import api
from jaxllm.parallel.collectives import Axes, sum_partial
from jaxllm.parallel.params import ParamSpec


def param(spec: ParamSpec) -> nnx.Param:
    """A parameter of the shape that `spec` declares. Modules are built under `nnx.eval_shape`: no memory is used."""
    return nnx.Param(jnp.zeros(spec.shape, spec.dtype), spec=spec)


def matmul(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """`x[..., D] @ weight.T`, accumulated in float32 and returned in x's dtype."""
    return api.matmul(x, weight_FD).astype(x.dtype)


class ColumnLinear(nnx.Module):
    """Output features split over ranks: no communication."""

    def __init__(self, weight: ParamSpec, bias: ParamSpec | None = None):
        self.weight = param(weight)
        self.bias = None if bias is None else param(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class RowLinear(nnx.Module):
    """Input features split over `axes`: partial sums are added up by one all-reduce."""

    def __init__(self, weight: ParamSpec, bias: ParamSpec | None = None, *, axes: Axes):
        self.weight = param(weight)
        self.bias = None if bias is None else param(bias)
        self.axes = axes

    def __call__(self, x: jax.Array, tokens: Axes = ()) -> jax.Array:
        """tokens: where the rows are those of several ranks, and each wants its own back, it is a reduce-scatter."""
        y = sum_partial(matmul(x, self.weight[...]), self.axes, tokens)
        return y if self.bias is None else y + self.bias[...]
