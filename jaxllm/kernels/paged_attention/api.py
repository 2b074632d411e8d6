"""Attention of new tokens over paged keys and values: on each platform the first implementation that can do the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.kernels.paged_attention import cpu, decode_cuda, latent_cuda, prefill_cuda, reference
from jaxllm.kernels.paged_attention.types import Implementation

PLATFORMS = {"cpu": (cpu,), "cuda": (decode_cuda, prefill_cuda)}
"""Modules in the order in which their `choose(q, kv, pages, *, scale, softcap)` is asked for an Implementation, until
one does not raise NotImplementedError. Where all do, and on other platforms, the reference does the work."""

LATENT_PLATFORMS = {"cuda": (latent_cuda,)}
"""The same where keys are the values too; `choose` has `values` as well."""


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
    values: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of R rows of Q query tokens, each row over its own pages.

    A row is one decoding request (Q = 1) or one tile of a prompt (Q > 1); both kinds go through the same function. The
    keys and values of the query tokens themselves are already in the pages.

    Args:
      q_RQNH: queries, any float dtype; N is a multiple of K.
      kv_PYKOH: the page pool of one layer; Y is keys, then values; where Y is 1, the keys are the values too.
      pages_RW: int32, the pages of each row in order of position; entries past a row's end are never attended.
      positions_RQ: int32, the last key that each query token sees, which is its own position where a row holds the
        whole context. -1 where it sees nothing: its output is undefined but finite, its lse about -1e30.
      scale: factor on q·k.
      window: attend only to the last `window` positions, the query's own included; None for all.
      first_RQ: int32, in place of `window`: the first key that each query token sees; past positions_RQ, it sees none.
      softcap: scores become softcap * tanh(scores / softcap); None for none.
      values: where Y is 1, how many of a key's numbers are its value: the first ones; None for all.

    In place of q_RQNH there may be q_TNH: its last R * Q tokens are those of the rows, and results are of all T, where
    those of the tokens before are undefined. Nothing is copied then; raises NotImplementedError where no kernel can do
    that.

    Returns:
      out_RQNH in q's dtype, with H = `values` where given, and lse_RQN float32: the log of the sum of exponentiated
      scores, so that results over different parts of the context can be merged.
    """
    first_RQ = reference.first_visible(positions_RQ, window, first_RQ)
    branches: dict[str, Implementation] = {}
    how: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if q_RQNH.ndim == 3:
        return _after(q_RQNH, kv_PYKOH, pages_RW, positions_RQ, first_RQ, how)
    latent = kv_PYKOH.shape[1] == 1
    if latent:
        how["values"] = kv_PYKOH.shape[-1] if values is None else values
    platforms: Mapping[str, Sequence[Any]] = LATENT_PLATFORMS if latent else PLATFORMS
    for platform, modules in platforms.items():
        for module in modules:
            try:
                branches[platform] = module.choose(q_RQNH, kv_PYKOH, pages_RW, **how)
                break
            except NotImplementedError:
                continue
    default = partial(reference.attend, scale=scale, softcap=softcap, values=how.get("values"))
    arguments = (q_RQNH, kv_PYKOH, pages_RW, positions_RQ, first_RQ)
    # The program may be lowered for a GPU in a process whose default backend is a CPU (ahead-of-time compilation): what
    # it is lowered for decides.
    return lax.platform_dependent(*arguments, **branches, default=default) if branches else default(*arguments)


def _after(
    q_TNH: jax.Array,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    positions_RQ: jax.Array,
    first_RQ: jax.Array | None,
    how: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """`paged_attention` of the last tokens of q_TNH."""
    if kv_PYKOH.shape[1] == 1:
        raise NotImplementedError("keys that are the values too")
    (R, Q), before = positions_RQ.shape, len(q_TNH) - positions_RQ.size
    rows = jax.ShapeDtypeStruct((R, Q, *q_TNH.shape[1:]), q_TNH.dtype)
    kernel = prefill_cuda.choose(rows, kv_PYKOH, pages_RW, before=before, **how)

    def plain(q_TNH: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
        found = reference.attend(q_TNH[before:].reshape(rows.shape), *others, **how)
        out, lse = (x.reshape(R * Q, *x.shape[2:]) for x in found)
        return jnp.pad(out, ((before, 0), (0, 0), (0, 0))), jnp.pad(lse, ((before, 0), (0, 0)))

    arguments = (q_TNH, kv_PYKOH, pages_RW, positions_RQ, first_RQ)
    return lax.platform_dependent(*arguments, cuda=kernel, default=plain)
