"""Expert parallelism: the experts of a layer are on several ranks of `ep`, and the columns of each over `tp`.

E experts, of which each rank of ep has E / ep in a row. The ways to bring tokens and experts together have one
signature; all of them are exact, however uneven the choice.

    replicate     every rank has all tokens (they are gathered where they are split), computes what its own experts add
                  to each of them, and the sums are added up: an all-reduce, or a reduce-scatter where tokens are split
    all_to_all    each rank of ep has its share of the tokens and sends each one to the ranks that have its experts,
                  once to each (arXiv 2412.19437, section 3.2); the weighted sums come back the same way
    ragged        the same with messages as long as they need to be (NCCL; elsewhere it is imitated by all_gather)

all_to_all sends a rank's tokens in messages of a fixed size, `capacity` tokens to each rank; what does not fit goes in
another round, as often as the fullest needs: no token is dropped, and nobody waits for a worst case that never comes.
ragged needs no rounds, for which a rank has room for all tokens of all ranks, as with replicate.

Where all ranks have the same tokens, replicate brings nothing anywhere. Where tokens are split, `Dispatch.choose`
reckons: replicate moves every token to every other rank and its sum back, in two collectives; an exchange moves it only
to the ranks that have one of its experts, in four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.bins import Bins
from jaxllm.parallel.collectives import (
    Axes,
    all_gather,
    all_to_all,
    gather_rows,
    ragged_all_to_all,
    rank,
    ranks,
    sum_partial,
)

if TYPE_CHECKING:
    from jaxllm.moe_config import MoeConfig

Method = Literal["replicate", "all_to_all", "ragged"]
Route = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array | None]]
"""The experts of each of x_TD's tokens, int32 [T, X], of all there are, and their weights, float32 [T, X].

And how many tokens each expert got, int32 [E], if that is counted.
"""
Found = tuple[jax.Array, jax.Array | None]
"""The result of tokens, [T, D], and the tokens of each expert, as far as this rank is the one that counts them."""
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""The experts of this rank: (x_TD, chosen_TX, weights_TX) -> float32 [T, D], where chosen counts from its first one."""
Shared = Callable[[jax.Array], jax.Array]
"""What every token gets besides: x_TD -> this rank's part of a sum over all ranks, [T, D]."""
EP: Axes = ("ep",)
LATENCY = 14e-6
"""Seconds of a small collective (two H200s, on the wall)."""
LINK = 450e9
"""Bytes a second from a device to the others, in one direction (NVLink of an H200)."""
ROOM = 1.25
"""Size of a message of all_to_all, in tokens that even routing would send."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How tokens and experts come together.

    method: None: by the size of the step. exchange_from: tokens of a rank from which they are then exchanged; None: by
    reckoning. max_tokens: of all ranks that experts work on at a time; more go in turns. None: all.
    """

    method: Method | None = None
    exchange_from: int | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, config: MoeConfig) -> Dispatch:
        return cls(config.method, config.exchange_from, config.max_num_tokens)

    def choose(self, ep: int, chosen: int, tokens: int, row_bytes: int, split: bool) -> Method:
        """The method for a step of `tokens` tokens on each rank; split: whether these are tokens of its own."""
        if self.method is not None:
            return self.method
        if not split or ep == 1:
            return "replicate"
        if self.exchange_from is not None:
            return "all_to_all" if tokens >= self.exchange_from else "replicate"
        sent = ROOM * (1 - (1 - 1 / ep) ** chosen)  # a rank has one of a token's experts
        saved = 2 * (ep - 1) * tokens * row_bytes * (1 - sent) / LINK
        return "all_to_all" if saved > 2 * LATENCY else "replicate"


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
    max_tokens: int | None = None,
) -> Found:
    """The weighted sum of each token's experts and what is shared, [T, D] in x's dtype; and what `route` counted.

    Args:
      num_experts: over all ranks.
      axes: the ranks that the experts and their columns are split over, `ep` among them.
      tokens: those of them that the tokens are split over, `ep` first, or none; the result is split in the same way.
      max_tokens: that are worked on at a time, those of all ranks together; None for all.
    """
    method = method if ranks(EP) > 1 else "replicate"

    def run(x_TD: jax.Array) -> Found:
        return METHODS[method](x_TD, route, compute, num_experts // ranks(EP), axes, tokens, shared)

    T, D = x_TD.shape
    turns = 1 if max_tokens is None else -(-T // max(1, max_tokens // ranks(tokens)))
    if turns == 1:
        return run(x_TD)
    # A loop, so that the turns' memory is one turn's.
    rows = -(-T // turns)
    x_CTD = jnp.pad(x_TD, ((0, turns * rows - T), (0, 0))).reshape(turns, rows, D)
    out_CTD, load_CE = lax.map(run, x_CTD)
    return out_CTD.reshape(-1, D)[:T], None if load_CE is None else load_CE.sum(axis=0)


def replicate(
    x_TD: jax.Array, route: Route, compute: Compute, local: int, axes: Axes, tokens: Axes, shared: Shared | None = None
) -> Found:
    """Every rank computes its own experts for all tokens; `local` is how many it has."""
    # Gathered first and routed by every rank: a collective less than with the routes beside the tokens.
    x_TD = gather_rows(x_TD, tokens)
    chosen_TX, weights_TX, load_E = route(x_TD)
    out_TD = compute(x_TD, chosen_TX - rank(EP) * local, weights_TX)
    if shared is not None:  # no collective of its own
        out_TD = out_TD + shared(x_TD).astype(jnp.float32)
    if load_E is not None:  # all ranks have routed the same tokens
        load_E = jnp.where(rank(EP) == 0, load_E, 0)
    return sum_partial(out_TD.astype(x_TD.dtype), axes, tokens), load_E


def dispatch(
    x_TD: jax.Array,
    route: Route,
    compute: Compute,
    local: int,
    axes: Axes,
    tokens: Axes,
    shared: Shared | None = None,
    *,
    exchange: Callable[[jax.Array, jax.Array, jax.Array, Compute, int], jax.Array],
) -> Found:
    """Tokens go to the ranks of ep that have their experts, and the weighted sums come back."""
    T, dtype = x_TD.shape[0], x_TD.dtype
    if shared is not None:
        extra_TD = sum_partial(shared(gather_rows(x_TD, tokens)), axes, tokens)
        out_TD, load_E = dispatch(x_TD, route, compute, local, axes, tokens, exchange=exchange)
        return extra_TD + out_TD, load_E
    others = tuple(axis for axis in axes if axis not in EP)
    split = tuple(axis for axis in tokens if axis not in EP)
    if tokens:
        # Each of the ranks that have the columns of an expert needs what any of them has.
        x_TD = gather_rows(x_TD, split)
        chosen_TX, weights_TX, load_E = route(x_TD)
    else:
        rows = -(-T // ranks(EP))
        first = rank(EP) * rows
        x_TD = lax.dynamic_slice_in_dim(jnp.pad(x_TD, ((0, rows * ranks(EP) - T), (0, 0))), first, rows)
        chosen_TX, weights_TX, load_E = route(x_TD)
        chosen_TX = jnp.where((first + jnp.arange(rows) < T)[:, None], chosen_TX, -1)
    out_TD = sum_partial(exchange(x_TD, chosen_TX, weights_TX, compute, local).astype(dtype), others, split)
    return out_TD if tokens else gather_rows(out_TD, EP)[:T], load_E


def in_rounds(x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, compute: Compute, local: int) -> jax.Array:
    """This rank's tokens through the experts of all ranks of ep: float32 [T, D]. A token chosen as -1 gets nothing."""
    ep, (T, D), X = ranks(EP), x_TD.shape, chosen_TX.shape[1]
    room, first = capacity(T, X, ep), rank(EP) * local
    owner_TX, first_TX = _owners(chosen_TX, local)
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
        place_TX, here_TX = bins.places(first_TX, start, room)
        found_TXD = jnp.where(here_TX[:, :, None], back[place_TX], 0)
        return start + room, out_TD + found_TXD.astype(jnp.float32).sum(axis=1)

    state = (jnp.int32(0), jnp.zeros((T, D), jnp.float32))
    if room == T:
        return one_round(state)[1]
    # All ranks go as many rounds as the fullest message needs: collectives wait for everybody.
    most = lax.pmax(bins.count_B.max(), EP)
    return lax.while_loop(lambda state: state[0] < most, one_round, state)[1]


def ragged(x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, compute: Compute, local: int) -> jax.Array:
    """As `in_rounds`, in one round of messages of any length.

    M = T * min(X, ep) copies of tokens are sent at most; R = ep * T tokens come here at most.
    """
    ep, (T, D), X = ranks(EP), x_TD.shape, chosen_TX.shape[1]
    M, me = T * min(X, ep), rank(EP)
    owner_TX, first_TX = _owners(chosen_TX, local)
    bins = Bins.sort(owner_TX, ep)
    count_CC = all_gather(bins.count_B, EP)  # from each rank to each
    here_C = count_CC[:, me]
    start_CC = jnp.cumsum(count_CC, axis=1) - count_CC  # where each message begins at its sender
    land_CC = jnp.cumsum(count_CC, axis=0) - count_CC  # and where it ends up
    place_TC = jnp.where(bins.number_TB >= 0, start_CC[me] + bins.number_TB, M)
    token_TC = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, ep))
    token_M = jnp.zeros(M, jnp.int32).at[place_TC].set(token_TC, mode="drop")

    # Experts and weights travel with their token, bit by bit.
    routes_TX = jnp.concatenate([chosen_TX, lax.bitcast_convert_type(weights_TX, jnp.int32)], axis=1)
    bits = lax.bitcast_convert_type(routes_TX, x_TD.dtype).reshape(T, -1)
    rows = jnp.concatenate([x_TD, bits], axis=1)[token_M]
    rows = ragged_all_to_all(rows, ep * T, start_CC[me], bins.count_B, land_CC[me], here_C, EP)
    words = rows[:, D:].reshape(len(rows), 2 * X, -1)
    routes = lax.bitcast_convert_type(words if words.shape[2] > 1 else words[:, :, 0], jnp.int32)
    chosen, weights = routes[:, :X] - me * local, lax.bitcast_convert_type(routes[:, X:], jnp.float32)
    mine = (chosen >= 0) & (chosen < local) & (jnp.arange(len(rows)) < here_C.sum())[:, None]
    sums = compute(rows[:, :D], jnp.where(mine, chosen, -1), jnp.where(mine, weights, 0)).astype(x_TD.dtype)
    back = ragged_all_to_all(sums, M, land_CC[:, me], here_C, start_CC[:, me], bins.count_B, EP)
    place_TX = jnp.take_along_axis(place_TC, jnp.maximum(first_TX, 0), axis=1)
    found_TXD = back.at[jnp.where(first_TX >= 0, place_TX, M)].get(mode="fill", fill_value=0)
    return found_TXD.astype(jnp.float32).sum(axis=1)


def _owners(chosen_TX: jax.Array, local: int) -> tuple[jax.Array, jax.Array]:
    """The rank of each expert, and the same with -1 in place of a rank that an earlier one of the token's is on.

    One copy goes to a rank that has several of a token's experts, and one sum comes back: to the first of them.
    """
    X = chosen_TX.shape[1]
    owner_TX = chosen_TX // local  # -1 stays -1
    earlier = jnp.tril(jnp.ones((X, X), bool), -1)
    again_TX = ((owner_TX[:, :, None] == owner_TX[:, None, :]) & earlier).any(axis=2)
    return owner_TX, jnp.where(again_TX, -1, owner_TX)


def capacity(tokens: int, chosen: int, ep: int) -> int:
    """Tokens of a message to one rank: what even routing sends and a quarter more, at most all."""
    expected = tokens * (1 - (1 - 1 / ep) ** chosen)
    return min(tokens, max(8, -(-int(ROOM * expected) // 8) * 8))


METHODS: dict[Method, Callable[..., Found]] = {
    "replicate": replicate,
    "all_to_all": partial(dispatch, exchange=in_rounds),
    "ragged": partial(dispatch, exchange=ragged),
}
