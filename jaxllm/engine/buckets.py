"""The few shapes that the step is compiled for, and which of them a step runs in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Room for `decodes` decoding requests and `tiles` tiles of prompt tokens.

    chunks: prompts that may end in the step, each of which a token is sampled for (None: one a tile). Plans give all
    buckets with tiles and decodes the same number, because the sampler is compiled for each number of rows; those of
    prompts alone have as many rows as the smallest of these.
    """

    decodes: int
    tiles: int
    chunks: int | None = None

    @property
    def rows(self) -> int:
        """Rows that a token is sampled for: every decode, and the last token of every chunk."""
        return self.decodes + (self.tiles if self.chunks is None else self.chunks)

    def tokens(self, tile: int) -> int:
        return self.decodes + self.tiles * tile

    def __str__(self) -> str:
        return f"{self.decodes} decodes + {self.tiles} tiles"


def powers_of_two(top: int, step: int = 1) -> list[int]:
    """1, 2^step, 4^step ... below `top`, then `top` itself."""
    out = []
    n = 1
    while n < top:
        out.append(n)
        n <<= step
    return [*out, top]


def plan(
    max_batch_size: int,
    max_tiles: int,
    *,
    batch_sizes: Iterable[int] | None = None,
    tile_counts: Iterable[int] | None = None,
    micro_batches: int = 1,
    fine: bool = False,
) -> list[Bucket]:
    """Buckets that between them cover every step the scheduler can make.

    `max_batch_size` sequences run at the same time, and the decodes among them take turns in `micro_batches` steps.

    Decodes alone get a bucket for each power of two of the batch size and, from 16 on, one halfway between: a batch
    that shrinks pays for its padding all the way down. With `fine`, where a row of padding costs as much as any other
    (a CPU), two more lie between from 32 on.

    Prompts get one for each power of two of the tile count, beside few decodes and beside as many as there can be: a
    tile of padding costs what a hundred rows of padding do. As many as there can be also get one alone: the rows of a
    few decodes would cost them a row of tiles of each product. With `fine` they also get all of them alone, and beside
    the powers of eight of the batch size those of four of the tile count.
    """
    most = -(-max_batch_size // micro_batches)  # decodes of a step
    sizes = sorted({n for n in batch_sizes if n <= most} | {most}) if batch_sizes else None
    counts = sorted({n for n in tile_counts if n <= max_tiles} | {max_tiles}) if tile_counts else None
    alone, mixed = counts or powers_of_two(max_tiles), counts or powers_of_two(max_tiles, 2)
    chunks = min(max_tiles, max_batch_size)
    between = [m * n for n in powers_of_two(most) if n >= 8 for m in ((3, 5, 7) if fine else (3,)) if m * n < most]
    buckets = {Bucket(n, 0, 0) for n in sizes or powers_of_two(most) + between}
    if max_batch_size == 1:  # nothing to mix
        return sorted(buckets | {Bucket(0, n, chunks) for n in alone})
    mixed_sizes = sizes or [n for n in powers_of_two(most, 3) if n >= min(8, most)]
    if not fine:
        few = next(n for n in mixed_sizes if n >= min(8, most))
        buckets.add(Bucket(0, max(alone), few + chunks))
        return sorted(buckets | {Bucket(d, n, chunks) for d in (few, most) for n in alone})
    # Prompts alone sample from as many rows as the smallest mixed bucket does.
    buckets |= {Bucket(0, n, mixed_sizes[0] + chunks) for n in alone}
    buckets |= {Bucket(d, n, chunks) for d in mixed_sizes for n in mixed}
    return sorted(buckets)


class Picker:
    """Chooses the cheapest compiled bucket that holds a step."""

    def __init__(self, buckets: Iterable[Bucket], tile: int):
        self._by_cost = sorted(buckets, key=lambda b: (b.tokens(tile), b.rows))
        self._chosen: dict[tuple[int, int], Bucket] = {}

    def pick(self, decodes: int, tiles: int) -> Bucket:
        """The bucket with the fewest tokens that has room; ValueError when there is none."""
        key = (decodes, tiles)
        if key not in self._chosen:
            fits = (b for b in self._by_cost if b.decodes >= decodes and b.tiles >= tiles)
            bucket = next(fits, None)
            if bucket is None:
                raise ValueError(f"no bucket holds {decodes} decodes and {tiles} tiles")
            self._chosen[key] = bucket
        return self._chosen[key]
