"""How the n sequences of a request share the full pages of their prompt, with or without a prefix cache.

The first sequence computes the prompt. The others enter the queue when it has, take references on its full prompt pages
and compute only the tail. Should the last sequence that has these pages end while others still wait, one of those
inherits them; what is inherited can be taken away again when running sequences need the pages.
"""

from __future__ import annotations

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import Sequence, SequenceStatus


class SharedPrompts:
    """Finds the sibling to share with, and keeps track of waiting sequences that hold inherited pages."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.heirs: list[Sequence] = []

    def num_shareable(self, seq: Sequence) -> int:
        """Full pages of the prompt, less than all of it: one token has to be computed to sample the next."""
        return (seq.num_prompt - 1) // self.pool.page_size

    def donor_pages(self, seq: Sequence) -> list[int]:
        """The full prompt pages that a sibling has computed in earlier steps, or none."""
        for sibling in seq.request.sequences:
            if sibling.prompt_ready:
                return sibling.pages[: self.num_shareable(seq)]
        return []

    def hand_over(self, seq: Sequence) -> None:
        """Before the last sibling that has the prompt's pages gives them up, let one that still waits hold them."""
        count = self.num_shareable(seq)
        others = [other for other in seq.request.sequences if other is not seq]
        if not seq.prompt_ready or count == 0 or any(other.prompt_ready for other in others):
            return
        for other in others:
            if other.status is SequenceStatus.WAITING:
                other.pages = seq.pages[:count]
                self.pool.incref(other.pages)
                other.prompt_ready = True
                self.heirs.append(other)
                return

    def admitted(self, heir: Sequence) -> None:
        """An heir starts to run: from now on its pages are like anybody's."""
        self.heirs.remove(heir)

    def strip(self, heir: Sequence) -> None:
        """Take the inherited pages of one heir away."""
        self.heirs.remove(heir)
        self.pool.release(heir.give_up_pages())

    def strip_until(self, count: int, keep: Sequence | None = None) -> None:
        """Strip heirs, the lowest-ranked first, until `count` pages are free: what they lose can be recomputed."""
        if not self.heirs:
            return
        for heir in sorted(self.heirs, key=lambda seq: seq.rank, reverse=True):
            if self.pool.num_free >= count:
                return
            if heir is not keep:
                self.strip(heir)
