"""From sampled tokens to the updates that the owner of a request receives: logprobs, and stop strings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxllm.engine.request import FinishReason, Logprob, Request, Update
from jaxllm.engine.runner import InFlight
from jaxllm.engine.step import Event
from jaxllm.engine.tokenizer import IncrementalDecoder, Tokenizer
from jaxllm.layers.sampling import SampleOutput

PromptList = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class _StopWatch:
    """Looks for stop strings in the text of one sequence as it grows."""

    decoder: IncrementalDecoder
    stops: tuple[str, ...]
    keep_stop: bool
    min_tokens: int
    text: str = ""

    def find(self, token: int, num_outputs: int) -> str | None:
        """The stop string that this token completes; `text` is then cut at it."""
        searched = max(0, len(self.text) - max(map(len, self.stops)) + 1)
        self.text += self.decoder.decode([token])
        if num_outputs < self.min_tokens:
            return None
        found = [(at, stop) for stop in self.stops if (at := self.text.find(stop, searched)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if self.keep_stop else at]
        return stop

    def safe_text(self) -> str:
        """The text without an end that may turn out to be the beginning of a stop string, and be cut."""
        if self.keep_stop:
            return self.text
        for at in range(max(0, len(self.text) - max(map(len, self.stops)) + 1), len(self.text)):
            if any(stop.startswith(self.text[at:]) for stop in self.stops):
                return self.text[:at]
        return self.text


@dataclass(slots=True)
class _Open:
    """What one request needs beyond its tokens."""

    num_logprobs: int | None
    num_prompt_logprobs: int | None
    watches: list[_StopWatch] = field(default_factory=list)
    prompt: PromptList = field(default_factory=list)
    prompt_sent: set[int] = field(default_factory=set)


class ResultMaker:
    """Makes an Update of every event; keeps a record for each request that asked for more than tokens."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._open: dict[int, _Open] = {}

    def open(self, request: Request) -> None:
        params: Any = request.params
        stops = params.stop_strings
        if not stops and params.logprobs is None and params.prompt_logprobs is None:
            return
        entry = _Open(params.logprobs, params.prompt_logprobs)
        if stops and self._tokenizer is not None:
            for _ in request.sequences:
                decoder = IncrementalDecoder(self._tokenizer, params.skip_special_tokens)
                watch = _StopWatch(decoder, stops, params.include_stop_str_in_output, params.min_tokens or 0)
                entry.watches.append(watch)
        if params.prompt_logprobs is not None:
            entry.prompt = [None] * len(request.prompt_token_ids)
        self._open[request.request_id] = entry

    def close(self, request: Request) -> None:
        self._open.pop(request.request_id, None)

    def make(self, event: Event, flight: InFlight) -> Update:
        """The update for one new token. It says `stop` for a sequence that is not finished yet at a stop string."""
        seq = event.seq
        update = Update(seq.index, [event.token], finish_reason=seq.finish_reason, stop_reason=seq.stop_reason)
        entry = self._open.get(seq.request.request_id)
        if entry is None:
            return update
        if entry.num_logprobs is not None and flight.sampled is not None:
            row = int(flight.packed.rows[event.row])
            update.logprobs = [_row_logprobs(_on_host(flight), row, event.token, entry.num_logprobs)]
        if entry.num_prompt_logprobs is not None and seq.index not in entry.prompt_sent:
            entry.prompt_sent.add(seq.index)
            update.prompt_logprobs = entry.prompt
        if entry.watches:
            watch = entry.watches[seq.index]
            found = None
            if seq.finish_reason is not FinishReason.STOP or watch.keep_stop:
                found = watch.find(event.token, seq.num_output)
            if found is not None:
                update.finish_reason, update.stop_reason = FinishReason.STOP, found
            elif event.finished:
                watch.text += watch.decoder.flush()
            update.text = watch.text if update.finish_reason is not None else watch.safe_text()
        return update

    def add_prompt_logprobs(self, flight: InFlight) -> None:
        """Takes over the prompt logprobs of a step."""
        for wanted in flight.prompt_logprobs:
            entry = self._open.get(wanted.seq.request.request_id)
            if entry is None or entry.num_prompt_logprobs is None:
                continue
            position, end = wanted.start, wanted.start + wanted.count
            for part in wanted.parts:
                host = _to_host(part)
                for row in range(min(len(host.token_R), end - position)):
                    token = wanted.seq.tokens[position]
                    entry.prompt[position] = _row_logprobs(host, row, token, entry.num_prompt_logprobs)
                    position += 1


def _on_host(flight: InFlight) -> SampleOutput:
    assert flight.sampled is not None
    if not isinstance(flight.sampled.token_R, np.ndarray):
        flight.sampled = _to_host(flight.sampled)
    return flight.sampled


def _to_host(output: SampleOutput) -> SampleOutput:
    return jax.tree.map(np.asarray, output)


def _row_logprobs(output: SampleOutput, row: int, token: int, count: int) -> dict[int, Logprob]:
    """The `count` most likely tokens of a row, and the chosen one."""
    found = {token: Logprob(float(output.logprob_R[row]), int(output.rank_R[row]))}
    for rank in range(count):
        found.setdefault(int(output.top_ids_RX[row, rank]), Logprob(float(output.top_logprobs_RX[row, rank]), rank + 1))
    return found
