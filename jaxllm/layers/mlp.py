"""Gated feed-forward layer: `down(act(gate(x)) * up(x))`, gate and up fused into one product."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.norm import RMSNorm
from jaxllm.parallel.collectives import Axes, Stream


class GatedMLP(nnx.Module):
    def __init__(self, gate_up: ColumnLinear, down: RowLinear, activation: str):
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def partial(self, x_TD: jax.Array) -> jax.Array:
        """This rank's part of the layer on x, to be added up over the ranks that the columns are split over."""
        return self.down.partial(self.gate_up(x_TD, activation=self.activation))

    def __call__(
        self, x_TD: jax.Array, norm: RMSNorm | None, tokens: Axes = (), residual: jax.Array | None = None
    ) -> Stream:
        """The layer on what `norm` makes of x, added to the residual.

        tokens: the ranks whose rows are brought together before the product; each gets its own back.
        """
        y_TF = self.gate_up(x_TD, norm, tokens, activation=self.activation)
        return self.down(y_TF, tokens, residual=residual)
