"""The collectives of a step, in the order in which `models.decoder` and `engine.forward` call them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.mapping import CpType
from jaxllm.parallel.expert import EP, capacity, choose_method
from jaxllm.plan.gpus import Gpu
from jaxllm.plan.sizes import Model, Sizes

CP = ("cp",)


@dataclass(frozen=True, slots=True)
class Collective:
    """`count` alike collectives a step over `ranks` devices along `axes`; `bytes` is the result of one on a device.

    conditional: skipped at run time in steps that do not need it.
    """

    kind: str
    where: str
    axes: tuple[str, ...]
    ranks: int
    count: int
    bytes: int
    conditional: bool = False

    @property
    def wire_bytes(self) -> float:
        """What a device sends in one of them, with the ring algorithms."""
        share = (self.ranks - 1) / self.ranks
        if self.kind == "reduce_scatter":
            return (self.ranks - 1) * self.bytes
        return {"all_reduce": 2 * share, "all_gather": share, "all_to_all": share, "permute": 1, "send": 1}[
            self.kind
        ] * self.bytes

    def seconds(self, gpu: Gpu) -> float:
        """Time of all of them, if nothing hides it."""
        return self.count * (gpu.latency + self.wire_bytes / gpu.link)


def collectives(model: Model, sizes: Sizes, layers: range, tokens: int, *, prompt: bool) -> list[Collective]:
    """What one pipeline stage does in a step of `tokens` tokens: prompt tokens, or one of each of so many requests."""
    layout, cache = sizes.layout, sizes.cache
    element, D, n = np.dtype(layout.dtype).itemsize, model.hidden_size, len(layers)
    lanes, cp = layout.axes("requests"), layout.mapping.cp
    own = -(-tokens // (sizes.shards(set(layout.axes("tokens"))) if prompt else sizes.shards(set(lanes))))
    out: list[Collective] = []

    def add(kind: str, where: str, axes: Collection[str], count: int, size: float, conditional: bool = False) -> None:
        ranks = sizes.shards(set(axes))
        if ranks > 1 and count:
            wide = tuple(axis for axis in axes if sizes.shards({axis}) > 1)
            out.append(Collective(kind, where, wide, ranks, count, round(size), conditional))

    row = D * element
    spread = layout.spread(own, D)
    shares = sizes.shards(set(spread))

    def add_up(where: str, axes: Sequence[str], count: int, apart: Sequence[str]) -> None:
        """Partial sums over `axes`; the rows of the result are split over `apart`."""
        if apart:
            add("reduce_scatter", where, apart, count, own * row / shares)
        else:
            add("all_reduce", where, axes, count, own * row)

    ffn, vocab = layout.axes("ffn"), layout.axes("vocab")
    if layers.start == 0:
        add("all_gather", "token ids", lanes, 1, own * 4 * sizes.shards(set(lanes)))
        add_up("embedding", vocab, 1, lanes or spread)
    add("all_gather", "rows before QKV", spread, n, own * row)
    heads = sizes.query_width * element
    kept = sum(cache.arrays) * element
    partial = heads + 4 * sizes.query_heads  # with a float32 lse for each head
    kind = layout.cp_type if cp > 1 else None
    if kind is CpType.ULYSSES and prompt:
        add("all_to_all", "tokens to heads", CP, n, own * cp * (heads + kept))
        add("all_to_all", "heads to tokens", CP, n, own * cp * heads)
    elif kind is CpType.ULYSSES:
        add("all_gather", "heads of decodes", CP, n, own * cp * heads)
    elif kind is CpType.HELIX:
        add("all_to_all", "partial attention", CP, n, own * partial)
    elif kind is not None and not prompt:
        add("all_gather", "partial attention", CP, n, own * cp * partial)
    elif kind is not None:
        if kind is CpType.RING:
            add("permute", "keys and values round the ring", CP, n * (cp - 1), own * kept)
        else:
            anchor = layout.mapping.star.anchor_size if layout.mapping.star else 0
            add("all_reduce", "anchor of each prompt", CP, n, anchor * kept, conditional=True)
        add("all_gather", "queries to what other ranks have of the context", CP, n, own * cp * heads, conditional=True)
        add("all_to_all", "their partial attention", CP, n, own * cp * partial, conditional=True)
    add_up("attention output", layout.axes("head_out"), n, spread)
    split = lanes or spread
    exchanged = 0
    for chosen, shared in sizes.chosen(layers):
        here = own // shares
        method = layout.expert_method or choose_method(layout.mapping.ep, chosen, here, bool(split))
        if method == "all_to_all" and layout.mapping.ep > 1:
            exchanged += 0 if shared else 1  # what is shared goes the way of a dense layer besides
            others, between = layout.axes("expert_ffn"), tuple(axis for axis in split if axis not in EP)
            share = here * sizes.shards(set(between)) if split else -(-here // layout.mapping.ep)
            room = capacity(share, chosen, layout.mapping.ep)
            sent = room * layout.mapping.ep
            add("all_gather", "tokens to the columns of their experts", between, 1, share * row)
            add("all_reduce", "rounds of the exchange", EP, int(room < share), 4)
            add("all_to_all", "tokens to their experts", EP, 1, sent * row)
            add("all_to_all", "numbers and weights of their experts", EP, 1, sent * chosen * 8)
            add("all_to_all", "sums of their experts", EP, 1, sent * row)
            if between:
                add("reduce_scatter", "columns of the experts", between, 1, here * row)
            add("all_reduce", "columns of the experts", set(others) - set(between), 1, (here if split else share) * row)
            if not split:
                add("all_gather", "tokens after their experts", EP, 1, share * row * layout.mapping.ep)
    add("all_gather", "tokens before the FFN", split, n - exchanged, own * row * sizes.shards(set(lanes)))
    add_up("FFN output", ffn, n - exchanged, split)
    if layers.stop == model.num_layers:
        rows = 1 if prompt else own
        if prompt:
            add("all_reduce", "last tokens", (*layout.axes("prompts"), *spread), 1, row)
        else:
            add("all_gather", "rows to sample", spread, 1, own * row)
        if lanes:
            add("all_gather", "rows to sample", lanes, 1, rows * row * sizes.shards(set(lanes)))
            add("all_gather", "their slots", lanes, 1, rows * 4 * sizes.shards(set(lanes)))
        sampled = rows * sizes.shards(set(lanes))
        add("all_gather", "greedy", vocab, 2, sampled * 4 * sizes.shards(set(vocab)))
    else:
        out.append(Collective("send", "to the next stage", ("pp",), 2, 1, round(own * row / shares)))
    return out
