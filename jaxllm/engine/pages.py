"""Which pages sequences get, share and leave behind for others: what the scheduler asks of the pool."""

from __future__ import annotations

import sys

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import Sequence
from jaxllm.engine.siblings import SharedPrompts

_NEVER = sys.maxsize


class Pages:
    """Gives pages to sequences that start to run, and takes them back.

    guaranteed: a sequence starts only if it fits beside all others at their longest.
    reserved: pages of all running sequences at their longest.
    """

    def __init__(self, pool: PagePool, *, guaranteed: bool) -> None:
        self.pool = pool
        self.shared = SharedPrompts(pool)
        self.reserved = 0
        self._guaranteed = guaranteed
        # Head of the queue that did not fit, the spare pages then, and the digest of the next page that it could share.
        self._blocked: tuple[Sequence, int, bytes | None] | None = None

    def may_fit(self, seq: Sequence, running: int) -> bool:
        """False where a waiting sequence surely has to wait, beside `running` others; costs next to nothing."""
        if running:
            if self._guaranteed and self.reserved + seq.max_pages > self.pool.capacity:
                return False
            if self._still_blocked(seq, running):
                return False
        self._blocked = None
        return True

    def _still_blocked(self, seq: Sequence, running: int) -> bool:
        """True when nothing got better since this sequence did not fit; saves looking its prefix up at every step."""
        if self._blocked is None or self._blocked[0] is not seq:
            return False
        _, spare, digest = self._blocked
        return self.pool.num_free - running <= spare and not (digest and self.pool.has(digest))

    def find_shared(self, seq: Sequence) -> tuple[list[int], int]:
        """Pages that hold a prefix of a waiting sequence already, and how many of them are registered for sure."""
        if seq.pages:
            return seq.pages, 0
        matched: list[int] = []
        if seq.request.prefix_cache:
            matched = self.pool.match_prefix(seq.tokens, seq.request.cache_salt, seq.chain)
        donated: list[int] = []
        if len(seq.request.sequences) > 1 and len(matched) < self.shared.num_shareable(seq):
            donated = self.shared.donor_pages(seq)
        return donated or matched, len(matched)

    def take(self, seq: Sequence, shared: list[int], matched: int, running: int) -> bool:
        """Gives a waiting sequence pages for all its known tokens, `shared` ones first; False: it must wait."""
        pool = self.pool
        needed = pool.pages_for(len(seq.tokens)) - len(shared)
        # Keep a page for each running sequence: they need it soon, and preempting right after admission wastes work.
        keep = running and not self._guaranteed
        spare = running if keep else 0
        inherited = bool(seq.pages)
        if not inherited:
            pool.incref(shared)
        if not keep:
            self.shared.strip_until(needed, keep=seq)
        if pool.num_free < needed + spare:
            if not inherited:
                pool.release(shared)
            unmatched = seq.chain[matched + 1] if len(seq.chain) > matched + 1 else None
            self._blocked = (seq, pool.num_free - spare, unmatched)
            return False
        if inherited:
            self.shared.admitted(seq)
        elif seq.request.prefix_cache and pool.prefix_cache:
            pool.record_lookup(len(shared), (len(seq.tokens) - 1) // pool.page_size - len(shared))
        seq.pages = shared + pool.allocate(needed)
        seq.num_computed = len(shared) * pool.page_size
        if seq.index == 0 and seq.request.num_cached is None:
            seq.request.num_cached = seq.num_computed
        seq.prompt_ready = len(shared) >= self.shared.num_shareable(seq)
        seq.register_at = (matched + 1) * pool.page_size if pool.prefix_cache else _NEVER
        self.reserved += seq.max_pages
        return True

    def give_back(self, seq: Sequence) -> None:
        """A running sequence leaves: its pages are free, and those that others may share stay known."""
        self.register(seq)
        self.reserved -= seq.max_pages
        self.pool.release(seq.give_up_pages())

    def register(self, seq: Sequence) -> None:
        """Names the pages that are full of known, dispatched tokens, so that later steps can share them."""
        pool = self.pool
        if not pool.prefix_cache or not seq.pages:
            return
        first = seq.register_at // pool.page_size - 1
        full = min(seq.num_computed, len(seq.tokens)) // pool.page_size
        if full <= first:
            return
        pool.extend_chain(seq.chain, seq.tokens, full, seq.request.cache_salt)
        for index in range(first, full):
            pool.register(seq.pages[index], seq.chain[index + 1])
        seq.register_at = (full + 1) * pool.page_size
