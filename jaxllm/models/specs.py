"""The parameters of a layer as the ranks of a mesh hold them, made of rows and columns of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.layers.mla import LatentConfig
from jaxllm.layers.quantize import Declared
from jaxllm.models.config import ExpertNames, ExpertsConfig, ModelConfig
from jaxllm.models.quantization import HEAD
from jaxllm.parallel.heads import ceil_div, split_segments
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.params import ParamSpec, Segment


class Specs:
    """Declares the parameters of a layer: which rows of the checkpoint each rank's part of a fused matrix consists of.

    prefix: of the names in the checkpoint; empty for what is in no layer. layer: its number, for the placement of
    experts.
    """

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
