"""From logits to tokens on the device: penalties, bias, filters and the draw, without sorting the vocabulary.

Letters of shapes: R rows of the step, V vocabulary (padded), W slots, X likeliest tokens reported, N blocks of the
vocabulary, C blocks kept as candidates, L tokens in a block, U words of 32 tokens.

How a row is sampled:

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

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax

_BLOCK = 128  # L: one cache line row on CPU, one warp row on GPU; common vocabularies are multiples of it
_CANDIDATE_BLOCKS = 64  # C: holds any top-k up to 63, and most nuclei
_MAX_COUNT = (1 << 14) - 1  # largest output count that PenaltyState holds
_ONE_BITS = 0x3F800000  # bit pattern of 1.0, the largest value of e
_LIGHT_BITS = 0x2F800000  # bit pattern of 2**-32: anything smaller weighs 0, because no scale exceeds 2**31
_GROUP_ELEMENTS = 400_000  # logits handled at a time on a CPU: 1.6 MB, within a core's second-level cache
_WEIGHT_BUDGET = 2130706432.0  # 127/128 of 2**31: room for rounding each weight up


@flax.struct.dataclass
class SamplingBatch:
    """What each of R rows asks for. Rows whose result is ignored may hold anything valid, with `slot` out of range.

    Attributes:
      temperature: f32 [R], 0 = greedy.
      top_k: i32 [R], 0 = all. top_p: f32 [R], 1 = all. min_p: f32 [R], 0 = all.
      seed: u32 [R]. position: i32 [R], position in the sequence of the token to be sampled.
      slot: i32 [R], row of PenaltyState, each used once; out of range (e.g. W) = neither read nor updated.
      repetition: f32 [R], 1 = none. presence, frequency: f32 [R], 0 = none.
      bias_row, bias_token: i32 [M], bias_value: f32 [M], added to the logits; -inf bans a token. Entries whose row is
        out of range (e.g. R) are padding. M = 0 compiles the bias away.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array
    position: Array
    slot: Array
    repetition: Array
    presence: Array
    frequency: Array
    bias_row: Array
    bias_token: Array
    bias_value: Array


@flax.struct.dataclass
class PenaltyState:
    """What each slot's sequence has said: i16 [W, V], 2 * (times generated, at most 16383) + (1 if in the prompt)."""

    seen_WV: Array


@flax.struct.dataclass
class SampleOutput:
    """The sampled tokens, and what the model's own distribution (before penalties, bias, filters) says of them.

    Attributes:
      token_R: i32 [R]. logprob_R: f32 [R], of the token; rank_R: i32 [R], 1 = the likeliest.
      top_logprobs_RX: f32 [R, X], top_ids_RX: i32 [R, X]: the X likeliest, ties by lower id.
    With num_logprobs = 0 nothing about probabilities is computed: logprob_R and rank_R are 0 and X is 0.
    """

    token_R: Array
    logprob_R: Array
    rank_R: Array
    top_logprobs_RX: Array
    top_ids_RX: Array


def init_penalties(num_slots: int, padded_vocab: int) -> PenaltyState:
    """A PenaltyState in which no slot has seen anything: 2 bytes per slot and token of the vocabulary."""
    return PenaltyState(jnp.zeros((num_slots, padded_vocab), jnp.int16))


def init_masks(num_slots: int, padded_vocab: int) -> Array:
    """i32 [W, U]: the tokens that each slot may choose from, a bit for each; all of them."""
    return jnp.full((num_slots, -(-padded_vocab // _BLOCK) * _BLOCK // 32), -1, jnp.int32)


def set_masks(masks_WU: Array, slot_M: Array, words_MU: Array) -> Array:
    """The masks (to be donated) with those of M distinct slots replaced; out of range = ignored."""
    return masks_WU.at[slot_M].set(words_MU, mode="drop")


def reset_slots(state: PenaltyState, slot_M: Array, tokens_ML: Array, prompt_len_M: Array) -> PenaltyState:
    """Start M slots anew with the tokens their sequences hold so far.

    Args:
      state: the state, to be donated.
      slot_M: i32 [M], distinct; out of range (e.g. W) = ignored.
      tokens_ML: i32 [M, L], prompt then outputs already known (a preempted sequence has some); pad with -1.
      prompt_len_M: i32 [M], tokens from here on are outputs and are counted.
    """
    num_slots, vocab = state.seen_WV.shape
    m, length = tokens_ML.shape
    token = jnp.where(tokens_ML < 0, vocab, tokens_ML)  # jax wraps negative indices before it drops any
    row = jnp.broadcast_to(jnp.arange(m)[:, None], token.shape)
    is_prompt = jnp.arange(length)[None, :] < prompt_len_M[:, None]
    fresh = jnp.zeros((m, vocab), jnp.int32)
    counts = fresh.at[row, jnp.where(is_prompt, vocab, token)].add(1, mode="drop")
    prompt = fresh.at[row, jnp.where(is_prompt, token, vocab)].max(1, mode="drop")
    seen = (2 * jnp.minimum(counts, _MAX_COUNT) + prompt).astype(jnp.int16)
    slot = jnp.where(slot_M < 0, num_slots, slot_M)
    return PenaltyState(state.seen_WV.at[slot].set(seen, mode="drop"))


def sample(
    logits_RV: Array,
    batch: SamplingBatch,
    state: PenaltyState | None,
    vocab_size: int,
    *,
    penalties: bool,
    num_logprobs: int,
    masks_WU: Array | None = None,
) -> tuple[SampleOutput, PenaltyState | None]:
    """Sample one token per row.

    Args:
      logits_RV: [R, V] any float; columns from vocab_size on are padding. NaN counts as -inf and +inf as the largest
        float; a row with nothing above -inf gives token 0.
      batch: what each row asks for.
      state: history for the penalties (donate it), or None.
      vocab_size: static, real tokens.
      penalties: static; False skips the penalties. The state is updated whenever it is given.
      num_logprobs: static, X likeliest tokens to report; 0 = no logprobs at all.
      masks_WU: which tokens each slot may choose from, as `init_masks` has it; None = all. A token that is masked is
        never chosen, whatever its bias; logprobs are those of the model without masks.

    Returns: (SampleOutput, the state with the sampled tokens counted).
    Raises: ValueError at trace time for penalties without a state.
    """
    if penalties and state is None:
        raise ValueError("penalties=True needs a PenaltyState: make one with init_penalties()")
    history = state if penalties else None

    def rows(logits: Array, batch: SamplingBatch) -> SampleOutput:
        return _sample_rows(logits, batch, history, masks_WU, vocab_size, num_logprobs)

    with jax.named_scope("sample"):
        output = lax.platform_dependent(
            logits_RV, batch, cpu=lambda logits, batch: _in_groups(rows, logits, batch), default=rows
        )
        if state is not None:
            state = _count(state, batch.slot, output.token_R)
        return output, state


def token_logprobs(logits_RV: Array, token_R: Array, vocab_size: int, *, num_logprobs: int) -> SampleOutput:
    """Logprobs of given tokens i32 [R] instead of sampled ones (for prompt_logprobs); as `sample` reports them."""
    with jax.named_scope("token_logprobs"):
        return _with_logprobs(_in_blocks(logits_RV, vocab_size), token_R, num_logprobs)


def _in_groups(rows: Callable[..., SampleOutput], logits_RV: Array, batch: SamplingBatch) -> SampleOutput:
    """`rows` over a few rows at a time, which stay in a core's cache over the passes."""
    num_rows, width = logits_RV.shape
    fits = max(1, _GROUP_ELEMENTS // width)
    size = next(size for size in range(min(fits, num_rows), 0, -1) if num_rows % size == 0)
    if size == num_rows:
        return rows(logits_RV, batch)

    def group(start: Array) -> SampleOutput:
        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, start, size)

        part = SamplingBatch(
            **{name: cut(value) for name, value in vars(batch).items() if not name.startswith("bias_")},
            bias_row=jnp.where(batch.bias_row < 0, size, batch.bias_row - start),
            bias_token=batch.bias_token,
            bias_value=batch.bias_value,
        )
        return rows(cut(logits_RV), part)

    output = lax.map(group, jnp.arange(0, num_rows, size))
    return jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), output)


def _sample_rows(
    logits_RV: Array,
    batch: SamplingBatch,
    history: PenaltyState | None,
    masks_WU: Array | None,
    vocab_size: int,
    num_logprobs: int,
) -> SampleOutput:
    raw_RNL = adjusted_RNL = _in_blocks(logits_RV, vocab_size)
    if batch.bias_row.shape[0]:
        adjusted_RNL = _add_bias(adjusted_RNL, batch, vocab_size)
    if history is not None:
        adjusted_RNL = _penalise(adjusted_RNL, batch, history)
    if masks_WU is not None:
        adjusted_RNL = _mask(adjusted_RNL, batch, masks_WU)
    return _with_logprobs(raw_RNL, _choose(adjusted_RNL, batch), num_logprobs)


def _in_blocks(logits_RV: Array, vocab_size: int) -> Array:
    """f32 [R, N, L], padded with -inf to whole blocks. `_clean` does the rest where the values are used."""
    rows, width = logits_RV.shape
    logits_RV = logits_RV.astype(jnp.float32)
    if vocab_size < width:
        is_token = lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1) < vocab_size
        logits_RV = jnp.where(is_token, logits_RV, -jnp.inf)
    padded = jnp.pad(logits_RV, ((0, 0), (0, -width % _BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(rows, -1, _BLOCK)


def _clean(logits: Array) -> Array:
    """NaN to -inf, +inf to the largest float: at every use, where XLA fuses it, because one more array costs more."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, jnp.finfo(jnp.float32).max))


def _add_bias(logits_RNL: Array, batch: SamplingBatch, vocab_size: int) -> Array:
    rows = logits_RNL.shape[0]
    row = jnp.where(batch.bias_row < 0, rows, batch.bias_row)  # jax wraps negative indices before it drops any
    is_token = (batch.bias_token >= 0) & (batch.bias_token < vocab_size)
    row = jnp.where(is_token, row, rows)
    token = jnp.where(is_token, batch.bias_token, 0)
    # A ban has to win over a logit of NaN or +inf.
    flat = _clean(logits_RNL).reshape(rows, -1)
    return flat.at[row, token].add(batch.bias_value, mode="drop").reshape(logits_RNL.shape)


def _penalise(logits_RNL: Array, batch: SamplingBatch, history: PenaltyState) -> Array:
    """Repetition first, then frequency and presence, as Hugging Face transformers and vLLM define them."""
    rows, blocks, _ = logits_RNL.shape
    num_slots, width = history.seen_WV.shape
    slot = jnp.where(batch.slot < 0, num_slots, batch.slot)
    seen_RV = history.seen_WV.at[slot].get(mode="fill", fill_value=0)
    seen_RV = jnp.pad(seen_RV, ((0, 0), (0, max(0, blocks * _BLOCK - width))))[:, : blocks * _BLOCK]
    seen_RNL = seen_RV.reshape(rows, blocks, _BLOCK)
    logits_RNL = _clean(logits_RNL)
    factor = jnp.where(seen_RNL > 0, batch.repetition[:, None, None], 1.0)
    logits_RNL = jnp.where(logits_RNL > 0, logits_RNL / factor, logits_RNL * factor)
    count_RNL = (seen_RNL >> 1).astype(jnp.float32)
    presence = jnp.where(count_RNL > 0, batch.presence[:, None, None], 0.0)
    return logits_RNL - batch.frequency[:, None, None] * count_RNL - presence


def _mask(logits_RNL: Array, batch: SamplingBatch, masks_WU: Array) -> Array:
    slot = jnp.where(batch.slot < 0, masks_WU.shape[0], batch.slot)
    words_RU = masks_WU.at[slot].get(mode="fill", fill_value=-1)
    bits_RUB = (words_RU[:, :, None] >> lax.broadcasted_iota(jnp.int32, (1, 1, 32), 2)) & 1
    return jnp.where(bits_RUB.reshape(logits_RNL.shape) == 1, logits_RNL, -jnp.inf)


def _count(state: PenaltyState, slot_R: Array, token_R: Array) -> PenaltyState:
    slot = jnp.where(slot_R < 0, state.seen_WV.shape[0], slot_R)
    seen = state.seen_WV.at[slot, token_R].get(mode="fill", fill_value=0)
    seen = jnp.where(seen >> 1 < _MAX_COUNT, seen + 2, seen)
    return PenaltyState(state.seen_WV.at[slot, token_R].set(seen.astype(jnp.int16), mode="drop"))


def _with_logprobs(raw_RNL: Array, token_R: Array, num_logprobs: int) -> SampleOutput:
    rows, blocks, _ = raw_RNL.shape
    if num_logprobs == 0:
        zero = jnp.zeros((rows,), jnp.int32)
        return SampleOutput(token_R, jnp.zeros((rows,)), zero, jnp.zeros((rows, 0)), jnp.zeros((rows, 0), jnp.int32))
    block_max_RN = jnp.max(_clean(raw_RNL), -1)
    top_R = _finite(jnp.max(block_max_RN, -1))
    lse_R = top_R + jnp.log(jnp.sum(jnp.exp(_clean(raw_RNL) - top_R[:, None, None]), (-1, -2)))
    chosen_RL = _clean(_take_block(raw_RNL, token_R // _BLOCK))
    chosen_R = jnp.take_along_axis(chosen_RL, token_R[:, None] % _BLOCK, 1)[:, 0]
    rank_R = 1 + jnp.sum((_clean(raw_RNL) > chosen_R[:, None, None]).astype(jnp.int32), (-1, -2))
    # The X likeliest lie in the X blocks with the largest maxima; in order of index, so that ties go to the lower id.
    blocks_RX = jnp.sort(lax.top_k(block_max_RN, min(num_logprobs, blocks))[1], -1)
    near = _clean(jnp.take_along_axis(raw_RNL, blocks_RX[:, :, None], 1)).reshape(rows, -1)
    top_RX, place_RX = lax.top_k(near, num_logprobs)
    ids_RX = jnp.take_along_axis(blocks_RX, place_RX // _BLOCK, 1) * _BLOCK + place_RX % _BLOCK
    return SampleOutput(token_R, chosen_R - lse_R, rank_R, top_RX - lse_R[:, None], ids_RX)


def _finite(top_R: Array) -> Array:
    """The largest logit as something to subtract: 0 for a row of nothing but -inf."""
    return jnp.where(jnp.isneginf(top_R), 0.0, top_R)


def _take_block(x_RNL: Array, block_R: Array) -> Array:
    return jnp.take_along_axis(x_RNL, block_R[:, None, None], 1)[:, 0]


def _when(predicate: Array, value: Callable[[], Array], otherwise: Array) -> Array:
    """`value()` if the predicate holds, else `otherwise`: lax.cond as a loop of at most one turn.

    XLA:CPU spreads the body of a loop over its threads, and the branches of a conditional not.
    """
    start = (predicate, otherwise)
    return lax.while_loop(lambda carry: carry[0], lambda carry: (jnp.zeros_like(predicate), value()), start)[1]


def _choose(logits_RNL: Array, batch: SamplingBatch) -> Array:
    """Token of each row: the first of the largest where greedy, drawn otherwise."""
    block_max_RN = jnp.max(_clean(logits_RNL), -1)
    # argmax over V in two levels: XLA:CPU does not vectorise argmax, but it does vectorise max.
    block_R = jnp.argmax(block_max_RN, -1)
    place_R = jnp.argmax(_clean(_take_block(logits_RNL, block_R)), -1)
    likeliest_R = (block_R * _BLOCK + place_R).astype(jnp.int32)
    draws_R = (batch.temperature > 0) & (batch.top_k != 1)

    def draw() -> Array:
        inverse_R = 1.0 / jnp.where(draws_R, batch.temperature, 1.0)
        top_R = _finite(jnp.max(block_max_RN, -1))
        e_RNL = jnp.exp((_clean(logits_RNL) - top_R[:, None, None]) * inverse_R[:, None, None])
        e_RNL = lax.optimization_barrier(e_RNL)  # every use must see the same bits
        scale_R = _weight_scale(e_RNL)
        top_k = jnp.where(draws_R, batch.top_k, 0)
        top_p = jnp.where(draws_R, batch.top_p, 1.0)
        threshold_R = _when(
            jnp.any((top_k > 0) | (top_p < 1)),
            lambda: _top_k_top_p(e_RNL, scale_R, top_k, top_p),
            jnp.zeros_like(top_k),
        )
        min_p_R = lax.bitcast_convert_type(jnp.clip(batch.min_p, 0.0, 1.0), jnp.int32)
        threshold_R = jnp.maximum(threshold_R, min_p_R)
        drawn_R, total_R = _inverse_cdf(e_RNL, scale_R, threshold_R, _random_bits(batch.seed, batch.position))
        return jnp.where(draws_R & (total_R > 0), drawn_R, likeliest_R)

    return _when(jnp.any(draws_R), draw, likeliest_R)


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
    safe_R = (_WEIGHT_BUDGET * 65536.0 / _BLOCK) / bound_R
    total_R = jnp.sum(_weights(e_RNL, safe_R, jnp.zeros_like(safe_R, jnp.int32)), (-1, -2)).astype(jnp.float32)
    lost = 0.5 * e_RNL.shape[1] * _BLOCK  # the most that rounding can have taken away
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
    end_RL = jnp.cumsum(_weights(_take_block(e_RNL, block_R), scale_R, threshold_R), -1)
    inside_R = jnp.sum((end_RL <= (place_R - before_R)[:, None]).astype(jnp.int32), -1)
    return block_R * _BLOCK + jnp.minimum(inside_R, _BLOCK - 1), total_R


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
