"""Grouped-query attention over paged keys and values.

The tokens of a step lie in one flat axis T: first one token for each decoding request, then tiles of prompt tokens,
each tile from one prompt. Projections run on all of them at once; only attention itself tells the two kinds apart.
"""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from jaxllm.kernels.linear.product import Activations, Product
from jaxllm.kernels.paged_attention import rope_cuda
from jaxllm.kernels.paged_attention.api import paged_attention
from jaxllm.kernels.rope_write.api import finishes, rope_write
from jaxllm.kernels.rope_write.reference import rotate
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.quantize import param
from jaxllm.layers.stream import Stream
from jaxllm.mapping import CpType
from jaxllm.parallel import helix, ring, star, ulysses
from jaxllm.parallel.collectives import Axes, ranks
from jaxllm.parallel.context import AttentionBatch, Kernel, KVPages, places
from jaxllm.parallel.heads import HeadLayout
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec

METHODS = {
    CpType.ULYSSES: ulysses.attention,
    CpType.STAR: star.attention,
    CpType.RING: ring.attention,
    CpType.HELIX: helix.attention,
}
"""Attention by the kind of context parallelism; `Attention._attend` without any."""


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
        sinks: ParamSpec | None = None,
    ):
        self.qkv = qkv
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.sinks = None if sinks is None else param(sinks)
        self.heads = heads
        self.layout = layout
        self.head_dim = head_dim
        self.scale = scale
        self.window = window
        self.softcap = softcap

    def multiplies_e4m3(self, x_TD: jax.ShapeDtypeStruct, spread: Axes) -> bool:
        """Whether it takes e4m3 in place of such activations."""
        return self.qkv.multiplies_e4m3(x_TD, spread)

    def takes_scaled(self, x_TD: jax.ShapeDtypeStruct, spread: Axes) -> bool:
        """Whether it had better get such activations as `ScaledTokens`."""
        return self.layout.cp_type is None and self.qkv.takes_scaled(x_TD, tokens=spread)

    def __call__(
        self,
        x_TD: Activations,
        norm: RMSNorm | None,
        rope: tuple[jax.Array, jax.Array],
        kv: KVPages,
        batch: AttentionBatch,
        spread: Axes = (),
        residual: jax.Array | None = None,
    ) -> tuple[Stream, KVPages]:
        """The attention of a step on what `norm` makes of x, added to the residual, and the written pages.

        The rows of x_TD and of the result are split over `spread`.
        """
        out_TD, kv = self.heads_of(x_TD, norm, rope, kv, batch, spread)
        return self.out(out_TD, spread, residual=residual), kv

    def heads_of(
        self,
        x_TD: Activations,
        norm: RMSNorm | None,
        rope: tuple[jax.Array, jax.Array],
        kv: KVPages,
        batch: AttentionBatch,
        spread: Axes = (),
    ) -> tuple[jax.Array, KVPages]:
        """As `__call__`, before the output projection: what this rank's heads found, [T, N * H]."""
        T = x_TD.shape[0] * ranks(spread)
        N, K, H = self.heads.q_heads, self.heads.kv_heads, self.head_dim
        attend = partial(paged_attention, scale=self.scale, softcap=self.softcap)
        kernel = Kernel(attend, self.window, self.layout, None if self.sinks is None else self.sinks[...])
        kind = self.layout.cp_type
        if kind is None:
            product = self.qkv.product(x_TD, norm, spread, in_parts=finishes(T, scaled=False))
            out_TNH, kv = self._attend(product, rope, kv, batch, kernel)
            return out_TNH.reshape(T, -1), kv
        # ULYSSES: one group of heads for each rank of cp
        groups = self.heads.ranks // self.layout.size("heads")
        qkv = self.qkv(x_TD, norm, spread).reshape(T, groups, N + 2 * K, H)
        q_TNH, k_TKH, v_TKH = (
            part.reshape(T, -1, H) for part in (qkv[:, :, :N], qkv[:, :, N : N + K], qkv[:, :, N + K :])
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH, k_TKH = rotate(q_TNH, *rope), rotate(k_TKH, *rope)
        out_TNH, kv = METHODS[kind](q_TNH, k_TKH, v_TKH, kv, batch, kernel)
        return out_TNH.reshape(T, -1), kv

    def _attend(
        self,
        qkv: Product,
        rope: tuple[jax.Array, jax.Array],
        kv: KVPages,
        batch: AttentionBatch,
        kernel: Kernel,
    ) -> tuple[jax.Array, KVPages]:
        """Attention over a context that is all here, out_TNH, and the written pages."""
        norms = [None if norm is None else norm.weight[...] for norm in (self.q_norm, self.k_norm)]
        eps = 0.0 if self.q_norm is None else self.q_norm.eps
        stripes = kernel.stripes(kv)
        alone = not batch.tiles and self.window is None and self.sinks is None and self.q_norm is None
        with jax.named_scope("paged_attention"):
            try:
                if not alone or stripes.ranks > 1:
                    raise NotImplementedError("more than a new token of each row")
                place = places(batch.positions_T, batch.pages_RW, batch.row_T, kv.shape[3], stripes)
                where = (*place, batch.pages_RW, batch.positions_T)
                return rope_cuda.attend(qkv, *rope, kv, *where, scale=self.scale, softcap=self.softcap)
            except NotImplementedError:
                pass
        with jax.named_scope("kv_write"):
            place = places(batch.positions_T, batch.pages_RW, batch.row_T, kv.shape[3], stripes)
            q_TNH, kv = rope_write(qkv, *rope, kv, *place, *norms, eps=eps)
        with jax.named_scope("paged_attention"):
            part = kernel.step(q_TNH, kv, batch, *kernel.visible(batch.positions_T, stripes))
            return kernel.finish(part), kv
