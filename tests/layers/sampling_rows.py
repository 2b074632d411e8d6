"""Rows of logits through `layers/sampling.py`, and what plain numpy makes of them (it sorts)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.layers import draw, sampling
from jaxllm.layers.sampling import SamplingBatch, sample

INT_FIELDS = {"top_k", "position", "slot", "bias_row", "bias_token"}


def make_batch(rows, bias=(), bias_capacity=None, **values):
    """A SamplingBatch of neutral rows, with `values` (scalars or one per row) put in."""
    capacity = len(bias) if bias_capacity is None else bias_capacity
    pad = capacity - len(bias)
    fields = dict.fromkeys(("temperature", "top_k", "min_p", "presence", "frequency", "seed"), 0)
    fields |= {"top_p": 1.0, "repetition": 1.0, "position": 7, "slot": np.arange(rows)} | values
    fields = {name: np.broadcast_to(value, (rows,)) for name, value in fields.items()}
    fields["bias_row"] = np.array([row for row, _, _ in bias] + [rows] * pad)
    fields["bias_token"] = np.array([token for _, token, _ in bias] + [0] * pad)
    fields["bias_value"] = np.array([value for _, _, value in bias] + [1.0] * pad)
    dtype = {name: jnp.int32 if name in INT_FIELDS else jnp.float32 for name in fields} | {"seed": jnp.uint32}
    return SamplingBatch(**{name: jnp.asarray(value, dtype[name]) for name, value in fields.items()})


@functools.cache
def compiled(vocab_size, penalties, num_logprobs):
    return jax.jit(functools.partial(sample, vocab_size=vocab_size, penalties=penalties, num_logprobs=num_logprobs))


def run(logits, batch, state=None, vocab_size=None, num_logprobs=0, penalties=None):
    penalties = state is not None if penalties is None else penalties
    logits = jnp.asarray(logits)
    return compiled(vocab_size or logits.shape[1], penalties, num_logprobs)(logits, batch, state)


def tokens(logits, batch, **kw):
    return np.asarray(run(logits, batch, **kw)[0].token_R)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution of one row, the plain way: sort, cut, renormalise. Ties with the last kept token stay."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    if top_k and top_k < len(p):
        p = np.where(p >= np.sort(p)[::-1][top_k - 1], p, 0)
    p /= p.sum()
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        last = min(np.searchsorted(np.cumsum(ordered), top_p * (1 - 1e-7)), len(p) - 1)
        p = np.where(p >= ordered[last], p, 0)
    p = np.where(p >= min_p * p.max() * (1 - 1e-7), p, 0)
    return p / p.sum()


def draw_many(row, count, vocab_size=None, **values):
    """`count` tokens drawn from one row of logits, with other seeds, 50 rows a call."""
    row = np.asarray(row, np.float32)
    drawn = []
    for start in range(0, count, 50):
        batch = make_batch(50, seed=np.arange(start, start + 50), **values)
        drawn.append(tokens(np.broadcast_to(row, (50, len(row))), batch, vocab_size=vocab_size))
    return np.concatenate(drawn)


def kept_by_device(logits, temperature, top_k, top_p):
    """The set that the device's threshold keeps, per row: the filter itself, without a draw."""

    def mask(x, temperature, top_k, top_p):
        blocks = sampling._in_blocks(x, x.shape[1])
        top = blocks.max((1, 2))
        e = jnp.exp((blocks - top[:, None, None]) / temperature[:, None, None])
        threshold = draw._top_k_top_p(e, draw._weight_scale(e), top_k, top_p)
        kept = jax.lax.bitcast_convert_type(e, jnp.int32) >= threshold[:, None, None]
        return kept.reshape(x.shape[0], -1)[:, : x.shape[1]]

    rows = len(logits)
    args = (
        jnp.asarray(logits, jnp.float32),
        jnp.full((rows,), temperature, jnp.float32),
        jnp.full((rows,), top_k, jnp.int32),
        jnp.full((rows,), top_p, jnp.float32),
    )
    return np.asarray(jax.jit(mask)(*args))


def logits_like(shape, spread, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * spread).astype(np.float32)
