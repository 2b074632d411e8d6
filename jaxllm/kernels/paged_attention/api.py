"""Attention of new tokens over paged keys and values: the first implementation that can do the job does it."""

from __future__ import annotations

import jax

from jaxllm.kernels.paged_attention import cpu, reference

IMPLEMENTATIONS = (
    cpu.paged_attention,
    reference.paged_attention,
)


def paged_attention(
    q_RQNH: jax.Array,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    positions_RQ: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    first_RQ: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of R rows of Q query tokens, each row over its own pages.

    A row is one decoding request (Q = 1) or one tile of a prompt (Q > 1); both kinds go through the same function. The
    keys and values of the query tokens themselves are already in the pages.

    Args:
      q_RQNH: queries, any float dtype; N is a multiple of K.
      kv_PYKOH: the page pool of one layer; Y is keys, then values.
      pages_RW: int32, the pages of each row in order of position; entries past a row's end are never attended.
      positions_RQ: int32, the last key that each query token sees, which is its own position where a row holds the
        whole context. -1 where it sees nothing: its output is undefined but finite, its lse about -1e30.
      scale: factor on q·k.
      window: attend only to the last `window` positions, the query's own included; None for all.
      first_RQ: int32, in place of `window`: the first key that each query token sees; past positions_RQ, it sees none.
      softcap: scores become softcap * tanh(scores / softcap); None for none.

    Returns:
      out_RQNH in q's dtype, and lse_RQN float32: the log of the sum of exponentiated scores, so that results over
      different parts of the context can be merged.
    """
    reasons = []
    for implementation in IMPLEMENTATIONS:
        try:
            return implementation(
                q_RQNH,
                kv_PYKOH,
                pages_RW,
                positions_RQ,
                scale=scale,
                window=window,
                softcap=softcap,
                first_RQ=first_RQ,
            )
        except NotImplementedError as reason:
            reasons.append(f"{implementation.__module__}: {reason}")
    raise NotImplementedError("no implementation of paged attention applies: " + "; ".join(reasons))
