"""Which prompt tokens a step computes: chunks of the prompts that are under way, then those of new sequences."""

from __future__ import annotations

from jaxllm.engine.chunks import Chunks
from jaxllm.engine.request import Sequence
from jaxllm.engine.roster import Roster
from jaxllm.engine.step import Chunk, Step


class Prefill:
    """Fills what decodes leave of a step, as far as tokens, tiles, slots and pages go.

    chunked: False computes a prompt in one step (only a preempted sequence that has outgrown the budget in several).
    """

    def __init__(self, roster: Roster, chunks: Chunks, *, chunked: bool) -> None:
        self._roster = roster
        self._chunks = chunks
        self._chunked = chunked

    def fill(self, step: Step, tokens: int, *, admit: bool) -> None:
        """Puts up to `tokens` prompt tokens into a step. admit: False lets no new sequence in."""
        chunks = self._chunks
        if chunks.micro_batches > 1 and self._chunked:
            tokens = min(tokens, self._share())
        tiles = chunks.max_tiles
        for seq in self._roster.running.prefilling:
            if tokens == 0 or tiles == 0:
                break
            count = self._add(step, seq, tokens, tiles)
            tokens -= count
            tiles -= chunks.tiles(count)
        if admit and self._roster.waiting:
            self._admit(step, tokens, tiles)
        if step.prefills and chunks.micro_batches == 1 and self._chunked:
            chunks.cut_to_fill(step)

    def _share(self) -> int:
        """Prompt tokens of one micro-batch."""
        prefilling = self._roster.running.prefilling
        known = sum(len(seq.tokens) - seq.num_computed for seq in prefilling)
        known += self._roster.waiting.num_tokens(self._chunks.most_known)
        return self._chunks.share(known, under_way=bool(prefilling))

    def _add(self, step: Step, seq: Sequence, tokens: int, tiles: int) -> int:
        start = seq.num_computed
        count = min(len(seq.tokens) - start, tokens, tiles * self._chunks.tile)
        seq.num_computed = stop = start + count
        step.prefills.append(Chunk(seq, start, stop, stop == len(seq.tokens)))
        return count

    def _admit(self, step: Step, tokens: int, tiles: int) -> None:
        roster = self._roster
        while roster.running.free_slots and tokens > 0 and tiles > 0:
            seq = roster.waiting.peek()
            if seq is None:
                break
            if seq.num_pending:
                break  # preempted a moment ago: its next token is still on the way
            if not self._take_pages(seq, tokens, tiles):
                break
            roster.start(seq)
            step.started.append(seq)
            count = self._add(step, seq, tokens, tiles)
            tokens -= count
            tiles -= self._chunks.tiles(count)

    def _take_pages(self, seq: Sequence, tokens: int, tiles: int) -> bool:
        """Give a waiting sequence pages for all its known tokens, as many as possible shared; False: it must wait."""
        pages, running, chunks = self._roster.pages, len(self._roster.running), self._chunks
        if not pages.may_fit(seq, running):
            return False
        shared, matched = pages.find_shared(seq)
        if not self._chunked:
            rest = len(seq.tokens) - len(shared) * pages.pool.page_size
            fits_now = rest <= tokens and chunks.tiles(rest) <= tiles
            if not fits_now and chunks.fit_one_step(rest):
                return False
        return pages.take(seq, shared, matched, running)
