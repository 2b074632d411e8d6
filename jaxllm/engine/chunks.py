"""How many tokens of prompts go into a step, so that its tiles are full and the stages of a pipeline all have work."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from jaxllm.engine.step import Step

_LEAST_TILES = 4  # prompt tiles of a micro-batch: with fewer, a step costs more than it saves in waiting


class Chunks:
    """Sizes of prompt chunks; arguments are those of `Scheduler`."""

    def __init__(
        self, *, max_num_tokens: int, tile: int, max_tiles: int, tile_counts: Iterable[int], micro_batches: int
    ) -> None:
        self.max_num_tokens = max_num_tokens
        self.tile = tile
        self.max_tiles = max_tiles
        self.micro_batches = micro_batches
        self._tile_counts = sorted(tile_counts)
        self._rounds = 2 * micro_batches
        self._share = 0  # prompt tokens of a micro-batch

    def tiles(self, tokens: int) -> int:
        """Tiles that a chunk takes."""
        return -(-tokens // self.tile)

    def fit_one_step(self, tokens: int) -> bool:
        """Whether a prompt can be computed at once."""
        return tokens <= self.max_num_tokens and self.tiles(tokens) <= self.max_tiles

    @property
    def most_known(self) -> int:
        """Prompt tokens beyond which it does not matter to `share` how many there are."""
        return self._rounds * self.max_num_tokens

    def share(self, known: int, under_way: bool) -> int:
        """Prompt tokens of one micro-batch, of `known` ones that are there.

        It does not shrink while prompts are under way, or their ends would crumble.
        """
        before = self._share if under_way else 0
        tiles = max(-(-known // (self._rounds * self.tile)), _LEAST_TILES)
        tiles = next((count for count in self._tile_counts if count >= tiles), tiles)
        self._share = max(before, tiles * self.tile)
        return self._share

    def cut_to_fill(self, step: Step) -> None:
        """Leaves the end of the last chunk to the next step where more than a quarter of this one would be padding.

        Nine tiles, where there are steps of eight and sixteen, are eight now and one later.
        """
        counts = self._tile_counts
        needed = sum(self.tiles(chunk.stop - chunk.start) for chunk in step.prefills)
        above = bisect_left(counts, needed)
        if not 0 < above < len(counts) or 4 * (counts[above] - needed) <= counts[above]:
            return
        last = step.prefills[-1]
        tiles = self.tiles(last.stop - last.start) - (needed - counts[above - 1])
        if tiles > 0:
            last.stop = last.seq.num_computed = last.start + tiles * self.tile
            last.samples = False
