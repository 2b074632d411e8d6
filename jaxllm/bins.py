"""Tokens in bins that have few places: the bookkeeping of experts, and of ranks that experts are on.

A token may want several bins, each at most once. The tokens of a bin are numbered as they come, and taken in rounds of
`places`: whoever finds no place goes in the next round, so that nobody is ever left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True)
class Bins:
    """number_TB: int32, each token's number among those of a bin; -1 where it does not want it. count_B: its tokens."""

    number_TB: jax.Array
    count_B: jax.Array

    @classmethod
    def sort(cls, wanted_TX: jax.Array, bins: int) -> Bins:
        """The bins that tokens want: int32, anything outside of [0, bins) for none."""
        wanted_TB = (wanted_TX[:, :, None] == jnp.arange(bins)).any(axis=1)
        so_far_TB = jnp.cumsum(wanted_TB, axis=0, dtype=jnp.int32)
        return cls(jnp.where(wanted_TB, so_far_TB - 1, -1), so_far_TB[-1])

    def tokens(self, start: jax.Array | int, places: int) -> jax.Array:
        """The tokens number start ... of each bin, int32 [bins, places]; in an empty place the number of all tokens."""
        T, bins = self.number_TB.shape
        place_TB = self.number_TB - start
        place_TB = jnp.where((self.number_TB >= 0) & (place_TB >= 0) & (place_TB < places), place_TB, places)
        empty = jnp.full((bins, places), T, jnp.int32)
        token_TB = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, bins))
        return empty.at[jnp.arange(bins), place_TB].set(token_TB, mode="drop")

    def places(self, wanted_TX: jax.Array, start: jax.Array | int, places: int) -> tuple[jax.Array, jax.Array]:
        """Where each token's wishes are in this round: an index into [bins * places], and whether they are there."""
        bins = self.number_TB.shape[1]
        real_TX = (wanted_TX >= 0) & (wanted_TX < bins)
        bin_TX = jnp.where(real_TX, wanted_TX, 0)
        place_TX = jnp.take_along_axis(self.number_TB, bin_TX, axis=1) - start
        here_TX = real_TX & (place_TX >= 0) & (place_TX < places)
        return jnp.where(here_TX, bin_TX * places + place_TX, 0), here_TX
