"""A decode step of one token in few launches: all layers with a gated feed-forward, or with experts, by one kernel.

Every function raises NotImplementedError where the layer's parts must do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
from jax import lax

from jaxllm.kernels.dense_layer import cuda as dense_cuda
from jaxllm.kernels.dense_layer import reference as dense
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.kernels.moe_token import cuda as experts_cuda
from jaxllm.kernels.moe_token import reference as experts
from jaxllm.kernels.router.cuda import Choice
from jaxllm.layers.attention import Attention
from jaxllm.layers.linear import RowLinear
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.moe import MoE
from jaxllm.layers.norm import RMSNorm
from jaxllm.parallel.collectives import ranks
from jaxllm.parallel.context import AttentionBatch, KVPages, Stripes, places


def plain_weight(weight: Weight) -> jax.Array:
    """A weight that is not quantised."""
    if isinstance(weight, QuantizedWeight):
        raise NotImplementedError("a quantised weight")
    return weight


def place_of(a: Attention, kv: KVPages, batch: AttentionBatch) -> tuple[jax.Array, jax.Array]:
    """The page of a step's one token and its slot there, where attention is of a kind that kernels of layers have."""
    if batch.tokens != 1 or batch.decodes != 1:
        raise NotImplementedError("not one decoding request")
    if a.layout.cp_type is not None or a.window is not None or a.softcap is not None or a.sinks is not None:
        raise NotImplementedError("context parallelism, a window, a soft cap or sinks")
    return places(batch.positions_T, batch.pages_RW, batch.row_T, kv.shape[3], Stripes(kv.shape[3], 1, 0))


def choice_of(mlp: MoE, out: RowLinear, norm: RMSNorm) -> Choice:
    """How experts are chosen, where a kernel can do it and all that the layer has."""
    router, layout = mlp.router, mlp.layout
    if mlp.shared is not None or any(
        b is not None for b in (mlp.gate_up_bias, mlp.down_bias, router.logit_bias, out.bias)
    ):
        raise NotImplementedError("shared experts or biases")
    axes = (*layout.axes("experts"), *layout.axes("expert_ffn"), *layout.axes("requests"), *out.axes)
    if ranks(axes) > 1 or mlp.slots is not None or layout.counts_loads or router.groups > 1:
        raise NotImplementedError("several ranks, experts in slots or groups of them")
    return Choice(router.chosen, norm.eps, router.normalise, router.sigmoid, router.scale)


Parts = Callable[[jax.Array, list[KVPages]], tuple[jax.Array, list[KVPages]]]
"""Layers by their parts: the residual stream and the pools, to those after them."""


class Experts(NamedTuple):
    """A layer with experts."""

    norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MoE

    def operands(self, kv: KVPages) -> experts.Layer:
        """What the kernel reads, where it has all that the layer has."""
        a, mlp, router = self.attention, self.mlp, self.mlp.router
        if a.qkv.bias is not None:
            raise NotImplementedError("biases of queries, keys and values")
        return experts.Layer(
            self.norm.weight[...],
            plain_weight(a.qkv.weight[...]),
            None if a.q_norm is None else a.q_norm.weight[...],
            None if a.k_norm is None else a.k_norm.weight[...],
            plain_weight(a.out.weight[...]),
            self.mlp_norm.weight[...],
            router.weight[...],
            None if router.bias is None else router.bias[...],
            plain_weight(mlp.gate_up[...]),
            plain_weight(mlp.down[...]),
            kv,
        )

    def settings(self) -> set[tuple[str, float, Choice]]:
        """Activation, scale on q.k, and how experts are chosen, with the epsilon of each norm."""
        choice = choice_of(self.mlp, self.attention.out, self.mlp_norm)
        norms = (self.norm, self.mlp_norm, self.attention.q_norm, self.attention.k_norm)
        each = {replace(choice, eps=norm.eps) for norm in norms if norm is not None}
        return {(self.mlp.activation, self.attention.scale, choice) for choice in each}


def expert_layers(
    x_TD: jax.Array,
    layers: Sequence[Experts],
    rope: tuple[jax.Array, jax.Array],
    pools: Sequence[KVPages],
    batch: AttentionBatch,
    parts: Parts,
) -> tuple[jax.Array, list[KVPages]]:
    """Layers one after the other on the residual stream, and the written pages. parts: what does the same elsewhere."""
    place = [place_of(layer.attention, kv, batch) for layer, kv in zip(layers, pools, strict=True)]
    settings = set().union(*(layer.settings() for layer in layers))
    if len(settings) != 1:
        raise NotImplementedError("layers with different settings")
    ((activation, scale, choice),) = settings
    token = experts.Token(x_TD, *rope, *place[0], batch.pages_RW, batch.positions_T)
    each = tuple(layer.operands(kv) for layer, kv in zip(layers, pools, strict=True))
    operands = experts.Operands(token, each)
    kernel = experts_cuda.choose(operands, choice, activation=activation, scale=scale)

    def otherwise(operands: experts.Operands) -> tuple[jax.Array, list[KVPages]]:
        return parts(operands.token.x, [layer.kv_PYKOH for layer in operands.layers])

    with jax.named_scope("layers"):
        return lax.platform_dependent(operands, cuda=kernel, default=otherwise)


class Dense(NamedTuple):
    """A layer with a gated feed-forward."""

    norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def operands(self, kv: KVPages) -> dense.Layer:
        """What the kernel reads, where it has all that the layer has."""
        a, mlp = self.attention, self.mlp
        if any(bias is not None for bias in (a.out.bias, mlp.gate_up.bias, mlp.down.bias)):
            raise NotImplementedError("biases of other products than that of queries, keys and values")
        if ranks((*a.out.axes, *mlp.down.axes, *a.layout.axes("requests"))) > 1:
            raise NotImplementedError("several ranks")
        return dense.Layer(
            plain_weight(a.qkv.weight[...]),
            plain_weight(a.out.weight[...]),
            plain_weight(mlp.gate_up.weight[...]),
            plain_weight(mlp.down.weight[...]),
            None if a.qkv.bias is None else a.qkv.bias[...],
            self.norm.weight[...],
            self.mlp_norm.weight[...],
            None if a.q_norm is None else a.q_norm.weight[...],
            None if a.k_norm is None else a.k_norm.weight[...],
            kv,
        )

    def settings(self) -> set[tuple[str, float, float]]:
        """Activation, scale on q.k and epsilon of each norm."""
        norms = (self.norm, self.mlp_norm, self.attention.q_norm, self.attention.k_norm)
        return {(self.mlp.activation, self.attention.scale, norm.eps) for norm in norms if norm is not None}


def dense_layers(
    x_TD: jax.Array,
    layers: Sequence[Dense],
    rope: tuple[jax.Array, jax.Array],
    pools: Sequence[KVPages],
    batch: AttentionBatch,
    parts: Parts,
) -> tuple[jax.Array, list[KVPages]]:
    """Layers one after the other on the residual stream, and the written pages. parts: what does the same elsewhere."""
    place = [place_of(layer.attention, kv, batch) for layer, kv in zip(layers, pools, strict=True)]
    settings = set().union(*(layer.settings() for layer in layers))
    if len(settings) != 1:
        raise NotImplementedError("layers with different settings")
    ((activation, scale, eps),) = settings
    each = tuple(layer.operands(kv) for layer, kv in zip(layers, pools, strict=True))
    operands = dense.Operands(x_TD, *rope, *place[0], batch.pages_RW, batch.positions_T, each)
    kernel = dense_cuda.choose(operands, activation=activation, scale=scale, eps=eps)

    def otherwise(operands: dense.Operands) -> tuple[jax.Array, tuple[KVPages, ...]]:
        x_TD, pools = parts(operands.x, [layer.kv_PYKOH for layer in operands.layers])
        return x_TD, tuple(pools)

    with jax.named_scope("layers"):
        x_TD, written = lax.platform_dependent(operands, cuda=kernel, default=otherwise)
    return x_TD, list(written)
