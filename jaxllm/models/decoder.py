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

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers import one_token
from jaxllm.layers.attention import Attention
from jaxllm.layers.embedding import VocabTable
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.mla import MLA
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.moe import MoE, Router
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.quantize import Declared
from jaxllm.layers.rope import RopeConfig, cos_sin
from jaxllm.layers.stream import Stream, like, settle
from jaxllm.models.config import ModelConfig
from jaxllm.models.specs import Specs
from jaxllm.parallel.collectives import Axes, current_exchange, exchanging
from jaxllm.parallel.collectives import rank as rank_of
from jaxllm.parallel.context import AttentionBatch, KVPages
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec

LATENT_NORM_EPS = 1e-6
"""Of the norms inside MLA."""


class Block(nnx.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, cfg: ModelConfig, layout: Layout, index: int):
        specs = Specs(cfg, layout, f"model.layers.{index}.", index)
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

    def _mla(self, cfg: ModelConfig, specs: Specs, out: RowLinear) -> MLA:
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
        self,
        x: Stream,
        rope: tuple[jax.Array, jax.Array],
        kv: KVPages,
        batch: AttentionBatch,
    ) -> tuple[Stream, KVPages, jax.Array | None]:
        """The layer on x, the written pages, and the tokens of each expert where they are counted."""
        load_E = None
        # Where there is no norm between, the product itself adds the residual.
        post_attention, post_mlp = self.post_attention_norm, self.post_mlp_norm
        with jax.named_scope("attention"):
            spread = self.layout.spread(batch.tokens, like(x).shape[1])
            quantised = self.attention.multiplies_e4m3(like(x), spread)
            scaled = isinstance(self.attention, Attention) and self.attention.takes_scaled(like(x), spread)
            x_TD, y_TD, norm = self.input_norm.settle(x, quantised=quantised, scaled=scaled)
            residual = x_TD if post_attention is None else None
            x, kv = self.attention(y_TD, norm, rope, kv, batch, spread, residual)
            x = x if post_attention is None else x_TD + post_attention(settle(x)[0])
        with jax.named_scope("mlp"):
            tokens = spread or self.layout.axes("requests")
            if isinstance(self.mlp, MoE):  # which has a kernel for norm and router
                x_TD = settle(x)[0]
            else:
                quantised = self.mlp.gate_up.multiplies_e4m3(like(x), tokens)
                blocked = self.mlp.gate_up.blocks(like(x), self.mlp.activation, tokens)
                scaled = self.mlp.gate_up.takes_scaled(like(x), self.mlp.activation, tokens)
                x_TD, y_TD, norm = self.mlp_norm.settle(x, quantised=quantised, blocked=blocked, scaled=scaled)
            residual = x_TD if post_mlp is None else None
            if isinstance(self.mlp, MoE):
                # Padding of prompts may be most of a step; its rows, all alike, would go to the same few experts.
                masked = self.layout.counts_loads or batch.tokens > batch.decodes
                valid_T = self._valid(batch, spread, x_TD.shape[0]) if masked else None
                x, load_E = self.mlp(x_TD, self.mlp_norm, tokens, residual, valid_T)
            else:
                x = self.mlp(y_TD, norm, tokens, residual)
            x = x if post_mlp is None else x_TD + post_mlp(settle(x)[0])
        return x, kv, load_E

    def for_one_token(self) -> one_token.Dense | one_token.Experts:
        """The layer, for a kernel of several. Raises NotImplementedError where it has what none of these has."""
        if not isinstance(self.attention, Attention):
            raise NotImplementedError("latents")
        if self.post_attention_norm is not None or self.post_mlp_norm is not None:
            raise NotImplementedError("norms of the halves' results")
        if isinstance(self.mlp, MoE):
            return one_token.Experts(self.input_norm, self.attention, self.mlp_norm, self.mlp)
        return one_token.Dense(self.input_norm, self.attention, self.mlp_norm, self.mlp)

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
        specs = Specs(cfg, layout, "")
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
        stream: Stream = self._embed(x) if self.first else x
        pools, counted = kv[: len(self.windows)], kv[len(self.windows) :]
        loads: list[jax.Array] = []
        try:
            stream, written = self._in_one_launch(stream, pools, batch)
        except NotImplementedError:
            stream, written, loads = self._one_by_one(stream, pools, batch)
        if counted:
            written.append(counted[0] + jnp.stack(loads)[None])
        if self.norm is None:
            return settle(stream)[0], written
        with jax.named_scope("final_norm"):
            x_TD, normed_TD, norm = self.norm.settle(stream)
            if norm is not None:
                normed_TD = norm(x_TD)
            assert isinstance(normed_TD, jax.Array)
            return normed_TD, written

    def _in_one_launch(self, x: Stream, pools: list[KVPages], batch: AttentionBatch) -> tuple[jax.Array, list[KVPages]]:
        """The layers by one kernel. Raises NotImplementedError where there is none."""
        if batch.tokens != 1 or not isinstance(x, jax.Array):
            raise NotImplementedError("more tokens than one, or a sum that is still to be made")

        def parts(x: jax.Array, pools: list[KVPages]) -> tuple[jax.Array, list[KVPages]]:
            stream, written, _ = self._one_by_one(x, pools, batch)
            return settle(stream)[0], written

        layers = [layer.for_one_token() for layer in self.layers]
        experts = [layer for layer in layers if isinstance(layer, one_token.Experts)]
        dense = [layer for layer in layers if isinstance(layer, one_token.Dense)]
        rope = cos_sin(self.cfg.rope, self.cfg.rope_dim, batch.positions_T)
        if experts and dense:
            raise NotImplementedError("layers of two kinds")
        if experts:
            return one_token.expert_layers(x, experts, rope, pools, batch, parts)
        return one_token.dense_layers(x, dense, rope, pools, batch, parts)

    def _one_by_one(
        self, stream: Stream, pools: list[KVPages], batch: AttentionBatch
    ) -> tuple[Stream, list[KVPages], list[jax.Array]]:
        """The layers, their pages, and the tokens of each expert where they are counted."""
        cfg = self.cfg
        ropes: dict[RopeConfig, tuple[jax.Array, jax.Array]] = {}
        written, loads = [], []
        for layer, pages, window in zip(self.layers, pools, self.windows, strict=True):
            config = cfg.local_rope if window is not None and cfg.local_rope is not None else cfg.rope
            if config not in ropes:
                ropes[config] = cos_sin(config, cfg.rope_dim, batch.positions_T)
            split = nnx.split(layer)
            stream, pages, load_E = _run_block(*split, current_exchange(), stream, ropes[config], pages, batch)
            written.append(pages)
            loads += [] if load_E is None else [load_E]
        return stream, written, loads

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
