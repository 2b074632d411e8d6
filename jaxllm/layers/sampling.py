"""From logits to tokens on the device: bias, penalties, masks, the draw (`layers/draw.py`) and logprobs.

Letters of shapes: R rows of the step, V vocabulary (padded), W slots, X likeliest tokens reported, N blocks of the
vocabulary, L tokens in a block, U words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxllm.layers.draw import BLOCK, choose, clean, finite, take_block

_MAX_COUNT = (1 << 14) - 1  # largest output count that PenaltyState holds
_GROUP_ELEMENTS = 400_000  # logits handled at a time on a CPU: 1.6 MB, within a core's second-level cache


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
    return jnp.full((num_slots, -(-padded_vocab // BLOCK) * BLOCK // 32), -1, jnp.int32)


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
    token_R = choose(
        adjusted_RNL,
        temperature=batch.temperature,
        top_k=batch.top_k,
        top_p=batch.top_p,
        min_p=batch.min_p,
        seed=batch.seed,
        position=batch.position,
    )
    return _with_logprobs(raw_RNL, token_R, num_logprobs)


def _in_blocks(logits_RV: Array, vocab_size: int) -> Array:
    """f32 [R, N, L], padded with -inf to whole blocks. `clean` does the rest where the values are used."""
    rows, width = logits_RV.shape
    logits_RV = logits_RV.astype(jnp.float32)
    if vocab_size < width:
        is_token = lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1) < vocab_size
        logits_RV = jnp.where(is_token, logits_RV, -jnp.inf)
    padded = jnp.pad(logits_RV, ((0, 0), (0, -width % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(rows, -1, BLOCK)


def _add_bias(logits_RNL: Array, batch: SamplingBatch, vocab_size: int) -> Array:
    rows = logits_RNL.shape[0]
    row = jnp.where(batch.bias_row < 0, rows, batch.bias_row)  # jax wraps negative indices before it drops any
    is_token = (batch.bias_token >= 0) & (batch.bias_token < vocab_size)
    row = jnp.where(is_token, row, rows)
    token = jnp.where(is_token, batch.bias_token, 0)
    # A ban has to win over a logit of NaN or +inf.
    flat = clean(logits_RNL).reshape(rows, -1)
    return flat.at[row, token].add(batch.bias_value, mode="drop").reshape(logits_RNL.shape)


def _penalise(logits_RNL: Array, batch: SamplingBatch, history: PenaltyState) -> Array:
    """Repetition first, then frequency and presence, as Hugging Face transformers and vLLM define them."""
    rows, blocks, _ = logits_RNL.shape
    num_slots, width = history.seen_WV.shape
    slot = jnp.where(batch.slot < 0, num_slots, batch.slot)
    seen_RV = history.seen_WV.at[slot].get(mode="fill", fill_value=0)
    seen_RV = jnp.pad(seen_RV, ((0, 0), (0, max(0, blocks * BLOCK - width))))[:, : blocks * BLOCK]
    seen_RNL = seen_RV.reshape(rows, blocks, BLOCK)
    logits_RNL = clean(logits_RNL)
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
    block_max_RN = jnp.max(clean(raw_RNL), -1)
    top_R = finite(jnp.max(block_max_RN, -1))
    lse_R = top_R + jnp.log(jnp.sum(jnp.exp(clean(raw_RNL) - top_R[:, None, None]), (-1, -2)))
    chosen_RL = clean(take_block(raw_RNL, token_R // BLOCK))
    chosen_R = jnp.take_along_axis(chosen_RL, token_R[:, None] % BLOCK, 1)[:, 0]
    rank_R = 1 + jnp.sum((clean(raw_RNL) > chosen_R[:, None, None]).astype(jnp.int32), (-1, -2))
    # The X likeliest lie in the X blocks with the largest maxima; in order of index, so that ties go to the lower id.
    blocks_RX = jnp.sort(lax.top_k(block_max_RN, min(num_logprobs, blocks))[1], -1)
    near = clean(jnp.take_along_axis(raw_RNL, blocks_RX[:, :, None], 1)).reshape(rows, -1)
    top_RX, place_RX = lax.top_k(near, num_logprobs)
    ids_RX = jnp.take_along_axis(blocks_RX, place_RX // BLOCK, 1) * BLOCK + place_RX % BLOCK
    return SampleOutput(token_R, chosen_R - lse_R, rank_R, top_RX - lse_R[:, None], ids_RX)
