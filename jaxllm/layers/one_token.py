"""A decode step of one token in few launches: a layer with experts, or its second half, by one kernel.

Every function raises NotImplementedError where the layer's parts must do the work.
"""

from __future__ import annotations

import jax
from jax import lax

from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.kernels.moe_token import cuda, layer_cuda
from jaxllm.kernels.router.cuda import Choice
from jaxllm.layers.attention import Attention
from jaxllm.layers.linear import RowLinear
from jaxllm.layers.moe import MoE
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.stream import settle
from jaxllm.parallel.collectives import ranks
from jaxllm.parallel.context import AttentionBatch, KVPages, Stripes, places


def plain_weight(weight: Weight) -> jax.Array:
    """A weight that is not quantised."""
    if isinstance(weight, QuantizedWeight):
        raise NotImplementedError("a quantised weight")
    return weight


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


def second_half(x_TD: jax.Array, found_TD: jax.Array, out: RowLinear, norm: RMSNorm, mlp: MoE) -> jax.Array:
    """From what attention's heads found to the layer's end: x + out(found), and the experts on its norm."""
    if x_TD.shape[0] != 1:
        raise NotImplementedError("more tokens than one")
    choice, router = choice_of(mlp, out, norm), mlp.router
    operands = cuda.Operands(
        x_TD,
        found_TD,
        plain_weight(out.weight[...]),
        norm.weight[...],
        router.weight[...],
        None if router.bias is None else router.bias[...],
        plain_weight(mlp.gate_up[...]),
        plain_weight(mlp.down[...]),
    )
    kernel = cuda.choose(operands, choice, activation=mlp.activation)

    def parts(operands: cuda.Operands) -> jax.Array:
        assert operands.attended is not None
        y_TD = settle(out(operands.attended, residual=operands.x))[0]
        return mlp(y_TD, norm, (), y_TD)[0]

    return lax.platform_dependent(operands, cuda=kernel, default=parts)


def layer(
    x_TD: jax.Array,
    norms: tuple[RMSNorm, RMSNorm],
    attention: Attention,
    mlp: MoE,
    rope: tuple[jax.Array, jax.Array],
    kv: KVPages,
    batch: AttentionBatch,
    upcoming: Weight | None,
) -> tuple[jax.Array, KVPages]:
    """A layer on the residual stream, and the written pages.

    norms: of attention and of the experts. upcoming: what the next layer makes queries, keys and values with.
    """
    if batch.tokens != 1 or batch.decodes != 1:
        raise NotImplementedError("not one decoding request")
    a = attention
    if a.layout.cp_type is not None or a.qkv.bias is not None:
        raise NotImplementedError("context parallelism or biases")
    if a.window is not None or a.softcap is not None or a.sinks is not None:
        raise NotImplementedError("a window, a soft cap or sinks")
    choice, router = choice_of(mlp, a.out, norms[1]), mlp.router
    if any(norm is not None and norm.eps != choice.eps for norm in (norms[0], a.q_norm, a.k_norm)):
        raise NotImplementedError("norms with different epsilons")
    stripes = Stripes(kv.shape[3], 1, 0)
    page_T, slot_T = places(batch.positions_T, batch.pages_RW, batch.row_T, kv.shape[3], stripes)
    operands = layer_cuda.Operands(
        x_TD,
        norms[0].weight[...],
        plain_weight(a.qkv.weight[...]),
        None if a.q_norm is None else a.q_norm.weight[...],
        None if a.k_norm is None else a.k_norm.weight[...],
        *rope,
        page_T,
        slot_T,
        batch.pages_RW,
        batch.positions_T,
        kv,
        plain_weight(a.out.weight[...]),
        norms[1].weight[...],
        router.weight[...],
        None if router.bias is None else router.bias[...],
        plain_weight(mlp.gate_up[...]),
        plain_weight(mlp.down[...]),
        None if upcoming is None else plain_weight(upcoming),
    )
    kernel = layer_cuda.choose(operands, choice, activation=mlp.activation, scale=a.scale)

    def parts(operands: layer_cuda.Operands) -> tuple[jax.Array, KVPages]:
        y, kv = a(operands.x, norms[0], rope, operands.kv_PYKOH, batch, (), operands.x)
        y_TD = settle(y)[0]
        return mlp(y_TD, norms[1], (), y_TD)[0], kv

    return lax.platform_dependent(operands, cuda=kernel, default=parts)
