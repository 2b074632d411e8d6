"""From sampled tokens to the updates that the owner of a request receives: logprobs, and stop strings."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxllm.engine.request import FinishReason, Logprob, Request, Sequence, Update
from jaxllm.engine.runner import InFlight
from jaxllm.engine.step import Event
from jaxllm.engine.stop_strings import StopWatch
from jaxllm.engine.tokenizer import IncrementalDecoder, Tokenizer
from jaxllm.layers.sampling import SampleOutput

PromptList = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class _Record:
    """What one request asked for beyond its tokens, and what has come up since its owner was last told."""

    num_logprobs: int | None
    num_prompt_logprobs: int | None
    watches: list[StopWatch]
    logprobs: list[list[dict[int, Logprob]]]
    prompt: PromptList
    prompt_sent: set[int] = field(default_factory=set)


class ResultMaker:
    """Makes updates; keeps a record of each request that asked for more than tokens."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._records: dict[int, _Record] = {}

    @property
    def recorded(self) -> Container[int]:
        """Ids of the requests that every token has to be recorded for."""
        return self._records

    def open(self, request: Request) -> None:
        params: Any = request.params
        stops = params.stop_strings
        if not stops and params.logprobs is None and params.prompt_logprobs is None:
            return
        watches = []
        if stops and self._tokenizer is not None:
            for _ in request.sequences:
                decoder = IncrementalDecoder(self._tokenizer, params.skip_special_tokens)
                watches.append(StopWatch(decoder, stops, params.include_stop_str_in_output, params.min_tokens or 0))
        prompt: PromptList = [] if params.prompt_logprobs is None else [None] * len(request.prompt_token_ids)
        logprobs: list[list[dict[int, Logprob]]] = [[] for _ in request.sequences]
        self._records[request.request_id] = _Record(params.logprobs, params.prompt_logprobs, watches, logprobs, prompt)

    def close(self, request: Request) -> None:
        self._records.pop(request.request_id, None)

    def record(self, event: Event, flight: InFlight) -> str | None:
        """Takes down what is asked for beyond the token itself; returns the stop string that the token completes."""
        seq = event.seq
        record = self._records.get(seq.request.request_id)
        if record is None:
            return None
        if record.num_logprobs is not None and flight.sampled is not None:
            row = int(flight.packed.rows[event.row])
            record.logprobs[seq.index].append(_row_logprobs(_on_host(flight), row, event.token, record.num_logprobs))
        if not record.watches:
            return None
        watch = record.watches[seq.index]
        found = None
        if seq.finish_reason is not FinishReason.STOP or watch.keep_stop:
            found = watch.find(event.token, seq.num_output)
        if found is None and event.finished:
            watch.text += watch.decoder.flush()
        return found

    def take(self, seq: Sequence, reason: FinishReason | None, stop_reason: int | str | None) -> Update:
        """Everything about a sequence that its owner has not been told yet."""
        update = Update(seq.index, seq.tokens[seq.num_prompt + seq.num_sent :], None, None, reason, stop_reason)
        seq.num_sent = seq.num_output
        record = self._records.get(seq.request.request_id)
        if record is None:
            return update
        if record.num_logprobs is not None:
            update.logprobs, record.logprobs[seq.index] = record.logprobs[seq.index], []
        if record.num_prompt_logprobs is not None and seq.index not in record.prompt_sent:
            record.prompt_sent.add(seq.index)
            update.prompt_logprobs = record.prompt
        if record.watches:
            watch = record.watches[seq.index]
            update.text = watch.text if reason is not None else watch.safe_text()
        return update

    def add_prompt_logprobs(self, flight: InFlight) -> None:
        """Takes over the prompt logprobs of a step."""
        for wanted in flight.prompt_logprobs:
            record = self._records.get(wanted.seq.request.request_id)
            if record is None or record.num_prompt_logprobs is None:
                continue
            position, end = wanted.start, wanted.start + wanted.count
            for part in wanted.parts:
                host = _to_host(part)
                for row in range(min(len(host.token_R), end - position)):
                    token = wanted.seq.tokens[position]
                    record.prompt[position] = _row_logprobs(host, row, token, record.num_prompt_logprobs)
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
