"""Matrix products with weights kept as checkpoints keep them, `[out, in]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx

from jaxllm.kernels.linear import api
from jaxllm.layers.quantize import Declared, param
from jaxllm.parallel.collectives import Axes, Stream, gather_rows, ranks, sum_later, sum_partial

if TYPE_CHECKING:
    from jaxllm.layers.norm import RMSNorm


class ColumnLinear(nnx.Module):
    """Output features split over ranks: no communication, but for rows that are."""

    def __init__(self, weight: Declared, bias: Declared | None = None):
        self.weight = param(weight)
        assert not isinstance(bias, dict)
        self.bias = None if bias is None else param(bias)

    def __call__(
        self, x_TD: jax.Array, norm: RMSNorm | None = None, tokens: Axes = (), *, activation: str | None = None
    ) -> jax.Array:
        """The product with x, which `norm` norms first; with an activation, act(first half) * second half of it.

        tokens: the ranks whose rows are brought together for the product.
        """
        if ranks(tokens) > 1:
            x_TD, norm = gather_rows(x_TD if norm is None else norm(x_TD), tokens), None
        return api.linear(
            x_TD,
            self.weight[...],
            norm=None if norm is None else (norm.weight[...], norm.eps),
            bias_F=None if self.bias is None else self.bias[...],
            activation=activation,
        )


class RowLinear(nnx.Module):
    """Input features split over `axes`: partial sums are added up by one all-reduce."""

    def __init__(self, weight: Declared, bias: Declared | None = None, *, axes: Axes):
        self.weight = param(weight)
        assert not isinstance(bias, dict)
        self.bias = None if bias is None else param(bias)
        self.axes = axes

    def partial(self, x_TD: jax.Array) -> jax.Array:
        """This rank's part of the sum, without the bias."""
        return api.linear(x_TD, self.weight[...])

    def __call__(self, x_TD: jax.Array, tokens: Axes = (), *, residual: jax.Array | None = None) -> Stream:
        """The product with x, added to the residual; then the last sum may be left to `settle`.

        tokens: where the rows are those of several ranks, and each wants its own back, it is a reduce-scatter.
        """
        bias = None if self.bias is None else self.bias[...]
        if ranks((*self.axes, *tokens)) == 1:
            return api.linear(x_TD, self.weight[...], bias_F=bias, residual=residual)
        if bias is None:
            part_TD = self.partial(x_TD)
            if residual is not None:
                return sum_later(part_TD, self.axes, tokens, residual)
            return sum_partial(part_TD, self.axes, tokens)
        y = sum_partial(self.partial(x_TD), self.axes, tokens) + bias
        return y if residual is None else residual + y
