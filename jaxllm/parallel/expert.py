"""Expert parallelism: the experts of a layer are on several ranks of `ep`, and the columns of each over `tp`.

E experts, of which each rank of ep has E / ep in a row. The ways to bring tokens and experts together have one
signature; all of them are exact, however uneven the choice.

    replicate     every rank has all tokens (they are gathered where they are split), computes what its own experts add
                  to each of them, and the sums are added up: an all-reduce, or a reduce-scatter where tokens are split
    all_to_all    each rank of ep has its share of the tokens and sends each one to the ranks that have its experts,
                  once to each (arXiv 2412.19437, section 3.2); the weighted sums come back the same way

all_to_all sends a rank's tokens in messages of a fixed size, `capacity` tokens to each rank; what does not fit goes in
another round, as often as the fullest needs: no token is dropped, and nobody waits for a worst case that never comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.bins import Bins
from jaxllm.parallel.collectives import Axes, all_to_all, gather_rows, rank, ranks, sum_partial

Method = Literal["replicate", "all_to_all"]
Route = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""The experts of each of x_TD's tokens, int32 [T, X], of all there are, and their weights, float32 [T, X]."""
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""The experts of this rank: (x_TD, chosen_TX, weights_TX) -> float32 [T, D], where chosen counts from its first one."""
Shared = Callable[[jax.Array], jax.Array]
"""What every token gets besides: x_TD -> this rank's part of a sum over all ranks, [T, D]."""
EP: Axes = ("ep",)
FEW = 64
"""Tokens of a rank below which the latency of exchanges counts more than their bytes."""
WORTH = 0.5
"""Share of the ranks that get a token, up to which sending it to those is worth more messages."""
ROOM = 1.25
"""Size of a message of all_to_all, in tokens that even routing would send."""


def choose_method(ep: int, chosen: int, tokens: int, split: bool) -> Method:
    """The method that moves fewer bytes.

    tokens: of a rank. split: whether each rank of ep has tokens of its own. Where all have the same ones, nothing needs
    to be brought to an expert. Where they are split, replicate moves every token to every rank and all_to_all to those
    that have its experts, in two exchanges whose latency small steps do not earn back.
    """
    sent = 1 - (1 - 1 / ep) ** chosen  # chance that a rank has one of a token's experts
    return "all_to_all" if split and tokens >= FEW and sent <= WORTH else "replicate"


def experts(
    x_TD: jax.Array,
    route: Route,
    compute: Compute,
    *,
    num_experts: int,
    axes: Axes,
    tokens: Axes,
    method: Method,
    shared: Shared | None = None,
) -> jax.Array:
    """The weighted sum of each token's experts and what is shared, [T, D] in x's dtype.

    Args:
      num_experts: over all ranks.
      axes: the ranks that the experts and their columns are split over, `ep` among them.
      tokens: those of them that the tokens are split over, `ep` first, or none; the result is split in the same way.
    """
    method = method if ranks(EP) > 1 else "replicate"
    return METHODS[method](x_TD, route, compute, num_experts // ranks(EP), axes, tokens, shared)


def replicate(
    x_TD: jax.Array, route: Route, compute: Compute, local: int, axes: Axes, tokens: Axes, shared: Shared | None = None
) -> jax.Array:
    """Every rank computes its own experts for all tokens; `local` is how many it has."""
    # Gathered first and routed by every rank: a collective less than with the routes beside the tokens.
    x_TD = gather_rows(x_TD, tokens)
    chosen_TX, weights_TX = route(x_TD)
    out_TD = compute(x_TD, chosen_TX - rank(EP) * local, weights_TX)
    if shared is not None:  # no collective of its own
        out_TD = out_TD + shared(x_TD).astype(jnp.float32)
    return sum_partial(out_TD.astype(x_TD.dtype), axes, tokens)


def dispatch(
    x_TD: jax.Array, route: Route, compute: Compute, local: int, axes: Axes, tokens: Axes, shared: Shared | None = None
) -> jax.Array:
    """all_to_all: tokens go to the ranks of ep that have their experts, and the weighted sums come back."""
    T, dtype = x_TD.shape[0], x_TD.dtype
    if shared is not None:
        extra_TD = sum_partial(shared(gather_rows(x_TD, tokens)), axes, tokens)
        return extra_TD + dispatch(x_TD, route, compute, local, axes, tokens)
    others = tuple(axis for axis in axes if axis not in EP)
    split = tuple(axis for axis in tokens if axis not in EP)
    if tokens:
        # Each of the ranks that have the columns of an expert needs what any of them has.
        x_TD = gather_rows(x_TD, split)
        chosen_TX, weights_TX = route(x_TD)
    else:
        rows = -(-T // ranks(EP))
        first = rank(EP) * rows
        x_TD = lax.dynamic_slice_in_dim(jnp.pad(x_TD, ((0, rows * ranks(EP) - T), (0, 0))), first, rows)
        chosen_TX, weights_TX = route(x_TD)
        chosen_TX = jnp.where((first + jnp.arange(rows) < T)[:, None], chosen_TX, -1)
    out_TD = sum_partial(_exchange(x_TD, chosen_TX, weights_TX, compute, local).astype(dtype), others, split)
    return out_TD if tokens else gather_rows(out_TD, EP)[:T]


def _exchange(x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, compute: Compute, local: int) -> jax.Array:
    """This rank's tokens through the experts of all ranks of ep: float32 [T, D]. A token chosen as -1 gets nothing."""
    ep, (T, D), X = ranks(EP), x_TD.shape, chosen_TX.shape[1]
    room, first = capacity(T, X, ep), rank(EP) * local
    owner_TX = chosen_TX // local
    # One copy goes to a rank that has several of a token's experts, and one sum comes back: to the first of them.
    earlier = jnp.tril(jnp.ones((X, X), bool), -1)
    again_TX = ((owner_TX[:, :, None] == owner_TX[:, None, :]) & earlier).any(axis=2)
    bins = Bins.sort(owner_TX, ep)
    # Experts and weights travel in one message.
    routes_TX = jnp.concatenate([chosen_TX, lax.bitcast_convert_type(weights_TX, jnp.int32)], axis=1)

    def one_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, out_TD = state
        token_RC = bins.tokens(start, room)

        def send(rows: jax.Array, fill: int) -> jax.Array:
            return all_to_all(rows.at[token_RC].get(mode="fill", fill_value=fill), EP).reshape(ep * room, -1)

        tokens, routes = send(x_TD, 0), send(routes_TX, -1)
        chosen, weights = routes[:, :X] - first, lax.bitcast_convert_type(routes[:, X:], jnp.float32)
        mine = (chosen >= 0) & (chosen < local)
        sums = compute(tokens, jnp.where(mine, chosen, -1), jnp.where(mine, weights, 0))
        back = all_to_all(sums.astype(x_TD.dtype).reshape(ep, room, D), EP).reshape(ep * room, D)
        place_TX, here_TX = bins.places(jnp.where(again_TX, -1, owner_TX), start, room)
        found_TXD = jnp.where(here_TX[:, :, None], back[place_TX], 0)
        return start + room, out_TD + found_TXD.astype(jnp.float32).sum(axis=1)

    state = (jnp.int32(0), jnp.zeros((T, D), jnp.float32))
    if room == T:
        return one_round(state)[1]
    # All ranks go as many rounds as the fullest message needs: collectives wait for everybody.
    most = lax.pmax(bins.count_B.max(), EP)
    return lax.while_loop(lambda state: state[0] < most, one_round, state)[1]


def capacity(tokens: int, chosen: int, ep: int) -> int:
    """Tokens of a message to one rank: what even routing sends and a quarter more, at most all."""
    expected = tokens * (1 - (1 - 1 / ep) ** chosen)
    return min(tokens, max(8, -(-int(ROOM * expected) // 8) * 8))


METHODS = {"replicate": replicate, "all_to_all": dispatch}
