"""Grouped-query attention over paged keys and values.

The tokens of a step lie in one flat axis T: first one token for each decoding request, then tiles of prompt tokens,
each tile from one prompt. Projections run on all of them at once; only attention itself tells the two kinds apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.kernels.paged_attention.api import paged_attention
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rope import rotate
from jaxllm.parallel.heads import HeadLayout
from jaxllm.parallel.layout import Layout

KVPages = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, k_PKOH and v_PKOH. Page 0 is nobody's and absorbs the writes of padding tokens."""


@partial(jax.tree_util.register_dataclass, data_fields=["positions_T", "pages_RW"], meta_fields=["decodes", "tile"])
@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of a step stand: T = decodes + tiles * tile, R = decodes + tiles.

    positions_T: int32, absolute position of each token, -1 for padding.
    pages_RW: int32, the pages of each decoding request, then of each tile.
    """

    decodes: int
    tile: int
    positions_T: jax.Array
    pages_RW: jax.Array

    @property
    def tiles(self) -> int:
        return self.pages_RW.shape[0] - self.decodes


class Attention(nnx.Module):
    """Attention of one layer; each rank holds `heads.q_heads` query heads and `heads.kv_heads` KV heads."""

    def __init__(
        self,
        qkv: ColumnLinear,
        out: RowLinear,
        heads: HeadLayout,
        layout: Layout,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ):
        self.qkv = qkv
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.heads = heads
        self.layout = layout
        self.head_dim = head_dim
        self.scale = scale
        self.window = window
        self.softcap = softcap

    def __call__(
        self, x_TD: jax.Array, rope: tuple[jax.Array, jax.Array], kv: KVPages, batch: AttentionBatch
    ) -> tuple[jax.Array, KVPages]:
        T, N, K, H = x_TD.shape[0], self.heads.q_heads, self.heads.kv_heads, self.head_dim
        qkv = self.qkv(x_TD).reshape(T, N + 2 * K, H)
        q_TNH, k_TKH, v_TKH = qkv[:, :N], qkv[:, N : N + K], qkv[:, N + K :]
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH, k_TKH = rotate(q_TNH, *rope), rotate(k_TKH, *rope)
        with jax.named_scope("kv_write"):
            kv = write_pages(kv, k_TKH, v_TKH, batch)
        with jax.named_scope("paged_attention"):
            out_TNH = self._attend(q_TNH, kv, batch)
        return self.out(out_TNH.reshape(T, N * H)), kv

    def _attend(self, q_TNH: jax.Array, kv: KVPages, batch: AttentionBatch) -> jax.Array:
        D = batch.decodes
        parts = []
        for tokens, rows, length in ((slice(0, D), slice(0, D), 1), (slice(D, None), slice(D, None), batch.tile)):
            pages_RW = batch.pages_RW[rows]
            R = pages_RW.shape[0]
            if R == 0:
                continue
            out, _ = paged_attention(
                q_TNH[tokens].reshape(R, length, *q_TNH.shape[1:]),
                *kv,
                pages_RW,
                batch.positions_T[tokens].reshape(R, length),
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
            )
            parts.append(out.reshape(R * length, *q_TNH.shape[1:]))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def write_pages(kv: KVPages, k_TKH: jax.Array, v_TKH: jax.Array, batch: AttentionBatch) -> KVPages:
    """Stores the keys and values of a step's tokens in their pages; padding goes to page 0."""
    k_PKOH, v_PKOH = kv
    page_size = k_PKOH.shape[2]
    D = batch.decodes
    position = jnp.maximum(batch.positions_T, 0)
    row_T = jnp.concatenate([jnp.arange(D), D + jnp.repeat(jnp.arange(batch.tiles), batch.tile)])
    page_T = jnp.where(batch.positions_T >= 0, batch.pages_RW[row_T, position // page_size], 0)
    slot_T = position % page_size
    return (
        k_PKOH.at[page_T, :, slot_T].set(k_TKH.astype(k_PKOH.dtype)),
        v_PKOH.at[page_T, :, slot_T].set(v_TKH.astype(v_PKOH.dtype)),
    )
