"""Gated feed-forward layer: `down(act(gate(x)) * up(x))`, gate and up fused into one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.parallel.collectives import Axes, gather_rows

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class GatedMLP(nnx.Module):
    def __init__(self, gate_up: ColumnLinear, down: RowLinear, activation: str):
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(self, x_TD: jax.Array, tokens: Axes = ()) -> jax.Array:
        """tokens: the ranks whose rows are brought together before the product; each gets its own back."""
        gate_TF, up_TF = jnp.split(self.gate_up(gather_rows(x_TD, tokens)), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate_TF) * up_TF, tokens)
