"""Experts by XLA: a batched product over all of them, each with room for more than its share of the tokens.

What finds no room goes in another round, up to one expert that gets every token. Few tokens need no rounds: then every
expert computes all of them, and the weights are read once, which is what takes the time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.bins import Bins
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight, dequantize, unpack
from jaxllm.kernels.linear.reference import gated

FEW = 64
"""Tokens up to which every expert computes all of them."""
ROOM = 2
"""Places of an expert in a round, in even shares of the tokens."""


def places(tokens: int, chosen: int, experts: int) -> int:
    """Tokens that an expert takes in a round."""
    share = -(-ROOM * tokens * chosen // experts)
    return min(tokens, FEW) if tokens <= FEW else min(tokens, -(-share // 8) * 8)


def experts(
    x_TD: jax.Array,
    chosen_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up_EFD: Weight,
    down_EDF: Weight,
    *,
    activation: str,
    of: int,
    biases: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """See `api.experts`."""
    (T, D), E = x_TD.shape, gate_up_EFD.shape[0]
    room = places(T, chosen_TX.shape[1], of)

    def expert(y_ECF: jax.Array) -> jax.Array:
        """What comes after the first product, [E, C, D] in x's dtype."""
        first, second = (None, None) if biases is None else biases
        gate, up = jnp.split(_add(y_ECF, first).astype(x_TD.dtype), 2, axis=-1)
        y = gated(gate, up, activation)
        y_ECD = _product("ecf,edf->ecd", y, down_EDF)
        return _add(y_ECD, second).astype(x_TD.dtype)

    if room == T:
        weight_TE = (weights_TX[:, :, None] * (chosen_TX[:, :, None] == jnp.arange(E))).sum(axis=1)
        # One product with all experts' rows, which no batched one is as fast as.
        y_ETF = _product("td,efd->etf", x_TD, gate_up_EFD)
        y_ETD = expert(y_ETF)
        return (y_ETD.astype(jnp.float32) * weight_TE.T[:, :, None]).sum(axis=0)
    bins = Bins.sort(chosen_TX, E)

    def more(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < bins.count_B).any()

    def one_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, out_TD = state
        token_EC = bins.tokens(start, room)
        x_ECD = x_TD.at[token_EC].get(mode="fill", fill_value=0)
        y_ECF = _product("ecd,efd->ecf", x_ECD, gate_up_EFD)
        y_ECD = expert(y_ECF)
        place_TX, here_TX = bins.places(chosen_TX, start, room)
        y_TXD = jnp.where(here_TX[:, :, None], y_ECD.reshape(-1, D)[place_TX], 0)
        return start + room, out_TD + (y_TXD.astype(jnp.float32) * weights_TX[:, :, None]).sum(axis=1)

    _, out_TD = lax.while_loop(more, one_round, (jnp.int32(0), jnp.zeros((T, D), jnp.float32)))
    return out_TD


def _add(y_ECF: jax.Array, bias_EF: jax.Array | None) -> jax.Array:
    return y_ECF if bias_EF is None else y_ECF + bias_EF[:, None].astype(jnp.float32)


def _product(pattern: str, x: jax.Array, weight_EFD: Weight) -> jax.Array:
    """[E, C, F] in float32."""
    if not isinstance(weight_EFD, QuantizedWeight):
        return jnp.einsum(pattern, x, weight_EFD, preferred_element_type=jnp.float32)
    if weight_EFD.format.group is not None or weight_EFD.zero is not None:
        return jnp.einsum(pattern, x, dequantize(weight_EFD, x.dtype), preferred_element_type=jnp.float32)
    y_ECF = jnp.einsum(pattern, x, unpack(weight_EFD).astype(x.dtype), preferred_element_type=jnp.float32)
    return y_ECF * weight_EFD.scale[:, None, :, 0]
