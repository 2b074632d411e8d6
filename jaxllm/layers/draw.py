"""The draw of one token from each row of logits: filters and inverse CDF, without sorting the vocabulary.

Letters of shapes: R rows of the step, N blocks of the vocabulary, C blocks kept as candidates, L tokens in a block.

1. `e = exp((logits - max) / temperature)` in [0, 1], and an integer weight `round(e * scale)` per token, with the scale
   such that a row sums to less than 2**31. Integers add up to the same total in any order, so that a row gives the same
   token bit for bit whatever the batch around it, the batch size or the backend's way of reducing.
2. top-k and top-p are the largest threshold on `e` that still keeps k tokens, or the share p of the weight. It is found
   by bisection on the bit pattern of `e` (bits of non-negative floats are ordered like the floats), first among the
   blocks with the largest maxima, and over the whole row only when the answer may lie outside of them. Tokens that tie
   with the threshold are all kept. min-p is the threshold `e >= min_p`.
3. The token is drawn by inverse CDF with one random number of 32 bits, keyed by the row's seed and position: sums over
   blocks first, then inside one block.

Filters follow the order of Hugging Face transformers: temperature, top-k, top-p on what top-k left, min-p.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK = 128  # L: one cache line row on CPU, one warp row on GPU; common vocabularies are multiples of it
_CANDIDATE_BLOCKS = 64  # C: holds any top-k up to 63, and most nuclei
_ONE_BITS = 0x3F800000  # bit pattern of 1.0, the largest value of e
_LIGHT_BITS = 0x2F800000  # bit pattern of 2**-32: anything smaller weighs 0, because no scale exceeds 2**31
_WEIGHT_BUDGET = 2130706432.0  # 127/128 of 2**31: room for rounding each weight up


def clean(logits: Array) -> Array:
    """NaN to -inf, +inf to the largest float: at every use, where XLA fuses it, because one more array costs more."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, jnp.finfo(jnp.float32).max))


def finite(top_R: Array) -> Array:
    """The largest logit as something to subtract: 0 for a row of nothing but -inf."""
    return jnp.where(jnp.isneginf(top_R), 0.0, top_R)


def take_block(x_RNL: Array, block_R: Array) -> Array:
    """One block of each row, [R, L]."""
    return jnp.take_along_axis(x_RNL, block_R[:, None, None], 1)[:, 0]


def choose(
    logits_RNL: Array, *, temperature: Array, top_k: Array, top_p: Array, min_p: Array, seed: Array, position: Array
) -> Array:
    """i32 [R], the token of each row: the first of the largest where greedy, drawn otherwise.

    Args:
      logits_RNL: f32, padded with -inf; NaN counts as -inf and +inf as the largest float.
      temperature, top_k, top_p, min_p, seed, position: [R] each, as `SamplingBatch` has them.
    """
    block_max_RN = jnp.max(clean(logits_RNL), -1)
    # argmax over V in two levels: XLA:CPU does not vectorise argmax, but it does vectorise max.
    block_R = jnp.argmax(block_max_RN, -1)
    place_R = jnp.argmax(clean(take_block(logits_RNL, block_R)), -1)
    likeliest_R = (block_R * BLOCK + place_R).astype(jnp.int32)
    draws_R = (temperature > 0) & (top_k != 1)

    def draw() -> Array:
        inverse_R = 1.0 / jnp.where(draws_R, temperature, 1.0)
        top_R = finite(jnp.max(block_max_RN, -1))
        e_RNL = jnp.exp((clean(logits_RNL) - top_R[:, None, None]) * inverse_R[:, None, None])
        e_RNL = lax.optimization_barrier(e_RNL)  # every use must see the same bits
        scale_R = _weight_scale(e_RNL)
        k_R = jnp.where(draws_R, top_k, 0)
        p_R = jnp.where(draws_R, top_p, 1.0)
        threshold_R = _when(
            jnp.any((k_R > 0) | (p_R < 1)),
            lambda: _top_k_top_p(e_RNL, scale_R, k_R, p_R),
            jnp.zeros_like(k_R),
        )
        min_p_R = lax.bitcast_convert_type(jnp.clip(min_p, 0.0, 1.0), jnp.int32)
        threshold_R = jnp.maximum(threshold_R, min_p_R)
        drawn_R, total_R = _inverse_cdf(e_RNL, scale_R, threshold_R, _random_bits(seed, position))
        return jnp.where(draws_R & (total_R > 0), drawn_R, likeliest_R)

    return _when(jnp.any(draws_R), draw, likeliest_R)


def _when(predicate: Array, value: Callable[[], Array], otherwise: Array) -> Array:
    """`value()` if the predicate holds, else `otherwise`: lax.cond as a loop of at most one turn.

    XLA:CPU spreads the body of a loop over its threads, and the branches of a conditional not.
    """
    start = (predicate, otherwise)
    return lax.while_loop(lambda carry: carry[0], lambda carry: (jnp.zeros_like(predicate), value()), start)[1]


def _random_bits(seed_R: Array, position_R: Array) -> Array:
    """u32 [R], a function of seed and position alone."""

    def one(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.bits(key, (), jnp.uint32)

    return jax.vmap(one)(seed_R, position_R)


def _weight_scale(e_RNL: Array) -> Array:
    """f32 [R]: the scale that spreads a row's weights over nearly all of 31 bits, from exact integer sums."""
    # No block weighs more than L times its largest token: a safe scale, good enough to weigh the row once.
    largest_RN = jnp.max(e_RNL, -1)
    bound_R = jnp.sum((largest_RN * 65536.0).astype(jnp.int32) + 1, -1).astype(jnp.float32)
    safe_R = (_WEIGHT_BUDGET * 65536.0 / BLOCK) / bound_R
    total_R = jnp.sum(_weights(e_RNL, safe_R, jnp.zeros_like(safe_R, jnp.int32)), (-1, -2)).astype(jnp.float32)
    lost = 0.5 * e_RNL.shape[1] * BLOCK  # the most that rounding can have taken away
    return jnp.minimum(safe_R * (_WEIGHT_BUDGET / (total_R + lost)), _WEIGHT_BUDGET)


def _weights(e: Array, scale_R: Array, threshold_R: Array) -> Array:
    """i32 weights of e [R, ...], 0 below the threshold (as bits)."""
    tail = (slice(None),) + (None,) * (e.ndim - 1)
    weight = (e * scale_R[tail] + 0.5).astype(jnp.int32)
    return jnp.where(lax.bitcast_convert_type(e, jnp.int32) >= threshold_R[tail], weight, 0)


def _inverse_cdf(e_RNL: Array, scale_R: Array, threshold_R: Array, bits_R: Array) -> tuple[Array, Array]:
    """The token at a uniformly random place of each row's weights, and the weights' total (0 = nothing to draw)."""
    end_RN = jnp.cumsum(jnp.sum(_weights(e_RNL, scale_R, threshold_R), -1), -1)
    total_R = end_RN[:, -1]
    place_R = _multiply_high(bits_R, total_R.astype(jnp.uint32)).astype(jnp.int32)
    block_R = jnp.minimum(jnp.sum((end_RN <= place_R[:, None]).astype(jnp.int32), -1), end_RN.shape[1] - 1)
    before_R = jnp.where(block_R > 0, jnp.take_along_axis(end_RN, jnp.maximum(block_R - 1, 0)[:, None], 1)[:, 0], 0)
    end_RL = jnp.cumsum(_weights(take_block(e_RNL, block_R), scale_R, threshold_R), -1)
    inside_R = jnp.sum((end_RL <= (place_R - before_R)[:, None]).astype(jnp.int32), -1)
    return block_R * BLOCK + jnp.minimum(inside_R, BLOCK - 1), total_R


def _multiply_high(a: Array, b: Array) -> Array:
    """(a * b) >> 32 of u32 arrays: a random place below b, in 16-bit halves because 64-bit types are off."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    return a_high * b_high + (middle >> 16) + ((a_low * b_high + (middle & 0xFFFF)) >> 16)


def _top_k_top_p(e_RNL: Array, scale_R: Array, top_k: Array, top_p: Array) -> Array:
    """Threshold (bits of e) of top-k, then of top-p on what top-k left; 0 where neither is asked for."""
    total_R = jnp.sum(_weights(e_RNL, scale_R, jnp.zeros_like(top_k)), (-1, -2))
    if e_RNL.shape[1] <= _CANDIDATE_BLOCKS:
        return jnp.maximum(*_search(e_RNL, scale_R, top_k, top_p, total_R))
    largest, order = lax.top_k(jnp.max(e_RNL, -1), _CANDIDATE_BLOCKS + 1)
    near_RCL = jnp.take_along_axis(e_RNL, order[:, :-1, None], 1)
    k_R, p_R = _search(near_RCL, scale_R, top_k, top_p, total_R)
    near_R = jnp.maximum(k_R, p_R)
    # All tokens above `outside` are candidates: a threshold above it is right, and what it keeps was weighed in full.
    outside_R = lax.bitcast_convert_type(largest[:, -1], jnp.int32)
    far_R = ((top_k > 0) & (k_R <= outside_R)) | ((top_p < 1) & (p_R <= outside_R))

    def search_all() -> Array:
        k_R, p_R = _search(e_RNL, scale_R, jnp.where(far_R, top_k, 0), jnp.where(far_R, top_p, 1.0), total_R)
        return jnp.where(far_R, jnp.maximum(k_R, p_R), near_R)

    return _when(jnp.any(far_R), search_all, near_R)


def _search(e_RNL: Array, scale_R: Array, top_k: Array, top_p: Array, total_R: Array) -> tuple[Array, Array]:
    """Thresholds of top-k and of top-p within e [R, N or C, L], 0 where not asked for; total_R weighs whole rows."""
    by_k, by_p = top_k > 0, top_p < 1

    def count(threshold_R: Array) -> Array:
        kept = lax.bitcast_convert_type(e_RNL, jnp.int32) >= threshold_R[:, None, None]
        return jnp.sum(kept.astype(jnp.int32), (-1, -2))

    def weigh(threshold_R: Array) -> Array:
        return jnp.sum(_weights(e_RNL, scale_R, threshold_R), (-1, -2))

    def lightest(threshold_R: Array) -> Array:
        return _weights(lax.bitcast_convert_type(threshold_R, jnp.float32), scale_R, threshold_R)

    low_R = jnp.full_like(top_k, _LIGHT_BITS)
    unknown_R = jnp.full_like(top_k, jnp.iinfo(jnp.int32).max)
    k_R = jnp.where(by_k, _bisect(count, jnp.ones_like, top_k, low_R, unknown_R, by_k), 0)
    left_R = _when(jnp.any(by_k), lambda: jnp.where(by_k, weigh(k_R), total_R), total_R)
    need_R = jnp.clip(jnp.ceil(top_p * left_R.astype(jnp.float32)).astype(jnp.int32), 1, left_R)
    p_R = _bisect(weigh, lightest, need_R, jnp.maximum(low_R, k_R), left_R, by_p)
    return k_R, jnp.where(by_p, p_R, 0)


def _bisect(
    measure: Callable[[Array], Array],
    least: Callable[[Array], Array],
    need_R: Array,
    low_R: Array,
    at_low_R: Array,
    todo_R: Array,
) -> Array:
    """The largest threshold from low on whose `measure`, which falls with the threshold, is at least `need`.

    Any threshold that keeps the same tokens will do. So a row is done when only one token lies between the bounds:
    their measures differ by less than twice `least(low)`, the least that a token at or above low adds.
    """

    def is_open(low: Array, high: Array, at_low: Array, at_high: Array) -> Array:
        one_left = (least(low) > 0) & (at_low - at_high - least(low) < least(low))  # 2 * least might overflow
        return todo_R & (high - low > 1) & ~one_left

    def halve(bounds: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        low, high, at_low, at_high = bounds
        middle = low + (high - low) // 2
        found = measure(middle)
        up = is_open(*bounds) & (found >= need_R)
        down = is_open(*bounds) & (found < need_R)
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, found, at_low),
            jnp.where(down, found, at_high),
        )

    start = (low_R, jnp.full_like(low_R, _ONE_BITS + 1), at_low_R, jnp.zeros_like(low_R))
    return lax.while_loop(lambda bounds: jnp.any(is_open(*bounds)), halve, start)[0]
