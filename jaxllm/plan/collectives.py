"""The collectives of a step, in the order in which `models.decoder` and `engine.forward` call them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.mapping import CpType
from jaxllm.parallel.expert import EP, capacity
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
        sent = {"all_reduce": 2 * share, "permute": 1.0, "send": 1.0}.get(self.kind, share)
        return sent * self.bytes

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

    vocab = layout.axes("vocab")
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
    mixtures = sizes.chosen(layers)

    def ffn_of(count: int, here: int) -> None:
        """An FFN of `here` tokens of each rank that tokens are split over."""
        add("all_gather", "tokens before the FFN", split, count, here * row * sizes.shards(set(split)))
        if split:
            add("reduce_scatter", "FFN output", split, count, here * row)
        else:
            add("all_reduce", "FFN output", layout.axes("ffn"), count, here * row)

    ffn_of(n - len(mixtures), own // shares)
    ep, limit = layout.mapping.ep, layout.dispatch.max_tokens
    for chosen, shared in mixtures:
        here = own // shares
        method = layout.dispatch.choose(ep, chosen, here, row, bool(split))
        turns = 1 if limit is None else -(-here // max(1, limit // sizes.shards(set(split))))
        here = -(-here // turns)
        if method == "replicate" or ep == 1 or shared:
            ffn_of(turns, here)
        if method == "replicate" or ep == 1:
            continue
        others, between = layout.axes("expert_ffn"), tuple(axis for axis in split if axis not in EP)
        share = here * sizes.shards(set(between)) if split else -(-here // ep)
        add("all_gather", "tokens to the columns of their experts", between, turns, share * row)
        if method == "all_to_all":
            room = capacity(share, chosen, ep)
            add("all_reduce", "rounds of the exchange", EP, turns * (room < share), 4)
            add("all_to_all", "tokens to their experts", EP, turns, room * ep * row)
            add("all_to_all", "numbers and weights of their experts", EP, turns, room * ep * chosen * 8)
            add("all_to_all", "sums of their experts", EP, turns, room * ep * row)
        else:
            sent = share * (1 - (1 - 1 / ep) ** chosen) * ep
            add("all_gather", "lengths of messages", EP, turns, 4 * ep * ep)
            add("ragged_all_to_all", "tokens, their experts and weights", EP, turns, sent * (row + 8 * chosen))
            add("ragged_all_to_all", "sums of their experts", EP, turns, sent * row)
        if between:
            add("reduce_scatter", "columns of the experts", between, turns, here * row)
        add("all_reduce", "columns of the experts", set(others) - set(between), turns, (here if split else share) * row)
        if not split:
            add("all_gather", "tokens after their experts", EP, turns, share * row * ep)
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
