"""DeepSeek-V2 and V3 in fp8, by their sizes alone: the engine does not run quantised checkpoints of them yet.

Reads the `config.json` of these (and what calls itself so, such as Kimi-K2). When the decoder learns to run them,
`models.decoder.param_specs` describes them as it does every other model, and this file goes.

The layout is the design's: attention heads, dense layers, shared experts and the vocabulary over (ep, tp) together,
experts over ep and the columns of each over tp (HELIX: over tp and cp).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxllm.mapping import Mapping as ParallelMapping
from jaxllm.models.fields import Fields
from jaxllm.parallel.layout import Layout
from jaxllm.plan.sizes import Cache, Model, Sizes, Weight

_KINDS = {"DeepseekV2ForCausalLM": "deepseek", "DeepseekV3ForCausalLM": "deepseek"}


def kind_of(config: Mapping[str, Any], quantised: bool) -> str | None:
    """`deepseek`; None for a config that the engine runs. quantised: see `mixture`."""
    names = config.get("architectures")
    kind = next((_KINDS[name] for name in names if name in _KINDS), None) if isinstance(names, list) else None
    return kind if quantised and config.get("quantization_config") else None


def mixture(name: str, config: Mapping[str, Any], *, quantised: bool = True) -> Model:
    """A mixture of experts.

    Args:
        quantised: count 8-bit weights where the checkpoint has them; False when they are to be widened.

    Raises:
        ModelConfigError: a size is missing or senseless.
    """
    kind = kind_of(config, quantised)
    fields = Fields(config, "config.json")
    dtype = str(fields.get("torch_dtype", fields.get("dtype", "bfloat16")))
    table = Fields(fields.get("quantization_config", {}), "config.json quantization_config")
    fp8 = quantised and table.get("quant_method") == "fp8"
    describe = partial(_deepseek, fields, fp8)
    one = describe(Layout(ParallelMapping(), np.dtype(np.float32)))
    every = [one.embed, one.norm, one.head, *(weight for layer in one.layers for weight in layer)]
    used = [w.elements * w.choice[0] // w.choice[1] if w.choice else w.elements for w in every if not w.lookup]
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    return Model(
        name=name,
        kind=f"{kind}, {'fp8' if fp8 else dtype} weights",
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        hidden_size=fields.integer("hidden_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position=fields.integer("max_position_embeddings"),
        windows=(None,) * num_layers,
        dtype=dtype,
        parameters=sum(weight.elements for weight in every),
        active=sum(used),
        num_experts=fields.integer("n_routed_experts"),
        lay_out=describe,
        refusal=f"the engine does not run {kind} models in {'fp8' if fp8 else dtype} yet: the bytes are those that the "
        "design gives them",
    )


def _deepseek(fields: Fields, fp8: bool, layout: Layout) -> Sizes:
    D, N = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    latent, rope = fields.integer("kv_lora_rank"), fields.integer("qk_rope_head_dim")
    nope, value = fields.integer("qk_nope_head_dim"), fields.integer("v_head_dim")
    low = fields.optional_integer("q_lora_rank")
    w = _Weights(layout, fp8)
    query = N * (nope + rope)
    if low is None:
        queries: tuple[Weight, ...] = (w.rows("attention.q", query, D, "heads"),)
    else:
        queries = (
            w.rows("attention.q_a", low, D),
            w.norm("attention.q_norm", low),
            w.rows("attention.q_b", query, low, "heads"),
        )
    attention = (
        w.norm("input_norm", D),
        *queries,
        w.rows("attention.kv_a", latent + rope, D),
        w.norm("attention.kv_norm", latent),
        w.rows("attention.kv_b", N * (nope + value), latent, "heads"),
        w.columns("attention.out", D, N * value, "head_out"),
        w.norm("mlp_norm", D),
    )
    F, every = fields.integer("intermediate_size"), fields.integer("moe_layer_freq", 1)
    mlp = (w.rows("mlp.gate_up", 2 * F, D, "ffn"), w.columns("mlp.down", D, F, "ffn"))
    E, narrow = fields.integer("n_routed_experts"), fields.integer("moe_intermediate_size")
    shared = narrow * fields.integer("n_shared_experts", 1)
    sparse = (
        *w.experts(fields.integer("num_experts_per_tok"), E, D, narrow),
        w.rows("shared.gate_up", 2 * shared, D, "ffn"),
        w.columns("shared.down", D, shared, "ffn"),
    )
    first = fields.integer("first_k_dense_replace", 0, low=0)
    layers = tuple(
        attention + (sparse if index >= first and index % every == 0 else mlp)
        for index in range(fields.integer("num_hidden_layers"))
    )
    mine = -(-N // layout.size("heads"))
    # Decoding works on the latents themselves (the projections of keys and values absorbed into the queries).
    cache = Cache((latent + rope,), 2 * mine * (2 * latent + rope), 2 * mine * (nope + rope + value))
    of_experts = 2 * narrow * fields.integer("num_experts_per_tok") // layout.mapping.tp
    return w.model(fields, layers, cache, mine, mine * (nope + rope), 2 * F // layout.size("ffn"), of_experts)


class _Weights:
    """Makes the Weights of one layout; rows and columns are those of matrices stored [out, in]."""

    def __init__(self, layout: Layout, fp8: bool):
        self.layout = layout
        self.wide = float(np.dtype(layout.dtype).itemsize)
        # one float32 scale for each block of 128 x 128
        self.itemsize = 1 + 4 / 128**2 if fp8 else self.wide

    def norm(self, path: str, size: int) -> Weight:
        return Weight(path, (size,), 4, (None,))

    def rows(self, path: str, rows: int, columns: int, axis: str | None = None) -> Weight:
        return Weight(path, (rows, columns), self.itemsize, (self.layout.axes(axis) if axis else None, None))

    def columns(self, path: str, rows: int, columns: int, axis: str) -> Weight:
        return Weight(path, (rows, columns), self.itemsize, (None, self.layout.axes(axis)))

    def experts(self, chosen: int, E: int, D: int, F: int) -> tuple[Weight, ...]:
        experts, wide = self.layout.axes("experts"), self.layout.axes("expert_ffn")
        choice = (chosen, E)
        return (
            Weight("moe.router", (E, D), self.wide, (None, None)),
            Weight("moe.gate_up", (E, 2 * F, D), self.itemsize, (experts, wide, None), choice),
            Weight("moe.down", (E, D, F), self.itemsize, (experts, None, wide), choice),
        )

    def model(
        self,
        fields: Fields,
        layers: tuple[tuple[Weight, ...], ...],
        cache: Cache,
        query_heads: int,
        query_width: int,
        ffn_width: int,
        expert_width: int,
    ) -> Sizes:
        D, vocab, ranks = fields.integer("hidden_size"), fields.integer("vocab_size"), self.layout.size("vocab")
        padded = -(-vocab // ranks) * ranks
        axes = (self.layout.axes("vocab"), None)
        return Sizes(
            layout=self.layout,
            embed=Weight("embed.weight", (padded, D), self.wide, axes, lookup=True),
            layers=layers,
            norm=self.norm("norm.weight", D),
            head=Weight("head.weight", (padded, D), self.wide, axes),
            tied=fields.flag("tie_word_embeddings", False),
            cache=cache,
            padded_vocab=padded,
            query_heads=query_heads,
            query_width=query_width,
            ffn_width=ffn_width,
            expert_width=expert_width,
        )
