"""Requests and the sequences they consist of: what the scheduler moves, what a caller hears back.

A request is one prompt; it owns ``n`` sequences, one per completion. A sequence is the unit that gets a slot, pages
and steps. Nothing here knows about devices, so all of it can be tested in milliseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Protocol


class FinishReason(StrEnum):
    """Why a sequence ended; the values are the strings that the OpenAI protocol uses where it has one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class SequenceStatus(Enum):
    """Where a sequence is in its life; `LEGAL_MOVES` says what may follow what."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


LEGAL_MOVES: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    # WAITING -> FINISHED: cancelled in the queue, or preempted with its last token still on the way.
    SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
    # RUNNING -> WAITING: preempted.
    SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.FINISHED}),
    SequenceStatus.FINISHED: frozenset(),
}


class RequestParams(Protocol):
    """The part of SamplingParams that decides how long a sequence lives; everything else is for the sampler."""

    @property
    def n(self) -> int: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def min_tokens(self) -> int | None: ...
    @property
    def ignore_eos(self) -> bool: ...
    @property
    def stop_token_ids(self) -> list[int] | None: ...
    @property
    def end_id(self) -> int | None: ...


@dataclass(slots=True)
class Logprob:
    """Log probability of one token under the raw model distribution, and its rank there (1 = most likely)."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class Update:
    """Progress of one sequence, given to `Request.on_update` in the engine's thread.

    `token_ids` and `logprobs` are the new ones only. `text` is set only when the engine had to detokenise for stop
    strings; it is cumulative and already cut. `error` is set when the request failed; nothing follows it.
    """

    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: str | None = None
    error: Exception | None = None


class Sequence:
    """One completion of a request.

    tokens        prompt plus the output tokens that the host knows
    num_computed  tokens whose KV has been dispatched to the device (always from the start, without holes)
    num_pending   tokens sampled on the device that the host has not read back yet
    num_sent      output tokens that the request's owner was told about
    quiet         nobody wants to hear of its tokens before the end
    pages         page numbers, in order; page k holds positions [k * page_size, (k + 1) * page_size)
    slot          row of the per-sequence state on the device, -1 while it has none
    """

    __slots__ = (
        "chain",
        "finish_reason",
        "index",
        "last_step",
        "max_len",
        "max_pages",
        "num_computed",
        "num_pending",
        "num_prompt",
        "num_sent",
        "pages",
        "prompt_ready",
        "quiet",
        "rank",
        "register_at",
        "request",
        "slot",
        "status",
        "stop_ids",
        "stop_reason",
        "tokens",
        "wait_for_token",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens: list[int] = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.num_pending = 0
        self.num_sent = 0
        self.quiet = False
        self.pages: list[int] = []
        self.slot = -1
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        # True when the host must know each token before it can prepare the next step (multi-token bad words): such a
        # sequence never runs ahead of the host.
        self.wait_for_token = False
        # The rest belongs to the scheduler, which fills it in when the request is added.
        self.rank: tuple[float, int, int] = (0.0, 0, index)  # smaller is served first and preempted last
        self.max_len = 0  # prompt + output tokens at which it ends by length
        self.max_pages = 0  # pages it holds at that length
        self.stop_ids: frozenset[int] = frozenset()
        self.chain: list[bytes] = []  # chain[0] is the root digest, chain[k + 1] the digest of full page k
        self.register_at = 0  # when more tokens than this are known, the next full page can be registered
        self.last_step = 0  # number of the step that sampled its last token
        self.prompt_ready = False  # the full prompt pages hold KV of earlier steps: siblings may share them

    @property
    def output_token_ids(self) -> list[int]:
        """The known output tokens (a copy)."""
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """Number of known output tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def finished(self) -> bool:
        """True once no more tokens will be added."""
        return self.status is SequenceStatus.FINISHED

    def give_up_pages(self) -> list[int]:
        """Forget the pages and everything computed in them; the caller releases what is returned."""
        pages, self.pages = self.pages, []
        self.num_computed = 0
        self.prompt_ready = False
        self.register_at = 0
        return pages

    def move(self, status: SequenceStatus) -> None:
        """Change the status; RuntimeError when `LEGAL_MOVES` does not have that move."""
        if status not in LEGAL_MOVES[self.status]:
            raise RuntimeError(
                f"sequence {self.request.request_id}.{self.index} cannot go from {self.status.value} to {status.value}"
            )
        self.status = status

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}.{self.index} {self.status.value} tokens={len(self.tokens)} "
            f"computed={self.num_computed} pending={self.num_pending} pages={self.pages} slot={self.slot})"
        )


class Request:
    """One prompt and its `n` sequences.

    priority      higher is served first (with the priority queue) and preempted last
    cache_salt    requests share cached pages only with requests of the same salt
    prefix_cache  False: take no pages from the prefix cache, because every prompt token has to be computed
                  (prompt_logprobs); its own pages are still stored for others
    stream        False: updates are wanted for the first token and at the end only
    on_update     called with an `Update` in the engine's thread; it must not block

    Raises ValueError for an empty prompt, a bad token, n < 1, a priority that is not a finite number, or a salt that is
    no text.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        params: RequestParams,
        *,
        priority: float = 0.5,
        cache_salt: str | None = None,
        on_update: Callable[[Update], None] | None = None,
        prefix_cache: bool = True,
        stream: bool = True,
        num_sequences: int | None = None,
    ) -> None:
        if not prompt_token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        if min(prompt_token_ids) < 0:
            raise ValueError(f"prompt token {min(prompt_token_ids)} is negative: token ids start at 0")
        if not abs(priority) <= sys.float_info.max:
            raise ValueError(f"priority {priority} is not a finite number: give one between 0 and 1")
        # The engine's thread names pages by it: there it would be too late to find out.
        if cache_salt is not None and not _is_unicode(cache_salt):
            raise ValueError(f"cache_salt {cache_salt!r} is not a str of valid Unicode: give one, or leave it out")
        count = params.n if num_sequences is None else num_sequences
        if count < 1:
            raise ValueError(f"n is {count}, but a request needs at least one sequence")
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.priority = float(priority)
        self.cache_salt = cache_salt
        self.on_update = on_update
        self.prefix_cache = prefix_cache
        self.stream = stream
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache, known once it was first admitted
        self.arrival = -1  # order of arrival, set by the scheduler
        self.forked = count == 1  # the sequences after the first are in the queue, too
        self.sequences: list[Sequence] = [Sequence(self, i) for i in range(count)]

    @property
    def finished(self) -> bool:
        """True once every sequence has finished."""
        return all(seq.finished for seq in self.sequences)

    def __repr__(self) -> str:
        return f"Request({self.request_id}, {len(self.prompt_token_ids)} tokens, {len(self.sequences)} sequences)"


def _is_unicode(text: object) -> bool:
    """Whether this is a str without lone surrogates."""
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)
