"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434): keys and values are kept as one latent.

A token's page slot holds `rank` numbers, from which the keys and values of all heads could be made, and a rotated key
of `rope` numbers that the heads share. They are never made: the projection that would make the keys goes to the
queries, and the one that would make the values comes after attention ("absorbed"). Attention is then that of many query
heads over one KV head whose values are a part of its keys:

    q [N, nope + rope] -> nope part through W_k -> [N, rank + rope] . (latent, rotated key) -> softmax
    -> latents [N, rank] -> W_v -> [N, value] -> output projection

Every rank has the whole latent and its own query heads; context parallelism is that of other attention, with latents in
place of keys and values. With HELIX a rank gets the result of a share of its heads, and projects those to values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.kernels.linear.product import Activations
from jaxllm.kernels.paged_attention.api import paged_attention
from jaxllm.kernels.rope_write.reference import rotate
from jaxllm.layers.attention import METHODS
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.quantize import param
from jaxllm.layers.stream import Stream
from jaxllm.mapping import CpType
from jaxllm.parallel.collectives import Axes, gather_rows
from jaxllm.parallel.context import AttentionBatch, Kernel, KVPages, write_pages
from jaxllm.parallel.heads import HeadLayout
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Widths of a head: `nope` of a query without position, `rope` with it, `value`; and of what heads share.

    rank: of the latent of keys and values. query_rank: of the one that queries are made from; None: from x itself.
    interleaved: neighbours are rotated against each other, not halves.
    """

    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int
    interleaved: bool = True

    @property
    def width(self) -> int:
        """What is kept of a token."""
        return self.rank + self.rope


class MLA(nnx.Module):
    """In place of an `Attention`.

    latents: makes the queries' latent (or none), that of keys and values, and the key that heads share. queries: makes
    the heads' queries. kv_up [N * (nope + value), rank]: of each head the rows for keys, then those for values.
    """

    def __init__(
        self,
        latents: ColumnLinear,
        queries: ColumnLinear,
        kv_up: ParamSpec,
        out: RowLinear,
        heads: HeadLayout,
        layout: Layout,
        *,
        sizes: LatentConfig,
        scale: float,
        query_norm: RMSNorm | None,
        latent_norm: RMSNorm,
    ):
        self.latents = latents
        self.queries = queries
        self.kv_up = param(kv_up)
        self.out = out
        self.query_norm = query_norm
        self.latent_norm = latent_norm
        self.heads = heads
        self.layout = layout
        self.sizes = sizes
        self.scale = scale

    def multiplies_e4m3(self, x_TD: jax.ShapeDtypeStruct, spread: Axes) -> bool:
        """As `Attention.multiplies_e4m3`; several products read x."""
        return False

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
        """As `Attention.__call__`; kv holds latents, kv_PYKOH with Y = K = 1 and H = rank + rope."""
        sizes, kind = self.sizes, self.layout.cp_type
        # ULYSSES: one group of heads for each rank of cp
        groups = self.heads.ranks // self.layout.size("heads")
        N = groups * self.heads.q_heads
        assert isinstance(x_TD, jax.Array)
        x_TD = gather_rows(x_TD if norm is None else norm(x_TD), spread)
        T, dtype = x_TD.shape[0], x_TD.dtype
        latents = self.latents(x_TD)
        query, latent, key = jnp.split(latents, [latents.shape[1] - sizes.width, latents.shape[1] - sizes.rope], axis=1)
        q_TNH = self.queries(x_TD if self.query_norm is None else self.query_norm(query)).reshape(T, N, -1)
        kept = jnp.concatenate([self.latent_norm(latent), self._rotate(key[:, None], rope)[:, 0]], axis=1)
        # The other kinds merge results that are as wide as queries.
        values = sizes.rank if kind in (None, CpType.HELIX) else None
        kernel = Kernel(partial(paged_attention, scale=self.scale, values=values), None, self.layout)
        up = self.kv_up[...].reshape(N, sizes.nope + sizes.value, sizes.rank)
        with jax.named_scope("absorb"):
            q_nope, q_rope = q_TNH[:, :, : sizes.nope], self._rotate(q_TNH[:, :, sizes.nope :], rope)
            absorbed = jnp.einsum("tnh,nhl->tnl", q_nope, up[:, : sizes.nope], preferred_element_type=jnp.float32)
            q_TNH = jnp.concatenate([absorbed.astype(dtype), q_rope], axis=2)
        if kind is None:
            stripes = kernel.stripes(kv)
            with jax.named_scope("kv_write"):
                kv = write_pages(kv, kept[:, None], None, batch.positions_T, batch.pages_RW, batch.row_T, stripes)
            with jax.named_scope("paged_attention"):
                out_TNL, _ = kernel.step(q_TNH, kv, batch, *kernel.visible(batch.positions_T, stripes))
        else:
            latents_TKH = jnp.broadcast_to(kept[:, None], (T, groups, sizes.width))
            out_TNL, kv = METHODS[kind](q_TNH, latents_TKH, None, kv, batch, kernel)
        with jax.named_scope("values"):
            found = out_TNL[:, :, : sizes.rank]
            values_up = self._own_heads(up[:, sizes.nope :], found.shape[1])
            made = jnp.einsum("tnl,nhl->tnh", found, values_up, preferred_element_type=jnp.float32)
        return self.out(made.astype(dtype).reshape(T, -1), spread, residual=residual), kv

    def _own_heads(self, up_NHL: jax.Array, count: int) -> jax.Array:
        """Those of the heads that this rank has the result of: all, or with HELIX a share of them, padded."""
        if self.layout.cp_type is not CpType.HELIX:
            return up_NHL
        short = count * self.layout.mapping.cp - up_NHL.shape[0]
        up_NHL = jnp.pad(up_NHL, ((0, short), (0, 0), (0, 0)))
        return lax.dynamic_slice_in_dim(up_NHL, lax.axis_index("cp") * count, count)

    def _rotate(self, x_TNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        if self.sizes.interleaved:
            x_TNH = jnp.concatenate([x_TNH[..., 0::2], x_TNH[..., 1::2]], axis=-1)
        return rotate(x_TNH, *rope)
