"""Token embedding and output head, both with vocabulary rows split over ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.kernels.linear.api import matmul, num_rows, take_rows
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.layers.draw import take_block
from jaxllm.layers.quantize import Declared, param
from jaxllm.parallel.collectives import Axes, all_gather, exchange_rows, gather_rows, rank, ranks, sum_partial

EXACT = 1 << 24
"""Integers up to this are floats of 32 bits."""
MANY = 1 << 22
"""Logits that take a GPU longer to read again than the small kernels take that save it."""


class VocabTable(nnx.Module):
    """A `[vocab, D]` table that embeds tokens, makes logits, or (tied embeddings) both.

    axes: the mesh axes that its rows are split over. tokens: those that the tokens of a step are split over, where the
    ranks of one table have different ones (attention data parallelism).
    """

    def __init__(self, weight: Declared, vocab_size: int, *, axes: Axes, tokens: Axes = ()):
        self.weight = param(weight)
        self.vocab_size = vocab_size
        self.axes = axes
        self.tokens = tokens

    def embed(self, tokens_T: jax.Array, spread: Axes = ()) -> jax.Array:
        """Rows of the table for tokens_T, [T, D]; each rank looks up its own rows and the sum puts them together.

        spread: the ranks over which the result's rows are split.
        """
        table = self.weight[...]
        assert not isinstance(table, QuantizedWeight)
        rows = num_rows(table)
        local = gather_rows(tokens_T, self.tokens) - rank(self.axes) * rows
        mine = (local >= 0) & (local < rows)
        found_TD = jnp.where(mine[:, None], take_rows(table, jnp.clip(local, 0, rows - 1)), 0)
        return sum_partial(found_TD, self.axes, self.tokens or spread)

    def logits(self, x_RD: jax.Array, softcap: float | None) -> jax.Array:
        """See `vocab_logits`."""
        return vocab_logits(x_RD, self.weight[...], self.vocab_size, softcap, self.axes)


def vocab_logits(x_RD: jax.Array, table_VD: Weight, vocab_size: int, softcap: float | None, axes: Axes) -> jax.Array:
    """float32 logits of this rank's rows of the vocabulary, [R, V / ranks]; rows past the vocabulary are -inf."""
    logits_RV = matmul(x_RD, table_VD)
    if softcap is not None:
        logits_RV = softcap * jnp.tanh(logits_RV / softcap)
    rows = num_rows(table_VD)
    if rows * ranks(axes) > vocab_size:
        logits_RV = jnp.where(rank(axes) * rows + jnp.arange(rows) < vocab_size, logits_RV, -jnp.inf)
    return logits_RV


def _best(values_RV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row, and the lowest index that holds it; the last index if there is a NaN.

    Not argmax, which XLA:CPU does not vectorise.
    """
    best_R = values_RV.max(axis=-1)
    return best_R, _first(values_RV, best_R)


def _best_of_blocks(values_RV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_best`, reading everything once: of a row only the first block that holds the maximum is read again."""
    R, V = values_RV.shape
    block = next((size for size in (256, 128) if V % size == 0 and size < V), V)
    blocks_RNL = values_RV.reshape(R, V // block, block)
    best_R, block_R = _best(blocks_RNL.max(axis=-1))
    return best_R, block_R * block + _first(take_block(blocks_RNL, block_R), best_R)


def _first(values_RV: jax.Array, best_R: jax.Array) -> jax.Array:
    """The lowest index of each row with at least this value; the last one if there is none."""
    V = values_RV.shape[1]
    return jnp.where(values_RV >= best_R[:, None], jnp.arange(V, dtype=jnp.int32), V - 1).min(axis=-1)


def greedy(logits_RV: jax.Array, axes: Axes) -> jax.Array:
    """The most likely token of each row, int32 [R], from logits split over `axes`.

    Only each rank's maximum crosses the wire, never the logits. Ties go to the lowest token id, as on one device.
    """
    best = _best if logits_RV.size < MANY else _best_of_blocks
    best_R, local_R = lax.platform_dependent(logits_RV, cpu=_best, default=best)
    token_R = local_R + rank(axes) * logits_RV.shape[1]
    if ranks(axes) == 1:
        return token_R
    R, exchanged = logits_RV.shape[0], None
    if ranks(axes) * logits_RV.shape[1] <= EXACT:
        exchanged = exchange_rows(jnp.concatenate([best_R, token_R.astype(jnp.float32)]), axes)
    if exchanged is None:
        all_best, all_token = all_gather(best_R, axes), all_gather(token_R, axes)
    else:
        all_best, all_token = exchanged[:, :R], exchanged[:, R:].astype(jnp.int32)
    winner = jnp.argmax(all_best, axis=0)
    return jnp.take_along_axis(all_token, winner[None], axis=0)[0]
