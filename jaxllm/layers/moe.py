"""Mixture of experts: a router gives each token a few gated MLPs, whose results are added up by its weights.

https://arxiv.org/abs/2401.04088. The experts are on the ranks of `ep`, the columns of each over those of `tp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.kernels.grouped_matmul import api
from jaxllm.kernels.linear.api import matmul
from jaxllm.layers.linear import param
from jaxllm.layers.norm import RMSNorm
from jaxllm.parallel.collectives import Axes
from jaxllm.parallel.expert import choose_method, experts
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec


class MoE(nnx.Module):
    """In place of a `GatedMLP`; gate_up [E, 2 * F, D] and down [E, D, F] are the experts'."""

    def __init__(
        self,
        router: ParamSpec,
        gate_up: ParamSpec,
        down: ParamSpec,
        layout: Layout,
        *,
        chosen: int,
        normalise: bool,
        activation: str,
    ):
        self.router = param(router)
        self.gate_up = param(gate_up)
        self.down = param(down)
        self.layout = layout
        self.chosen = chosen
        self.normalise = normalise
        self.activation = activation

    def __call__(
        self, x_TD: jax.Array, norm: RMSNorm, tokens: Axes = (), residual: jax.Array | None = None
    ) -> jax.Array:
        """The layer on what `norm` makes of x, added to the residual; its rows are split over `tokens`."""
        y_TD = norm(x_TD)
        num_experts, ep = self.router.shape[0], self.layout.size("experts")
        method = self.layout.expert_method or choose_method(ep, self.chosen, x_TD.shape[0], bool(tokens))

        def routed(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.named_scope("router"):
                return route(x_TD, self.router[...], self.chosen, self.normalise)

        def compute(x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array) -> jax.Array:
            weights = self.gate_up[...], self.down[...]
            return api.experts(x_TD, chosen_TX, weights_TX, *weights, activation=self.activation, of=num_experts)

        with jax.named_scope("experts"):
            y_TD = experts(
                y_TD,
                routed,
                compute,
                num_experts=num_experts,
                axes=(*self.layout.axes("experts"), *self.layout.axes("expert_ffn")),
                tokens=tokens,
                method=method,
            )
        return y_TD if residual is None else residual + y_TD


def route(x_TD: jax.Array, router_ED: jax.Array, chosen: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """The likeliest experts of each token, int32 [T, X], and their weights, float32: a softmax over all of them.

    Ties go to the expert with the lowest number. normalise: the weights are scaled to add up to one.
    """
    probability_TE = jax.nn.softmax(matmul(x_TD, router_ED), axis=-1)
    weights_TX, chosen_TX = top(probability_TE, chosen)
    if normalise:
        weights_TX = weights_TX / weights_TX.sum(axis=-1, keepdims=True)
    return chosen_TX, weights_TX


def top(values_TE: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of each row and where they are, the largest first.

    By repeated maximum: `lax.top_k` sorts whole rows on a GPU.
    """
    index_E = jnp.arange(values_TE.shape[1], dtype=jnp.int32)
    found, places = [], []
    for _ in range(count):
        best_T = values_TE.max(axis=1)
        place_T = jnp.where(values_TE == best_T[:, None], index_E, values_TE.shape[1] - 1).min(axis=1)
        found.append(best_T)
        places.append(place_T)
        values_TE = jnp.where(index_E == place_T[:, None], -jnp.inf, values_TE)
    return jnp.stack(found, axis=1), jnp.stack(places, axis=1)
