"""The scheduler: who runs in the next step, which tokens are computed, and into which pages.

Continuous batching as in Orca and vLLM: every step carries one token of each decoding sequence and, within a token
budget, chunks of prompts. `schedule()` may be called again before the results of the previous step are known (the
overlap scheduler); this works because a decode takes its input token from the device, where the previous step left it,
and because the device runs steps in order, so that a page or a slot given up now can be reused in the next step.

`schedule()` decides in this order: decodes, prompts that are under way, new sequences. Pages for all known tokens are
taken at admission, so only decodes ask for more; when none is left the lowest-ranked running sequence is preempted and
computed again later.

A pipeline needs several steps in flight that do not depend on each other. With `micro_batches` = G the decoding
sequences take turns: each is decoded in every G-th step, and G consecutive steps differ by at most one in the number
of their decodes. Prompt chunks go into consecutive steps whatever G is, because each stage runs its steps in order.
The prompts that are there are spread over 2 G steps, or the last stage would wait for the first to do all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Literal, get_args

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.chunks import Chunks
from jaxllm.engine.limits import Limits
from jaxllm.engine.prefill import Prefill
from jaxllm.engine.request import FinishReason, Request, Sequence, SequenceStatus
from jaxllm.engine.roster import Roster
from jaxllm.engine.step import Event, LaneSteps, Step
from jaxllm.engine.turns import whose_turn

CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]

_FINISHED = SequenceStatus.FINISHED


class Scheduler:
    """Decides the steps of the device. Its roster moves the sequences, and with them slots and pages.

    max_batch_size   sequences that run at the same time (slots)
    max_num_tokens   tokens per step, decodes and prompt chunks together
    max_seq_len      prompt and output tokens of one sequence; lowered to what the pool holds for one sequence
    tile, max_tiles  the chunks of a step are padded to tiles of `tile` tokens; at most `max_tiles` of them
    first_slot       the slots are numbered from here
    policy           MAX_UTILIZATION admits what fits now and preempts when pages run out; GUARANTEED_NO_EVICT admits
                     only what fits together at its longest
    chunked_prefill  False: a prompt is computed in one step (only a preempted sequence that has outgrown the budget
                     is computed in several)
    priority_queue   True: the queue is ordered by priority, then arrival; False: by arrival
    micro_batches    steps that the decoding sequences take turns in, so that as many can be in flight without
                     waiting for each other's tokens
    tile_counts      of the compiled steps: a micro-batch's part of a prompt fills one of them; otherwise the last chunk
                     is cut to fill one where the next would be mostly padding
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        tile: int = 1,
        max_tiles: int | None = None,
        first_slot: int = 0,
        policy: CapacityPolicy = "MAX_UTILIZATION",
        chunked_prefill: bool = True,
        eos_token_ids: Iterable[int] = (),
        priority_queue: bool = False,
        micro_batches: int = 1,
        tile_counts: Iterable[int] = (),
    ) -> None:
        if max_tiles is None:
            max_tiles = max_num_tokens
        sizes = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "tile": tile}
        for name, value in (sizes | {"max_tiles": max_tiles, "micro_batches": micro_batches}).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but it has to be at least 1")
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len is {max_seq_len}, but one prompt and one output token need 2")
        if policy not in get_args(CapacityPolicy):
            raise ValueError(f"unknown capacity policy {policy!r}: choose one of {', '.join(get_args(CapacityPolicy))}")
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        # The last token of a sequence is never computed, so it needs no page.
        room = pool.capacity * pool.page_size
        self.max_seq_len = min(max_seq_len, room + 1)
        self.tile = tile
        self.max_tiles = max_tiles
        self.policy: CapacityPolicy = policy
        self.chunked_prefill = chunked_prefill
        self.eos_token_ids = frozenset(eos_token_ids)
        self.micro_batches = micro_batches
        self.num_quiet_tokens = 0  # those that `update` returned no event for
        self._num_steps = 0  # scheduled so far
        chunks = Chunks(
            max_num_tokens=max_num_tokens,
            tile=tile,
            max_tiles=max_tiles,
            tile_counts=tile_counts,
            micro_batches=micro_batches,
        )
        self._limits = Limits(self.max_seq_len, room, None if chunked_prefill else chunks)
        self._roster = Roster(
            pool,
            slots=range(first_slot, first_slot + max_batch_size),
            guaranteed=policy == "GUARANTEED_NO_EVICT",
            by_priority=priority_queue,
        )
        self._waiting, self._running, self._pages = self._roster.waiting, self._roster.running, self._roster.pages
        self._prefill = Prefill(self._roster, chunks, chunked=chunked_prefill)

    # ---- requests come and go -------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue (not those that wait for the prompt of their first sibling)."""
        return len(self._waiting)

    @property
    def num_free_slots(self) -> int:
        """Sequences that could start to run, if there are pages."""
        return len(self._running.free_slots)

    @property
    def num_tokens(self) -> int:
        """Known tokens of all unfinished sequences."""
        return self._roster.num_tokens

    @property
    def num_preemptions(self) -> int:
        """Times that a running sequence lost its pages to others, and was computed again."""
        return self._roster.num_preemptions

    @property
    def has_decodes(self) -> bool:
        """Whether any sequence is past its prompt."""
        return bool(self._running.decoding)

    @property
    def has_prompts(self) -> bool:
        """Whether prompt tokens could be computed now, if there are pages."""
        return bool(self._running.prefilling or (self._waiting and self._running.free_slots))

    @property
    def pools(self) -> list[PagePool]:
        """The page pools, one for each lane."""
        return [self.pool]

    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return len(self._roster) > 0

    def has(self, request_id: int) -> bool:
        """Whether this request is here and unfinished."""
        return request_id in self._roster

    def add(self, request: Request) -> None:
        """Put a request into the queue. ValueError when it can never run; then nothing has changed."""
        self.validate(request)
        params = request.params
        if params.ignore_eos:
            eos: frozenset[int] = frozenset()
        else:
            eos = self.eos_token_ids if params.end_id is None else frozenset((params.end_id,))
        stop_ids = eos | frozenset(params.stop_token_ids or ())
        for seq in request.sequences:
            seq.stop_ids = stop_ids
            seq.max_len = self.max_seq_len
            if params.max_tokens is not None:
                seq.max_len = min(seq.num_prompt + params.max_tokens, self.max_seq_len)
            seq.max_pages = self.pool.pages_for(seq.max_len - 1)
        self._roster.add(request)

    def validate(self, request: Request) -> None:
        """ValueError when a request can never run. Reads only what never changes, so any thread may call it."""
        if request.request_id in self._roster or request.arrival >= 0:
            raise ValueError(f"request {request.request_id} was added before: use a new id")
        self._limits.check(request)

    def abort(self, request: Request) -> None:
        """Cancel a request at once: its pages and slots are free when this returns. No-op when it is not here."""
        self._roster.abort(request)

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End one sequence now (a stop string was found, or it failed). No-op when it has finished."""
        self._roster.finish(seq, reason, stop_reason)

    # ---- one step -------------------------------------------------------------------------------------------------

    def schedule(self, prompts: bool = True, ahead: bool = True) -> Step | None:
        """The next step, or None when nothing can run before an `update` or an `add`.

        prompts: False holds all prompts back. ahead: when no decode has its turn, take some that have not (see the
        module about micro-batches).
        """
        step = Step()
        preemptions = self.num_preemptions
        self._schedule_decodes(step)
        if prompts:
            # Whoever was preempted in this step needs the pages back: letting others in would only preempt again.
            tokens, admit = self.max_num_tokens - len(step.decodes), self.num_preemptions == preemptions
            self._prefill.fill(step, tokens, admit=admit)
        for chunk in step.prefills:
            if chunk.samples:
                seq = chunk.seq
                seq.num_pending += 1
                seq.last_step = self._num_steps
                seq.prompt_ready = True  # from the next step on, hence not before everybody is admitted
                self._roster.decode(seq)
        if not step.decodes and not step.prefills:
            if self.micro_batches == 1 or not ahead:
                return None
            # A stage would idle: nobody is held up by a decode that waits on the device for its input.
            self._schedule_decodes(step, ahead=True)
            if not step.decodes:
                return None
        self._num_steps += 1
        return step

    def sit_out(self) -> None:
        """Counts a step of the device that had nothing of this scheduler in it."""
        self._num_steps += 1

    def can_repeat(self, step: Step, count: int) -> bool:
        """Whether the device may do a step of decodes `count` times before the host hears of it.

        Nobody who waits may lose by it, so no sequence may come to its last token within while others wait, and nobody
        may wait for pages or tokens alone. Pages for it have to be free: no sequence is preempted for tokens that may
        turn out to come after its end.
        """
        if step.prefills or self._running.prefilling or self.micro_batches > 1:
            return False
        left = [seq.max_len - 1 - position for seq, position in zip(step.decodes, step.positions, strict=True)]
        running = self._running
        if self._waiting and (running.free_slots or len(left) < len(running.decoding) or min(left, default=0) < count):
            return False
        if (left and max(left) < count) or any(seq.wait_for_token for seq in running.decoding):
            return False
        pages = (
            self.pool.pages_for(position + min(count, rest)) - len(seq.pages)
            for seq, position, rest in zip(step.decodes, step.positions, left, strict=True)
        )
        return sum(max(0, more) for more in pages) <= self.pool.num_free

    def repeat(self, step: Step, count: int) -> None:
        """Has a step done `count` times; `can_repeat` must have agreed. A sequence stops where it ends by length."""
        step.repeats = count
        for row, (seq, position) in enumerate(zip(step.decodes, step.positions, strict=True)):
            here = min(count, seq.max_len - 1 - position)
            step.counts.append(here)
            seq.num_computed += here - 1
            seq.num_pending += here - 1
            more = self.pool.pages_for(seq.num_computed) - len(seq.pages)
            if more > 0:
                seq.pages += self.pool.allocate(more)
                if row not in step.grown:
                    step.grown.append(row)

    def _schedule_decodes(self, step: Step, ahead: bool = False) -> None:
        decodes, positions = step.decodes, step.positions
        page_size, budget, number = self.pool.page_size, self.max_num_tokens, self._num_steps
        # Preemption takes the last in rank, never what the loop has passed.
        for seq in self._running.decoding if self.micro_batches == 1 else self._whose_turn(ahead):
            if seq.slot < 0:
                continue  # it was preempted for one before it
            position = seq.num_computed
            if position >= seq.max_len - 1:
                continue  # its last token is on the way
            if seq.num_pending and seq.wait_for_token:
                continue
            if len(decodes) == budget:
                break
            if position == len(seq.pages) * page_size:
                if not self._roster.make_room(1, seq):
                    break  # it preempted itself, and was the last
                seq.pages += self.pool.allocate(1)
                step.grown.append(len(decodes))
            seq.num_computed = position + 1
            seq.num_pending += 1
            seq.last_step = number
            decodes.append(seq)
            positions.append(position)

    def _whose_turn(self, ahead: bool) -> list[Sequence]:
        turns, most = self.micro_batches, self.max_num_tokens
        return whose_turn(self._running.decoding, number=self._num_steps, turns=turns, most=most, ahead=ahead)

    # ---- results --------------------------------------------------------------------------------------------------

    def update(self, step: Step | LaneSteps, tokens: Rows[int]) -> list[Event]:
        """Take the sampled tokens of a step, in the order of its rows; call it once per step and repeat, in order.

        Tokens of sequences that have finished meanwhile are dropped: the step was on its way already. Quiet sequences
        have an event only where something happens, such as their end.
        """
        if len(tokens) < step.num_rows:
            raise ValueError(f"{len(tokens)} tokens for a step of {step.num_rows} rows")
        events: list[Event] = []
        for row, (seq, token) in enumerate(zip(step.decodes, tokens, strict=False)):
            if seq.status is _FINISHED:
                continue
            length = len(seq.tokens) + 1
            if length < seq.max_len and length <= seq.register_at and token not in seq.stop_ids:
                seq.tokens.append(token)  # what `_accept` does with most tokens
                seq.num_pending -= 1
                if seq.quiet:
                    self.num_quiet_tokens += 1
                else:
                    events.append(Event(seq, token, False, row))
            else:
                self._accept(seq, token, row, events)
        row = len(step.decodes)
        for chunk in step.prefills:
            seq = chunk.seq
            if seq.status is not _FINISHED:
                if chunk.samples:
                    self._accept(seq, tokens[row], row, events)
                elif seq.num_computed > seq.register_at:
                    self._pages.register(seq)
            row += 1
        return events

    def _accept(self, seq: Sequence, token: int, row: int, events: list[Event]) -> None:
        known = seq.tokens
        known.append(token)
        seq.num_pending -= 1
        length = len(known)
        finished = False
        if token in seq.stop_ids and length - seq.num_prompt >= (seq.request.params.min_tokens or 0):
            finished = True
            given = token in (seq.request.params.stop_token_ids or ())
            self.finish(seq, FinishReason.STOP, token if given else None)
        elif length >= seq.max_len:
            finished = True
            self.finish(seq, FinishReason.LENGTH)
        elif length > seq.register_at:
            self._pages.register(seq)
        events.append(Event(seq, token, finished, row))

    def check(self) -> None:
        """Verify the invariants of the scheduler and its pool; RuntimeError names one that is broken. For tests."""
        self._roster.check()
