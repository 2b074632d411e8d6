"""The decoder that every family shares, written for one rank of the mesh.

Array names carry one letter per axis:

    B requests        T tokens of a step    S tokens of context   R rows: decodes, then tiles   Q query tokens of a row
    D model width     N query heads         K KV heads            G = N / K                     M = G * Q
    H head width      F feed-forward width  V vocabulary          E experts                     X chosen experts
    P pages           O slots in a page     W pages of a row      Y keys, values

The modules run inside `shard_map`: N, K, F and V are one rank's share there, and every collective stands at the line
that needs it (`RowLinear`, `VocabTable`). Parameters are declared with global, padded shapes; `Layout` says over which
ranks they and the tokens are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxllm.kernels.linear.product import QuantizedTokens
from jaxllm.layers import one_token
from jaxllm.layers.attention import Attention
from jaxllm.layers.embedding import VocabTable
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.mla import MLA, LatentConfig
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.moe import MoE, Router
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.quantize import Declared
from jaxllm.layers.rope import RopeConfig, cos_sin
from jaxllm.layers.stream import Stream, like, settle
from jaxllm.models.config import ExpertNames, ExpertsConfig, ModelConfig
from jaxllm.models.quantization import HEAD
from jaxllm.parallel.collectives import Axes, current_exchange, exchanging
from jaxllm.parallel.collectives import rank as rank_of
from jaxllm.parallel.context import AttentionBatch, KVPages
from jaxllm.parallel.heads import ceil_div, split_segments
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec, Segment

LATENT_NORM_EPS = 1e-6
"""Of the norms inside MLA."""


class Block(nnx.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, cfg: ModelConfig, layout: Layout, index: int):
        specs = _Specs(cfg, layout, f"model.layers.{index}.", index)
        attention, mlp = "self_attn.", "mlp."
        self.layout = layout

        def row(weight: Declared, bias: str | None, axis: str) -> RowLinear:
            bias_spec = None if bias is None else specs.replicated(bias)
            return RowLinear(weight, bias_spec, axes=layout.axes(axis))

        def post_norm(name: str) -> RMSNorm | None:
            return RMSNorm(specs.norm(name, cfg.hidden_size), cfg.norm_eps) if cfg.post_norms else None

        self.input_norm = RMSNorm(specs.norm("input_layernorm", cfg.hidden_size), cfg.norm_eps)
        out = row(specs.attention_out(), attention + "o_proj.bias" if cfg.o_bias else None, "head_out")
        self.attention: Attention | MLA
        self.attention = (
            self._mla(cfg, specs, out)
            if cfg.latent is not None
            else Attention(
                ColumnLinear(specs.qkv("weight"), specs.qkv("bias") if cfg.qkv_bias else None),
                out,
                specs.heads,
                layout,
                head_dim=cfg.head_dim,
                scale=cfg.scale,
                window=cfg.windows[index],
                softcap=cfg.attention_softcap,
                q_norm=RMSNorm(specs.norm(attention + "q_norm", cfg.head_dim), cfg.norm_eps) if cfg.qk_norm else None,
                k_norm=RMSNorm(specs.norm(attention + "k_norm", cfg.head_dim), cfg.norm_eps) if cfg.qk_norm else None,
                sinks=specs.sinks() if cfg.sinks else None,
            )
        )
        self.mlp: GatedMLP | MoE
        if cfg.experts is not None and cfg.sparse(index):
            experts, shared = cfg.experts, None
            if experts.shared:
                parts = (mlp + "shared_experts.", experts.shared)
                shared = GatedMLP(
                    ColumnLinear(specs.gate_up("weight", *parts)), row(specs.down(*parts), None, "ffn"), cfg.activation
                )
            self.mlp = MoE(
                Router(
                    specs.router(experts),
                    specs.router_bias(experts) if experts.bias else None,
                    chosen=experts.chosen,
                    normalise=experts.normalise,
                    sigmoid=experts.sigmoid,
                    groups=experts.groups,
                    groups_chosen=experts.groups_chosen,
                    group_best=experts.group_best,
                    scale=experts.scale,
                    logit_bias=specs.router_logit_bias(experts) if experts.router_bias else None,
                ),
                specs.expert_gate_up(experts),
                specs.expert_down(experts),
                shared,
                layout,
                activation=cfg.activation,
                biases=specs.expert_biases(experts) if experts.biases else None,
                slots=specs.expert_slots(experts) if layout.placement is not None else None,
            )
        else:
            parts = (mlp, cfg.intermediate_size)
            self.mlp = GatedMLP(
                ColumnLinear(specs.gate_up("weight", *parts), specs.gate_up("bias", *parts) if cfg.mlp_bias else None),
                row(specs.down(*parts), mlp + "down_proj.bias" if cfg.mlp_bias else None, "ffn"),
                cfg.activation,
            )
        # Gemma norms the output of each half too, and calls the norm before the MLP "pre_feedforward".
        pre_mlp = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
        self.mlp_norm = RMSNorm(specs.norm(pre_mlp, cfg.hidden_size), cfg.norm_eps)
        self.post_attention_norm = post_norm("post_attention_layernorm")
        self.post_mlp_norm = post_norm("post_feedforward_layernorm")

    def _mla(self, cfg: ModelConfig, specs: _Specs, out: RowLinear) -> MLA:
        sizes = cfg.latent
        assert sizes is not None

        def norm(name: str, size: int) -> RMSNorm:
            # DeepSeek's latents have norms of transformers' default epsilon, whatever the model's is.
            return RMSNorm(specs.norm(f"self_attn.{name}_a_layernorm", size), LATENT_NORM_EPS)

        return MLA(
            ColumnLinear(specs.latents(sizes)),
            ColumnLinear(specs.latent_queries(sizes)),
            specs.latent_up(sizes),
            out,
            specs.heads,
            self.layout,
            sizes=sizes,
            scale=cfg.scale,
            query_norm=None if sizes.query_rank is None else norm("q", sizes.query_rank),
            latent_norm=norm("kv", sizes.rank),
        )

    def __call__(
        self, x: Stream, rope: tuple[jax.Array, jax.Array], kv: KVPages, batch: AttentionBatch
    ) -> tuple[Stream, KVPages, jax.Array | None]:
        """The layer on x, the written pages, and the tokens of each expert where they are counted."""
        load_E = None
        try:
            return *self._in_one_launch(x, rope, kv, batch), None
        except NotImplementedError:
            pass
        # Where there is no norm between, the product itself adds the residual.
        post_attention, post_mlp = self.post_attention_norm, self.post_mlp_norm
        with jax.named_scope("attention"):
            spread = self.layout.spread(batch.tokens, like(x).shape[1])
            x_TD, y_TD, norm = self.input_norm.settle(x, quantised=self.attention.multiplies_e4m3(like(x), spread))
            residual = x_TD if post_attention is None else None
            if isinstance(self.attention, Attention) and isinstance(self.mlp, MoE):
                found_TD, kv = self.attention.heads_of(y_TD, norm, rope, kv, batch, spread)
                try:
                    if spread or post_attention is not None or post_mlp is not None:
                        raise NotImplementedError("spread tokens, or norms of the halves' results")
                    out, mlp = self.attention.out, self.mlp
                    return one_token.second_half(x_TD, found_TD, out, self.mlp_norm, mlp), kv, None
                except NotImplementedError:
                    x = self.attention.out(found_TD, spread, residual=residual)
            else:
                x, kv = self.attention(y_TD, norm, rope, kv, batch, spread, residual)
            x = x if post_attention is None else x_TD + post_attention(settle(x)[0])
        with jax.named_scope("mlp"):
            tokens = spread or self.layout.axes("requests")
            if isinstance(self.mlp, MoE):  # which has a kernel for norm and router
                x_TD = settle(x)[0]
            else:
                quantised = self.mlp.gate_up.multiplies_e4m3(like(x), tokens)
                x_TD, y_TD, norm = self.mlp_norm.settle(x, quantised=quantised)
            residual = x_TD if post_mlp is None else None
            if isinstance(self.mlp, MoE):
                valid_T = self._valid(batch, spread, x_TD.shape[0]) if self.layout.counts_loads else None
                x, load_E = self.mlp(x_TD, self.mlp_norm, tokens, residual, valid_T)
            else:
                x = self.mlp(y_TD, norm, tokens, residual)
            x = x if post_mlp is None else x_TD + post_mlp(settle(x)[0])
        return x, kv, load_E

    def _in_one_launch(
        self, x: Stream, rope: tuple[jax.Array, jax.Array], kv: KVPages, batch: AttentionBatch
    ) -> tuple[jax.Array, KVPages]:
        """`__call__` by one kernel. Raises NotImplementedError where there is none."""
        if not isinstance(self.mlp, MoE) or not isinstance(self.attention, Attention) or not isinstance(x, jax.Array):
            raise NotImplementedError("no experts, latents, or a sum that is still to be made")
        if self.post_attention_norm is not None or self.post_mlp_norm is not None:
            raise NotImplementedError("norms of the halves' results")
        norms = (self.input_norm, self.mlp_norm)
        with jax.named_scope("layer"):
            return one_token.layer(x, norms, self.attention, self.mlp, rope, kv, batch)

    def _valid(self, batch: AttentionBatch, spread: Axes, rows: int) -> jax.Array:
        """Which rows of the residual stream are tokens; those of this rank where they are split over `spread`."""
        valid_T = batch.positions_T >= 0
        return lax.dynamic_slice_in_dim(valid_T, rank_of(spread) * rows, rows) if spread else valid_T


class Decoder(nnx.Module):
    """Embedding, layers, final norm and output head; or the part of them that a pipeline stage has.

    layers: those of the stage (None: all). The first stage has the embedding, the last one the final norm and the head,
    which with tied embeddings is a copy of the embedding.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout, layers: range | None = None):
        specs = _Specs(cfg, layout, "")
        table = partial(VocabTable, vocab_size=cfg.vocab_size, axes=layout.axes("vocab"))
        indices = range(cfg.num_layers) if layers is None else layers
        first, last = indices.start == 0, indices.stop == cfg.num_layers
        tied = cfg.tie_embeddings
        self.cfg = cfg
        self.layout = layout
        self.first = first
        self.windows = [cfg.windows[i] for i in indices]
        self.embed = (
            table(specs.vocab("model.embed_tokens.weight"), tokens=layout.axes("requests"))
            if first or (last and tied)
            else None
        )
        self.layers = nnx.List([Block(cfg, layout, i) for i in indices])
        self.norm = RMSNorm(specs.norm("model.norm", cfg.hidden_size), cfg.norm_eps) if last else None
        self.head = table(specs.head()) if last and not tied else None

    def __call__(self, x: jax.Array, kv: list[KVPages], batch: AttentionBatch) -> tuple[jax.Array, list[KVPages]]:
        """Hidden states x_TD of a step's tokens after these layers, and the pages with their keys and values written.

        Where the tokens of experts are counted, kv has an array for it at the end, see `StepFunctions.loads`.

        x is tokens_T in the first stage and x_TD of the stage before in the others; the last stage's are normed. The
        rows of x_TD are split as `Layout.stream` says.
        """
        cfg = self.cfg
        stream: Stream = self._embed(x) if self.first else x
        ropes: dict[RopeConfig, tuple[jax.Array, jax.Array]] = {}
        written, loads = [], []
        pools, counted = kv[: len(self.windows)], kv[len(self.windows) :]
        for layer, pages, window in zip(self.layers, pools, self.windows, strict=True):
            config = cfg.local_rope if window is not None and cfg.local_rope is not None else cfg.rope
            if config not in ropes:
                ropes[config] = cos_sin(config, cfg.rope_dim, batch.positions_T)
            split = nnx.split(layer)
            stream, pages, load_E = _run_block(*split, current_exchange(), stream, ropes[config], pages, batch)
            written.append(pages)
            loads += [] if load_E is None else [load_E]
        if counted:
            written.append(counted[0] + jnp.stack(loads)[None])
        if self.norm is None:
            return settle(stream)[0], written
        with jax.named_scope("final_norm"):
            x_TD, normed_TD, norm = self.norm.settle(stream)
            if norm is not None:
                normed_TD = norm(x_TD)
            assert not isinstance(normed_TD, QuantizedTokens)
            return normed_TD, written

    def _embed(self, tokens_T: jax.Array) -> jax.Array:
        assert self.embed is not None
        with jax.named_scope("embed"):
            spread = self.layout.spread(tokens_T.shape[0], self.cfg.hidden_size)
            x_TD = self.embed.embed(tokens_T, spread)
            scale = self.cfg.embedding_scale
            return x_TD if scale == 1.0 else x_TD * jnp.asarray(scale, x_TD.dtype)

    def logits(self, x_RD: jax.Array) -> jax.Array:
        """This rank's share of the float32 logits of final hidden states, [R, V / ranks]; in the last stage."""
        table = self.head or self.embed
        assert table is not None
        with jax.named_scope("logits"):
            return table.logits(x_RD, self.cfg.logit_softcap)


@partial(jax.jit, static_argnums=0, inline=False)
def _run_block(graph, state, exchange, x, rope, kv, batch):  # type: ignore[no-untyped-def]
    """One layer as a function of its weights: alike layers are traced and lowered once, and unrolled by XLA."""
    with exchanging(exchange):
        return nnx.merge(graph, state)(x, rope, kv, batch)


def param_specs(cfg: ModelConfig, layout: Layout) -> dict[str, ParamSpec]:
    """Every parameter of the model by its path, such as `layers.0.attention.qkv.weight`."""
    return {path: variable.spec for path, variable in flat_variables(abstract(cfg, layout))}


def abstract(cfg: ModelConfig, layout: Layout, layers: range | None = None) -> Decoder:
    """The model, or a stage of it, with shapes in place of arrays: no memory, no devices."""
    return nnx.eval_shape(lambda: Decoder(cfg, layout, layers))


def flat_variables(model: Decoder) -> list[tuple[str, nnx.Variable]]:
    """The model's parameters in a fixed order, each with its path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return [(".".join(map(str, path)), variable) for path, variable in flat]


def checkpoint_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint of this model must hold."""
    q, kv, D, F = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.hidden_size, cfg.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    if cfg.latent is not None:
        layer |= _latent_shapes(cfg.latent, cfg.num_heads, D)
    else:
        layer |= {f"self_attn.{n}_proj.weight": (rows, D) for n, rows in (("q", q), ("k", kv), ("v", kv))}
        layer["self_attn.o_proj.weight"] = (D, q)
    mlp: dict[str, tuple[int, ...]] = {
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    if cfg.qkv_bias:
        layer |= {f"self_attn.{n}_proj.bias": (rows,) for n, rows in (("q", q), ("k", kv), ("v", kv))}
    if cfg.o_bias:
        layer["self_attn.o_proj.bias"] = (D,)
    if cfg.sinks:
        layer["self_attn.sinks"] = (cfg.num_heads,)
    if cfg.mlp_bias:
        mlp |= {"mlp.gate_proj.bias": (F,), "mlp.up_proj.bias": (F,), "mlp.down_proj.bias": (D,)}
    if cfg.qk_norm:
        layer |= {"self_attn.q_norm.weight": (cfg.head_dim,), "self_attn.k_norm.weight": (cfg.head_dim,)}
    if cfg.post_norms:
        layer |= {"pre_feedforward_layernorm.weight": (D,), "post_feedforward_layernorm.weight": (D,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, D), "model.norm.weight": (D,)}
    experts = {} if cfg.experts is None else _expert_shapes(cfg.experts, D)
    for i in range(cfg.num_layers):
        parts = layer | (experts if cfg.sparse(i) else mlp)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    if not cfg.tie_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, D)
    return shapes


def _latent_shapes(sizes: LatentConfig, num_heads: int, D: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (sizes.width, D),
        "kv_a_layernorm.weight": (sizes.rank,),
        "kv_b_proj.weight": (num_heads * (sizes.nope + sizes.value), sizes.rank),
        "o_proj.weight": (D, num_heads * sizes.value),
    }
    queries = num_heads * (sizes.nope + sizes.rope)
    if sizes.query_rank is None:
        shapes["q_proj.weight"] = (queries, D)
    else:
        shapes |= {
            "q_a_proj.weight": (sizes.query_rank, D),
            "q_a_layernorm.weight": (sizes.query_rank,),
            "q_b_proj.weight": (queries, sizes.query_rank),
        }
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _expert_shapes(experts: ExpertsConfig, D: int) -> dict[str, tuple[int, ...]]:
    names, F = experts.names, experts.width
    router = f"{names.module}.{names.router}"
    shapes: dict[str, tuple[int, ...]] = {f"{router}.weight": (experts.count, D)}
    if experts.router_bias:
        shapes[f"{router}.bias"] = (experts.count,)
    if experts.bias:
        shapes[f"{names.module}.gate.e_score_correction_bias"] = (experts.count,)
    if experts.shared:
        for name, shape in (("gate", (experts.shared, D)), ("up", (experts.shared, D)), ("down", (D, experts.shared))):
            shapes[f"{names.module}.shared_experts.{name}_proj.weight"] = shape
    for number in range(experts.count):
        for name, matrix in ((names.gate, (F, D)), (names.up, (F, D)), (names.down, (D, F))):
            shapes[f"{names.module}.experts.{number}.{name}.weight"] = matrix
            if experts.biases:
                shapes[f"{names.module}.experts.{number}.{name}.bias"] = matrix[:1]
    return shapes


class _Specs:
    """Declares the parameters of one layer: which checkpoint rows each rank's part of a fused matrix consists of."""

    def __init__(self, cfg: ModelConfig, layout: Layout, prefix: str, layer: int = 0):
        self.cfg = cfg
        self.layer = layer
        self.layout = layout
        self.prefix = prefix
        self.heads = layout.heads(cfg.num_heads, cfg.num_kv_heads)

    def _spec(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        segments: list[Segment],
        axis: int = 0,
        stacked: bool = False,
    ) -> ParamSpec:
        merged: list[Segment] = []
        for s in segments:
            last = merged[-1] if merged else None
            if last is not None and s.name is not None and last.name == s.name and last.stop == s.start:
                merged[-1] = Segment(s.name, last.start, s.stop)
            else:
                merged.append(s)
        mesh_axes = self.layout.mesh_axes(axes)
        return ParamSpec(shape, self.layout.dtype, mesh_axes, tuple(merged), axis, stacked=stacked)

    def _matrix(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        segments: list[Segment],
        axis: int = 0,
        stacked: bool = False,
    ) -> Declared:
        """A matrix, or a stack of them, that is quantised where the model is."""
        spec, quantization = self._spec(shape, axes, segments, axis, stacked), self.cfg.quantization
        if quantization is None or not quantization.applies(spec.names()):
            return spec
        return spec.quantize(quantization.format, 1 if axes[-1] is None else self.layout.size(axes[-1]))

    def norm(self, name: str, size: int) -> ParamSpec:
        segment = Segment(f"{self.prefix}{name}.weight", 0, size)
        return ParamSpec((size,), np.dtype(np.float32), (None,), (segment,), offset=self.cfg.norm_offset)

    def replicated(self, name: str) -> ParamSpec:
        D = self.cfg.hidden_size
        return self._spec((D,), (None,), [Segment(self.prefix + name, 0, D)])

    def qkv(self, kind: str) -> Declared:
        """Each rank's rows are its query heads, then its key heads, then its value heads."""
        names = {n: f"{self.prefix}self_attn.{n}_proj.{kind}" for n in "qkv"}
        H = self.cfg.head_dim
        segments: list[Segment] = []
        for rank in range(self.heads.ranks):
            segments += self.heads.q_segments(names["q"], rank, H)
            segments += self.heads.kv_segments(names["k"], rank, H)
            segments += self.heads.kv_segments(names["v"], rank, H)
        rows = self.heads.ranks * (self.heads.q_heads + 2 * self.heads.kv_heads) * H
        return self._rows(kind, rows, "heads", segments)

    def latents(self, sizes: LatentConfig) -> Declared:
        """The latent of queries, if there is one, that of keys and values, and the heads' common key: on every rank."""
        attention, rank = f"{self.prefix}self_attn.", sizes.query_rank or 0
        segments = [Segment(attention + "q_a_proj.weight", 0, rank)] if rank else []
        segments.append(Segment(attention + "kv_a_proj_with_mqa.weight", 0, sizes.width))
        return self._matrix((rank + sizes.width, self.cfg.hidden_size), (None, None), segments)

    def latent_queries(self, sizes: LatentConfig) -> Declared:
        """The query heads of each rank, made from their latent or from x."""
        name = "q_proj" if sizes.query_rank is None else "q_b_proj"
        return self._matrix(*self._head_rows(name, sizes.nope + sizes.rope, sizes.query_rank or self.cfg.hidden_size))

    def latent_up(self, sizes: LatentConfig) -> ParamSpec:
        """Keys and values of the heads of each rank, made from their latent. Never quantised: it is absorbed."""
        return self._spec(*self._head_rows("kv_b_proj", sizes.nope + sizes.value, sizes.rank))

    def _head_rows(
        self, name: str, width: int, columns: int
    ) -> tuple[tuple[int, ...], tuple[str | None, ...], list[Segment]]:
        ranks = range(self.heads.ranks)
        name = f"{self.prefix}self_attn.{name}.weight"
        segments = [s for rank in ranks for s in self.heads.q_segments(name, rank, width)]
        return (len(ranks) * self.heads.q_heads * width, columns), ("heads", None), segments

    def attention_out(self) -> Declared:
        """Columns are the query heads of each rank, padded so that they can be split further (HELIX)."""
        name, H = f"{self.prefix}self_attn.o_proj.weight", self.cfg.head_dim
        if self.cfg.latent is not None:
            H = self.cfg.latent.value
        columns, segments = self._padded_heads(name, H)
        return self._matrix((self.cfg.hidden_size, columns), (None, "head_out"), segments, axis=1)

    def sinks(self) -> ParamSpec:
        """One for each head, as the columns of the output projection have them."""
        count, segments = self._padded_heads(f"{self.prefix}self_attn.sinks", 1)
        axes = self.layout.mesh_axes(("sinks",))
        return ParamSpec((count,), np.dtype(np.float32), axes, tuple(segments))

    def _padded_heads(self, name: str, H: int) -> tuple[int, list[Segment]]:
        parts = self.layout.size("head_out") // self.layout.size("heads")
        padding = [Segment(None, 0, H)] * (-self.heads.q_heads % parts)
        ranks = range(self.heads.ranks)
        segments = [s for rank in ranks for s in (*self.heads.q_segments(name, rank, H), *padding)]
        return self.heads.ranks * (self.heads.q_heads + len(padding)) * H, segments

    def gate_up(self, kind: str, mlp: str, F: int) -> Declared:
        """Each rank's rows are its gate rows, then its up rows."""
        ranks = self.layout.size("ffn")
        segments = [
            s
            for rank in range(ranks)
            for n in ("gate", "up")
            for s in split_segments(f"{self.prefix}{mlp}{n}_proj.{kind}", F, ranks, rank)
        ]
        return self._rows(kind, 2 * ranks * ceil_div(F, ranks), "ffn", segments)

    def down(self, mlp: str, F: int) -> Declared:
        ranks = self.layout.size("ffn")
        name = f"{self.prefix}{mlp}down_proj.weight"
        segments = [s for rank in range(ranks) for s in split_segments(name, F, ranks, rank)]
        return self._matrix((self.cfg.hidden_size, ranks * ceil_div(F, ranks)), (None, "ffn"), segments, axis=1)

    def router(self, experts: ExpertsConfig) -> ParamSpec:
        name = f"{self.prefix}{experts.names.module}.{experts.names.router}.weight"
        return self._spec((experts.count, self.cfg.hidden_size), (None, None), [Segment(name, 0, experts.count)])

    def router_logit_bias(self, experts: ExpertsConfig) -> ParamSpec:
        name = f"{self.prefix}{experts.names.module}.{experts.names.router}.bias"
        return ParamSpec((experts.count,), np.dtype(np.float32), (None,), (Segment(name, 0, experts.count),))

    def router_bias(self, experts: ExpertsConfig) -> ParamSpec:
        name = f"{self.prefix}{experts.names.module}.gate.e_score_correction_bias"
        return ParamSpec((experts.count,), np.dtype(np.float32), (None,), (Segment(name, 0, experts.count),))

    def expert_gate_up(self, experts: ExpertsConfig) -> Declared:
        """Of each expert, each rank's rows are its gate rows, then its up rows."""
        rows, segments = self._expert_rows(experts, "weight")
        shape = (len(self._slots(experts)), rows, self.cfg.hidden_size)
        return self._matrix(shape, ("experts", "expert_ffn", None), segments, axis=1, stacked=True)

    def _slots(self, experts: ExpertsConfig) -> Sequence[int]:
        """The expert of each matrix of a stack."""
        placement = self.layout.placement
        return range(experts.count) if placement is None else placement.of(self.layer, experts.count)

    def expert_slots(self, experts: ExpertsConfig) -> ParamSpec:
        """Of `placement.table`; no checkpoint has it."""
        size = 2 * experts.count + len(self._slots(experts))
        return ParamSpec((size,), np.dtype(np.int32), (None,), (Segment(None, 0, size),))

    def _expert_rows(self, experts: ExpertsConfig, kind: str) -> tuple[int, list[Segment]]:
        ranks, F, names = self.layout.size("expert_ffn"), experts.width, experts.names
        segments = [
            s
            for number in self._slots(experts)
            for rank in range(ranks)
            for part in (names.gate, names.up)
            for s in split_segments(self._expert(names, number, part, kind), F, ranks, rank)
        ]
        return 2 * ranks * ceil_div(F, ranks), segments

    def expert_biases(self, experts: ExpertsConfig) -> tuple[ParamSpec, ParamSpec]:
        """Of the first product by rows, as its weight; that of the second is the first rank's, and zero on others."""
        rows, segments = self._expert_rows(experts, "bias")
        axes = ("experts", "expert_ffn")
        first = self._spec((len(self._slots(experts)), rows), axes, segments, axis=1, stacked=True)
        ranks, D, names = self.layout.size("expert_ffn"), self.cfg.hidden_size, experts.names
        segments = []
        for number in self._slots(experts):
            segments.append(Segment(self._expert(names, number, names.down, "bias"), 0, D))
            segments += [Segment(None, 0, (ranks - 1) * D)] if ranks > 1 else []
        return first, self._spec((len(self._slots(experts)), ranks * D), axes, segments, axis=1, stacked=True)

    def expert_down(self, experts: ExpertsConfig) -> Declared:
        ranks, F, names = self.layout.size("expert_ffn"), experts.width, experts.names
        segments = [
            s
            for number in self._slots(experts)
            for rank in range(ranks)
            for s in split_segments(self._expert(names, number, names.down), F, ranks, rank)
        ]
        shape = (len(self._slots(experts)), self.cfg.hidden_size, ranks * ceil_div(F, ranks))
        return self._matrix(shape, ("experts", None, "expert_ffn"), segments, axis=2, stacked=True)

    def _expert(self, names: ExpertNames, number: int, part: str, kind: str = "weight") -> str:
        return f"{self.prefix}{names.module}.experts.{number}.{part}.{kind}"

    def vocab(self, name: str) -> ParamSpec:
        return self._spec(*self._vocab_rows(name))

    def head(self) -> Declared:
        return self._matrix(*self._vocab_rows(HEAD))

    def _vocab_rows(self, name: str) -> tuple[tuple[int, ...], tuple[str | None, ...], list[Segment]]:
        ranks, V = self.layout.size("vocab"), self.cfg.vocab_size
        segments = [s for rank in range(ranks) for s in split_segments(name, V, ranks, rank)]
        return (ranks * ceil_div(V, ranks), self.cfg.hidden_size), ("vocab", None), segments

    def _rows(self, kind: str, rows: int, axis: str, segments: list[Segment]) -> Declared:
        """A matrix `[rows, D]` or its bias `[rows]`, split by rows."""
        if kind == "bias":
            return self._spec((rows,), (axis,), segments)
        return self._matrix((rows, self.cfg.hidden_size), (axis, None), segments)
