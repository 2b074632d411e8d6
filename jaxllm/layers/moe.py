"""Mixture of experts: a router gives each token a few gated MLPs, whose results are added up by its weights.

https://arxiv.org/abs/2401.04088. The experts are on the ranks of `ep`, the columns of each over those of `tp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.kernels.grouped_matmul import api
from jaxllm.kernels.linear.api import matmul
from jaxllm.kernels.router import cuda
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.quantize import Declared, param
from jaxllm.parallel.collectives import Axes
from jaxllm.parallel.expert import experts
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec


class Router(nnx.Module):
    """Chooses the experts of a token, and weighs them; see `ExpertsConfig` for the ways to do so."""

    def __init__(
        self,
        weight: ParamSpec,
        bias: ParamSpec | None,
        *,
        chosen: int,
        normalise: bool,
        sigmoid: bool = False,
        groups: int = 1,
        groups_chosen: int = 1,
        group_best: int = 2,
        scale: float = 1.0,
        logit_bias: ParamSpec | None = None,
    ):
        self.weight = param(weight)
        self.bias = None if bias is None else param(bias)
        self.logit_bias = None if logit_bias is None else param(logit_bias)
        self.chosen = chosen
        self.normalise = normalise
        self.sigmoid = sigmoid
        self.groups = groups
        self.groups_chosen = groups_chosen
        self.group_best = group_best
        self.scale = scale

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each token's experts, int32 [T, X], the best first, and their weights, float32.

        Computed in float32 throughout. Ties go to the expert with the lowest number.
        """
        logits_TE = matmul(x_TD, self.weight[...])
        if self.logit_bias is not None:
            logits_TE = logits_TE + self.logit_bias[...]
        bias_E = None if self.bias is None else self.bias[...]
        try:
            if self.groups > 1:
                raise NotImplementedError("groups of experts")
            choice = cuda.Choice(self.chosen, 0.0, self.normalise, self.sigmoid, self.scale)
            kernel = cuda.choose_by_logits(logits_TE, choice, bias=bias_E is not None)
        except NotImplementedError:
            return self._choose(logits_TE, bias_E)
        return lax.platform_dependent(logits_TE, bias_E, cuda=kernel, default=self._choose)

    def _choose(self, logits_TE: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The experts of what the router says, and their weights."""
        score_TE = jax.nn.sigmoid(logits_TE) if self.sigmoid else jax.nn.softmax(logits_TE, axis=-1)
        choice_TE = score_TE if bias_E is None else score_TE + bias_E
        if self.groups > 1:
            choice_TE = self._best_groups(choice_TE)
        weights_TX, chosen_TX = top(choice_TE, self.chosen)
        if choice_TE is not score_TE:
            weights_TX = jnp.take_along_axis(score_TE, chosen_TX, axis=1)
        if self.normalise:
            weights_TX = weights_TX / (weights_TX.sum(axis=-1, keepdims=True) + TINY)
        return chosen_TX, weights_TX if self.scale == 1.0 else weights_TX * self.scale

    def normed(self, x_TD: jax.Array, norm: RMSNorm) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `norm` makes of x, and the experts of that and their weights; few tokens in one kernel on a GPU."""
        bias_E = None if self.bias is None else self.bias[...]

        def plain(x_TD: jax.Array, *_: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
            y_TD = norm(x_TD)
            return y_TD, *self(y_TD)

        try:
            if self.groups > 1 or self.logit_bias is not None:
                raise NotImplementedError("groups of experts, or a bias of the product")
            choice = cuda.Choice(self.chosen, norm.eps, self.normalise, self.sigmoid, self.scale)
            kernel = cuda.choose(x_TD, self.weight[...], choice, bias=bias_E is not None)
        except NotImplementedError:
            return plain(x_TD)
        arguments = x_TD, norm.weight[...], self.weight[...], bias_E
        return lax.platform_dependent(*arguments, cuda=kernel, default=plain)

    def _best_groups(self, choice_TE: jax.Array) -> jax.Array:
        """-inf for the experts outside of the groups whose best experts are the best."""
        T, E = choice_TE.shape
        size = E // self.groups
        best, _ = top(choice_TE.reshape(T * self.groups, size), self.group_best)
        _, groups_TX = top(best.sum(axis=1).reshape(T, self.groups), self.groups_chosen)
        inside_TE = (jnp.arange(E) // size == groups_TX[:, :, None]).any(axis=1)
        return jnp.where(inside_TE, choice_TE, -jnp.inf)


TINY = 1e-20
"""Keeps a sum of weights from being zero, as DeepSeek has it."""


class MoE(nnx.Module):
    """In place of a `GatedMLP`; gate_up [E, 2 * F, D] and down [E, D, F] are the experts'. shared: every token's.

    biases: of gate_up, [E, 2 * F], and of down, [E, D], which one of the ranks that share an expert has.
    slots: of `placement.table`, where the layout places experts in slots: then the stacks are by slot, not by expert.
    """

    def __init__(
        self,
        router: Router,
        gate_up: Declared,
        down: Declared,
        shared: GatedMLP | None,
        layout: Layout,
        *,
        activation: str,
        biases: tuple[ParamSpec, ParamSpec] | None = None,
        slots: ParamSpec | None = None,
    ):
        self.router = router
        self.gate_up = param(gate_up)
        self.down = param(down)
        self.gate_up_bias = None if biases is None else param(biases[0])
        self.down_bias = None if biases is None else param(biases[1])
        self.slots = None if slots is None else param(slots)
        self.shared = shared
        self.layout = layout
        self.activation = activation

    def __call__(
        self,
        x_TD: jax.Array,
        norm: RMSNorm,
        tokens: Axes = (),
        residual: jax.Array | None = None,
        valid_T: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The layer on what `norm` makes of x, added to the residual; its rows are split over `tokens`.

        valid_T: which rows are tokens; the others, padding, get no experts. None: all do, which costs less where they
        are few. The second result are the tokens that each expert got, int32 [E], where the layout has them counted:
        over all ranks of ep, those of the step.
        """
        num_experts, chosen = self.router.num_experts, self.router.chosen
        T, dispatch = x_TD.shape[0], self.layout.dispatch
        row_bytes = x_TD.shape[1] * x_TD.dtype.itemsize
        method = dispatch.choose(self.layout.size("experts"), chosen, T, row_bytes, bool(tokens))
        routes = None
        # every rank routes its own rows, all at once
        if method == "replicate" and not tokens and (dispatch.max_tokens or T) >= T:
            with jax.named_scope("router"):
                y_TD, *routes = self.router.normed(x_TD, norm)
        else:
            y_TD = norm(x_TD)
            if valid_T is not None:  # rows of zeros tell the ranks that they come to
                y_TD = jnp.where(valid_T[:, None], y_TD, 0)

        def route(x_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            with jax.named_scope("router"):
                chosen_TX, weights_TX = self.router(x_TD) if routes is None else routes
                load_E = None
                if valid_T is not None:
                    real_T = valid_T if routes is not None else (x_TD != 0).any(axis=1)
                    chosen_TX = jnp.where(real_T[:, None], chosen_TX, -1)
                if self.layout.counts_loads:
                    counted = jnp.where(chosen_TX < 0, num_experts, chosen_TX)
                    load_E = jnp.zeros(num_experts, jnp.int32).at[counted].add(1, mode="drop")
                if self.slots is not None:
                    chosen_TX = in_slots(chosen_TX, self.slots[...], num_experts)
                return chosen_TX, weights_TX, load_E

        def compute(x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array) -> jax.Array:
            weights, biases = (self.gate_up[...], self.down[...]), None
            if self.gate_up_bias is not None and self.down_bias is not None:
                biases = self.gate_up_bias[...], self.down_bias[...]
            return api.experts(
                x_TD, chosen_TX, weights_TX, *weights, activation=self.activation, of=num_slots, biases=biases
            )

        num_slots = num_experts if self.layout.placement is None else self.layout.placement.num_slots
        with jax.named_scope("experts"):
            y_TD, load_E = experts(
                y_TD,
                route,
                compute,
                num_experts=num_slots,
                axes=(*self.layout.axes("experts"), *self.layout.axes("expert_ffn")),
                tokens=tokens,
                method=method,
                shared=None if self.shared is None else self.shared.partial,
                max_tokens=dispatch.max_tokens,
            )
        return y_TD if residual is None else residual + y_TD, load_E


def in_slots(chosen_TX: jax.Array, table: jax.Array, num_experts: int) -> jax.Array:
    """The slots of the chosen experts (-1 stays); the rows of a step take those of an expert in turn.

    table: see `placement.table`.
    """
    E, T = num_experts, chosen_TX.shape[0]
    expert_TX = jnp.maximum(chosen_TX, 0)
    count, start, order = table[:E], table[E : 2 * E], table[2 * E :]
    turn_TX = (jnp.arange(T, dtype=jnp.int32)[:, None] + expert_TX) % jnp.maximum(count[expert_TX], 1)
    return jnp.where(chosen_TX < 0, -1, order[start[expert_TX] + turn_TX])


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
