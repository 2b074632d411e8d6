"""How a model lies over the devices of a stage: the one table from logical axes to mesh axes.

Modules name logical axes only. What context parallelism and attention data parallelism change about the layout of
weights, pages and tokens is decided here, in `Layout.table`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.mapping import CpType, Mapping
from jaxllm.parallel.expert import Dispatch
from jaxllm.parallel.heads import HeadLayout
from jaxllm.parallel.mesh import partition
from jaxllm.placement import Placement

MODEL_AXES = ("ep", "tp")
"""Dense weights shard over ep and tp together, so that a model without experts can use every device of a stage."""

SPREAD_BYTES = 32 << 20
"""Size of a residual stream from which `Layout.spread` splits it. A reduce-scatter and an all-gather move the bytes of
one all-reduce, and the norms then read and write a share of the rows; the second collective's latency (14 us on two
H200s) is earned back at about 4,096 tokens of a model 4,096 wide in bfloat16."""


@dataclass(frozen=True)
class Layout:
    """A `Mapping` as the modules see it, with the dtype of weights and activations.

    Logical axes, and the mesh axes that each is split over (`cp` only where the kind of context parallelism says so):

        heads       rows of the fused QKV matrix          (ep, tp); attention DP: nothing, every rank has all heads
        kv_heads    KV heads of the page pools            as heads; ULYSSES: and cp
        head_out    columns of the output projection      as heads; HELIX: and cp
        sinks       heads of the result of attention      as heads; ULYSSES and HELIX: and cp
        ffn, vocab  FFN columns, vocabulary rows          (ep, tp); HELIX: and cp, where tokens are not split
        experts     experts of a mixture                  ep
        expert_ffn  FFN columns of each expert            tp; HELIX: and cp
        pages       page pools with pages of their own    RING, STAR, HELIX: cp; attention DP: (ep, tp)
        requests    requests of a step                    attention DP: (ep, tp), else nothing
        prompts     prompt tokens of a request            RING, ULYSSES, STAR: cp, else nothing
        tokens      all tokens of a step                  requests and prompts
    """

    mapping: Mapping
    dtype: np.dtype
    dispatch: Dispatch = field(default_factory=Dispatch)
    """How tokens and experts come together."""
    placement: Placement | None = None
    """Which slot has which expert; None: each has one, in order, and weights are by expert."""

    @property
    def counts_loads(self) -> bool:
        """Whether the tokens of each expert are counted."""
        return self.placement is not None and self.placement.online

    @property
    def cp_type(self) -> CpType | None:
        """The kind of context parallelism in force: None on one cp rank, but for STAR, which is another attention."""
        kind = self.mapping.cp_type
        return kind if self.mapping.cp > 1 or kind is CpType.STAR else None

    @cached_property
    def table(self) -> dict[str, tuple[str, ...]]:
        cp: tuple[str, ...] = ("cp",)
        kind = self.mapping.cp_type if self.mapping.cp > 1 else None
        prompts = cp if self.mapping.prompt_parts > 1 else ()
        requests = MODEL_AXES if self.mapping.attention_dp else ()
        heads = () if self.mapping.attention_dp else MODEL_AXES
        helix, ulysses = kind is CpType.HELIX, kind is CpType.ULYSSES
        wide = (*MODEL_AXES, *cp) if helix else MODEL_AXES
        return {
            "heads": heads,
            "kv_heads": (*heads, *cp) if ulysses else heads,
            "head_out": (*heads, *cp) if helix else heads,
            "sinks": (*heads, *cp) if helix or ulysses else heads,
            "ffn": wide,
            "vocab": wide,
            "experts": ("ep",),
            "expert_ffn": tuple(axis for axis in wide if axis != "ep"),
            "pages": (*requests, *cp) if self.mapping.stripes > 1 else requests,
            "requests": requests,
            "prompts": prompts,
            "tokens": (*requests, *prompts),
        }

    def axes(self, logical: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over, the major one first."""
        return self.table[logical]

    def size(self, logical: str) -> int:
        """The number of shards of a logical axis."""
        sizes = {"cp": self.mapping.cp, "ep": self.mapping.ep, "tp": self.mapping.tp}
        return int(np.prod([sizes[axis] for axis in self.axes(logical)], dtype=int))

    def mesh_axes(self, logical: Sequence[str | None]) -> tuple[tuple[str, ...] | None, ...]:
        """The mesh axes of an array whose dimensions carry these logical axes."""
        return tuple(None if name is None else self.axes(name) for name in logical)

    def partition(self, *logical: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions carry these logical axes."""
        return partition(self.mesh_axes(logical))

    def sharding(self, mesh: Mesh, *logical: str | None) -> NamedSharding:
        """The NamedSharding of an array whose dimensions carry these logical axes."""
        return NamedSharding(mesh, self.partition(*logical))

    def spread(self, tokens: int, width: int) -> tuple[str, ...]:
        """The mesh axes over which the residual stream of a rank's `tokens` tokens is split between products.

        Sequence parallelism (arXiv 2205.05198): in long steps each rank of a tensor parallel group keeps, adds and
        norms its share of the rows; they are gathered before a product, whose partial sums are reduce-scattered. None
        with attention data parallelism, which splits the tokens anyway.
        """
        ranks = self.size("ffn")
        long = tokens * width * self.dtype.itemsize >= SPREAD_BYTES
        return self.axes("ffn") if ranks > 1 and long and not tokens % ranks and not self.axes("requests") else ()

    def stream(self, tokens: int, width: int) -> PartitionSpec:
        """The PartitionSpec of the residual stream x_TD of a step with `tokens` tokens on each rank."""
        return partition(((*self.axes("tokens"), *self.spread(tokens, width)), None))

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        """The attention heads of each rank; with ULYSSES each cp rank has heads of its own."""
        return HeadLayout.plan(num_heads, num_kv_heads, self.size("kv_heads"))

    @property
    def needs_chunks(self) -> bool:
        """Whether attention has to know of the prompt chunk that a tile belongs to."""
        return self.cp_type in (CpType.RING, CpType.STAR)

    def split_prompt(self, start: int, stop: int, tile: int, page_size: int) -> list[np.ndarray]:
        """The positions of [start, stop) that each of `prompt_parts` ranks computes, ascending.

        With a striped context a token is computed where its keys and values are kept; with ULYSSES, which moves them
        anyway, each rank has a run of whole tiles.
        """
        positions, parts = np.arange(start, stop), self.mapping.prompt_parts
        if self.mapping.stripes > 1:
            owner = positions // self.mapping.stripe(page_size) % parts
            return [positions[owner == part] for part in range(parts)]
        length = -(-len(positions) // (parts * tile)) * tile
        return [positions[part * length : (part + 1) * length] for part in range(parts)]
