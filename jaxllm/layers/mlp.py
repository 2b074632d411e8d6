"""Gated feed-forward layer: `down(act(gate(x)) * up(x))`, gate and up fused into one product."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.kernels.linear.product import Activations
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.stream import Stream
from jaxllm.parallel.collectives import Axes, ranks


class GatedMLP(nnx.Module):
    def __init__(self, gate_up: ColumnLinear, down: RowLinear, activation: str):
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def partial(self, x_TD: jax.Array) -> jax.Array:
        """This rank's part of the layer on x, to be added up over the ranks that the columns are split over."""
        return self.down.partial(self._gated(x_TD, None, ()))

    def __call__(
        self, x_TD: Activations, norm: RMSNorm | None, tokens: Axes = (), residual: jax.Array | None = None
    ) -> Stream:
        """The layer on what `norm` makes of x, added to the residual.

        tokens: the ranks whose rows are brought together before the product; each gets its own back.
        """
        return self.down(self._gated(x_TD, norm, tokens), tokens, residual=residual)

    def _gated(self, x_TD: Activations, norm: RMSNorm | None, tokens: Axes) -> Activations:
        quantised = self.down.multiplies_e4m3(x_TD.shape[0] * ranks(tokens), x_TD.dtype)
        return self.gate_up.gated(x_TD, self.activation, norm, tokens, quantised=quantised)
