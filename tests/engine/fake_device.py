"""A device that computes nothing, and knows what every page must hold.

It stores, per page and offset, a hash of the token prefix whose KV was written there, and checks before every step that
the page table of each row holds exactly the KV of that row's own prefix. Sharing the wrong page, using one too early or
giving one away too soon changes a hash.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from jaxllm.engine.request import FinishReason, Request, Sequence
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Event, Step

VOCAB, EOS, STOP_ID = 40, 0, 1


@dataclass
class Params:
    """The fields of SamplingParams that the scheduler reads."""

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    end_id: int | None = None
    wait_for_token: bool = False


class Truth:
    """What a sequence must consist of, whatever the scheduler does: tokens and one prefix hash per position."""

    def __init__(self, seq: Sequence) -> None:
        self.seed = seq.index
        self.tokens: list[int] = []
        self.hashes: list[int] = []
        self._last = hash((7, hash_text(seq.request.cache_salt)))
        for token in seq.request.prompt_token_ids:
            self._push(token)

    def _push(self, token: int) -> None:
        self._last = hash((self._last, token))
        self.tokens.append(token)
        self.hashes.append(self._last)

    def token(self, position: int) -> int:
        """The token at a position, sampled from the prefix when it is beyond the prompt."""
        while len(self.tokens) <= position:
            self._push(hash((self._last, self.seed, 3)) % VOCAB)
        return self.tokens[position]

    def end(self, seq: Sequence, max_seq_len: int) -> tuple[int, FinishReason]:
        """Length at which the sequence has to end by itself, and why."""
        params: Params = seq.request.params  # type: ignore[assignment]
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
        prompt = len(seq.request.prompt_token_ids)
        limit = max_seq_len if params.max_tokens is None else min(max_seq_len, prompt + params.max_tokens)
        for position in range(prompt, limit):
            if self.token(position) in stops and position + 1 - prompt >= (params.min_tokens or 0):
                return position + 1, FinishReason.STOP
        return limit, FinishReason.LENGTH


def hash_text(text: str | None) -> int:
    return 0 if text is None else int.from_bytes(text.encode(), "little") + 1


class FakeDevice:
    """Runs steps in order on pages of prefix hashes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.size = scheduler.pool.page_size
        self.kv = [[-1] * self.size for _ in range(scheduler.pool.num_pages)]
        self.last: dict[int, int | None] = {}  # by slot
        self.truths: dict[Sequence, Truth] = {}
        self.steps = 0
        self.sampled: dict[Sequence, int] = {}  # number of the step that a sequence's last token came from

    def truth(self, seq: Sequence) -> Truth:
        if seq not in self.truths:
            self.truths[seq] = Truth(seq)
        return self.truths[seq]

    def _read(self, seq: Sequence, stop: int) -> None:
        hashes, size = self.truth(seq).hashes, self.size
        assert len(hashes) >= stop
        full, rest = divmod(stop, size)
        for index in range(full):
            assert self.kv[seq.pages[index]] == hashes[index * size : (index + 1) * size], f"foreign KV: {seq}"
        if rest:
            assert self.kv[seq.pages[full]][:rest] == hashes[full * size : stop], f"foreign KV: {seq}"

    def _write(self, seq: Sequence, start: int, stop: int) -> None:
        hashes, pool = self.truth(seq).hashes, self.scheduler.pool
        for position in range(start, stop):
            page = seq.pages[position // self.size]
            if position == start or position % self.size == 0:
                assert page != 0
                assert pool._refs[page] == 1, f"page {page} is shared and written: {seq}"
                assert not pool.is_registered(page), f"page {page} is in the prefix cache and written: {seq}"
            self.kv[page][position % self.size] = hashes[position]

    def run(self, step: Step) -> list[list[int]]:
        """Check a step, run it, and return one token per row for each of its repeats."""
        assert len(step.counts) == (len(step.decodes) if step.repeats > 1 else 0)
        out = [self._run(step)]
        for number in range(1, step.repeats):
            out.append([-1] * step.num_rows)
            for row, (seq, position, count) in enumerate(zip(step.decodes, step.positions, step.counts, strict=True)):
                assert count == min(step.repeats, seq.max_len - 1 - position) and not seq.wait_for_token
                if number < count:
                    self._read(seq, position + number)
                    self._write(seq, position + number, position + number + 1)
                    out[-1][row] = self._sample(seq, position + number + 1)
        self.steps += 1
        return out

    def _run(self, step: Step) -> list[int]:
        scheduler = self.scheduler
        assert step.num_tokens <= scheduler.max_num_tokens * step.repeats
        assert sum(-(-(c.stop - c.start) // scheduler.tile) for c in step.prefills) <= scheduler.max_tiles
        rows = step.decodes + [chunk.seq for chunk in step.prefills]
        slots = [seq.slot for seq in rows]
        assert len(set(slots)) == len(rows) <= scheduler.max_batch_size
        assert set(slots) <= set(scheduler._running.slots)
        assert len(step.positions) == len(step.decodes)
        for seq in step.started:
            self.last[seq.slot] = None
        # A row may read what earlier steps wrote and what it writes itself, so all reads come first.
        late = [s for s in step.decodes if s.num_pending > 1 and self.steps - self.sampled[s] < scheduler.micro_batches]
        assert not late or (len(late) == len(rows) and all(seq.num_pending == 2 for seq in late)), (
            f"decoded before its last step left the pipeline: {late}"
        )
        for seq, position in zip(step.decodes, step.positions, strict=True):
            assert position + 1 < seq.max_len, f"scheduled past its end: {seq}"
            assert self.last[seq.slot] == self.truth(seq).token(position), f"wrong input token: {seq}"
            if seq.wait_for_token:
                assert seq.num_pending == 1 and len(seq.tokens) == position + 1
            self._read(seq, position)
        for chunk in step.prefills:
            assert chunk.start < chunk.stop <= len(chunk.seq.tokens)
            assert chunk.samples == (chunk.stop == len(chunk.seq.tokens))
            self.truth(chunk.seq).token(chunk.stop - 1)
            self._read(chunk.seq, chunk.start)
        tokens = []
        for seq, position in zip(step.decodes, step.positions, strict=True):
            self._write(seq, position, position + 1)
            tokens.append(self._sample(seq, position + 1))
        for chunk in step.prefills:
            self._write(chunk.seq, chunk.start, chunk.stop)
            tokens.append(self._sample(chunk.seq, chunk.stop) if chunk.samples else -1)
        assert not (step.repeats > 1 and step.prefills)
        return tokens

    def _sample(self, seq: Sequence, position: int) -> int:
        token = self.truth(seq).token(position)
        self.last[seq.slot] = token
        self.sampled[seq] = self.steps
        return token


@dataclass
class Harness:
    """Drives a scheduler and its fake device with `depth` steps in flight, and checks how every sequence ends.

    repeats: decode steps of a dispatch, where the scheduler agrees.
    """

    scheduler: Scheduler
    depth: int = 1
    repeats: int = 1
    repeated: int = 0  # dispatches of several steps
    requests: list[Request] = field(default_factory=list)  # unfinished
    histories: list[list[int]] = field(default_factory=list)  # token lists of finished sequences, for later prompts
    inflight: deque[tuple[Step, list[list[int]]]] = field(default_factory=deque)
    added: int = 0
    steps: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.device = FakeDevice(self.scheduler)

    def add(self, prompt: list[int], params: Params, **kwargs: object) -> Request | None:
        request = Request(self.added, prompt, params, **kwargs)  # type: ignore[arg-type]
        for seq in request.sequences:
            seq.wait_for_token = params.wait_for_token
        self.added += 1
        try:
            self.scheduler.add(request)
        except ValueError:
            one_step = min(self.scheduler.max_num_tokens, self.scheduler.max_tiles * self.scheduler.tile)
            too_long = len(prompt) > self.scheduler.max_seq_len - 1
            assert too_long or (not self.scheduler.chunked_prefill and len(prompt) > one_step)
            return None
        self.requests.append(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)
        assert request.finished
        assert all(seq.pages == [] and seq.slot == -1 for seq in request.sequences)
        self._forget(request)

    def stop(self, seq: Sequence) -> None:
        """What the engine does when it finds a stop string."""
        self.scheduler.finish(seq, FinishReason.STOP, "text")
        assert seq.finished and seq.pages == []
        if seq.request.finished:
            self._forget(seq.request)

    def _forget(self, request: Request) -> None:
        if request in self.requests:  # siblings may end with the same step
            self.requests.remove(request)
        for seq in request.sequences:
            self.device.truths.pop(seq, None)
            self.device.sampled.pop(seq, None)

    def advance(self) -> list[Event]:
        """Schedule and run one step if there is room for it in flight, and take the results of one when due."""
        step = self._schedule() if len(self.inflight) < self.depth else None
        if step is not None:
            self.steps += 1
            self.inflight.append((step, self.device.run(step)))
        if not self.inflight:
            assert not self.scheduler.has_work(), f"nothing runs and nothing can: {self.requests[:3]}"
            return []
        if step is not None and len(self.inflight) < self.depth:
            return []
        step, repeats = self.inflight.popleft()
        all_events, rows = [], step.rows
        for tokens in repeats:
            events = self.scheduler.update(step, tokens)
            all_events += events
            for event in events:
                self.tokens += 1
                assert rows[event.row] is event.seq and tokens[event.row] == event.token == event.seq.tokens[-1]
                assert event.finished == event.seq.finished
                if event.finished:
                    self._check_end(event.seq)
        for seq in (seq for request in self.requests for seq in request.sequences if not seq.finished):
            assert seq.num_pending >= 0 and (self.inflight or not seq.num_pending), f"tokens are miscounted: {seq}"
        return all_events

    def _schedule(self) -> Step | None:
        before = [seq for request in self.requests for seq in request.sequences if seq.slot >= 0]
        step = self.scheduler.schedule()
        gone = [seq for seq in before if seq.slot < 0]
        kept = [seq for seq in before if seq.slot >= 0]
        if gone and step is not None:
            assert not step.started, "pages that were taken from somebody went to a new sequence"
        if gone and kept:
            assert min(seq.rank for seq in gone) > max(seq.rank for seq in kept), f"preempted the wrong one: {gone}"
        return self._repeat(step)

    def _repeat(self, step: Step | None) -> Step | None:
        """What the engine does with a step of decodes."""
        if self.repeats > 1 and step is not None and self.scheduler.can_repeat(step, self.repeats):
            self.scheduler.repeat(step, self.repeats)
            self.repeated += 1
        return step

    def _check_end(self, seq: Sequence) -> None:
        truth = self.device.truth(seq)
        length, reason = truth.end(seq, self.scheduler.max_seq_len)
        assert seq.tokens == truth.tokens[:length]
        assert seq.finish_reason == reason
        assert seq.stop_reason == (STOP_ID if seq.tokens[-1] == STOP_ID and reason == FinishReason.STOP else None)
        assert seq.pages == [] and seq.slot == -1
        if len(self.histories) < 200:
            self.histories.append(list(seq.tokens))
        if seq.request.finished:
            self._forget(seq.request)

    def drain(self) -> None:
        """Run until everything has finished; then no page may be held and no slot taken."""
        while self.scheduler.has_work() or self.inflight:
            self.advance()
        self.scheduler.check()
        assert not self.requests
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.scheduler.pool.num_free == self.scheduler.pool.capacity
        if self.scheduler.policy == "GUARANTEED_NO_EVICT":
            assert self.scheduler.num_preemptions == 0
