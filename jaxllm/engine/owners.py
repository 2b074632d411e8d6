"""The requests that an engine has not ended, and what their owners are told of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.engine.grammar import Guide, Guides
from jaxllm.engine.grammar_check import GrammarError
from jaxllm.engine.lanes import Lanes
from jaxllm.engine.request import FinishReason, Request, Sequence, Update
from jaxllm.engine.results import ResultMaker
from jaxllm.engine.runner import InFlight
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Event

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine's thread failed, or was shut down with requests pending; the first cause is in `__cause__`."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A request; the words it must not say, as token ids; and the guide of its text until the scheduler has it."""

    request: Request
    bad: list[tuple[int, ...]]
    guide: Guide | None


class Owners:
    """Requests from `enter` to their end. But for `enter`, `end_all` and `death`, of the engine's thread alone.

    What goes wrong with one request ends that request only. stream_interval: tokens between two updates of a stream.
    """

    def __init__(
        self, scheduler: Scheduler | Lanes, results: ResultMaker, guides: Guides, *, stream_interval: int
    ) -> None:
        self._scheduler = scheduler
        self._results = results
        self._guides = guides
        self.stream_interval = stream_interval
        self._entries: dict[int, _Entry] = {}
        self._death: Exception | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def death(self) -> Exception | None:
        """Why no request can be entered any more; None while they can."""
        return self._death

    def enter(self, request: Request, bad: list[tuple[int, ...]], guide: Guide | None) -> None:
        """Takes a request down; `open` has to follow. Raises EngineDeadError after `end_all`."""
        with self._lock:
            if self._death is not None:
                raise EngineDeadError(str(self._death)) from self._death
            self._entries[request.request_id] = _Entry(request, bad, guide)

    def end_all(self, death: Exception) -> None:
        """Ends every request with an error, and refuses those to come."""
        with self._lock:
            self._death = death
            pending, self._entries = list(self._entries.values()), {}
        for entry in pending:
            _fail(entry.request, death)

    def open(self, request: Request) -> bool:
        """Gives a request to the scheduler; False when it was refused, and its owner was told."""
        try:
            self._scheduler.add(request)
        except ValueError as error:
            self._forget(request)
            _fail(request, error)
            return False
        self._results.open(request)
        guide = self._entries[request.request_id].guide
        if guide is not None:
            self._guides.open(request, guide)
        return True

    def bad_words(self, request: Request) -> list[tuple[int, ...]]:
        """Token ids of what a request must not say."""
        return self._entries[request.request_id].bad

    def cancel(self, request_id: int) -> None:
        """Ends a request; its pages are free at once. Unknown ids are ignored."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        request = entry.request
        self._scheduler.abort(request)
        for seq in request.sequences:
            if seq.finish_reason is FinishReason.CANCELLED:
                _notify(request, self._results.take(seq, seq.finish_reason, None))
        self._forget(request)

    def stop(self, request_id: int, index: int) -> None:
        """Ends one sequence as "stop", once it has said anything. Unknown ones are ignored."""
        entry = self._entries.get(request_id)
        if entry is None or not 0 <= index < len(entry.request.sequences):
            return
        request, seq = entry.request, entry.request.sequences[index]
        if seq.finished or not seq.num_output:
            return
        self._scheduler.finish(seq, FinishReason.STOP)
        _notify(request, self._results.take(seq, FinishReason.STOP, None))
        if request.finished:
            self._forget(request)

    def deliver(self, events: Iterable[Event], flight: InFlight, last: bool) -> None:
        """Tells the owners of sequences about the tokens of a step; `last`: there are no more of this step."""
        ended: list[Request] = []
        recorded = self._results.recorded
        for event in events:
            seq = event.seq
            request = seq.request
            if request.request_id not in self._entries:
                continue  # dropped because of a sibling's event
            self._tell(event, flight, last)
            seq.quiet = not request.stream and request.request_id not in recorded and seq not in self._guides
            if request.finished:
                ended.append(request)
        # Not before all events: sequences of one request may end in the same step.
        for request in ended:
            self._forget(request)

    def _tell(self, event: Event, flight: InFlight, last: bool) -> None:
        """Tells the owner of a sequence about a token, if it ended or more do not come along with it."""
        seq = event.seq
        request = seq.request
        reason, stop_reason = seq.finish_reason, seq.stop_reason
        try:
            if not event.finished:
                self._guides.accept(seq, event.token)
            found = self._results.record(event, flight)
        except GrammarError as error:
            self._drop(request)
            _fail(request, error)
            return
        except Exception as error:
            logger.exception("request %d failed", request.request_id)
            self._drop(request)
            _fail(request, error)
            return
        if found is not None:
            reason, stop_reason = FinishReason.STOP, found
            self._scheduler.finish(seq, reason, found)
        if (reason is not None or (last and self._is_due(seq))) and not _notify(
            request, self._results.take(seq, reason, stop_reason)
        ):
            self._drop(request)

    def _is_due(self, seq: Sequence) -> bool:
        """Whether the owner of a running sequence wants to hear of its new tokens now."""
        if not seq.num_sent:
            return True
        return seq.request.stream and seq.num_output - seq.num_sent >= self.stream_interval

    def _drop(self, request: Request) -> None:
        """Takes a request out of the engine; its pages are free at once."""
        self._scheduler.abort(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._results.close(request)
        self._guides.close(request)
        with self._lock:
            self._entries.pop(request.request_id, None)


def _notify(request: Request, update: Update) -> bool:
    """Calls the owner back; False when the callback failed. It is logged, and not called again."""
    if request.on_update is None:
        return True
    try:
        request.on_update(update)
    except Exception:
        logger.exception("the callback of request %d failed; the request is dropped", request.request_id)
        request.on_update = None
        return False
    return True


def _fail(request: Request, error: Exception) -> None:
    """Ends a request with an error; one update is for all of its sequences."""
    _notify(request, Update(0, [], finish_reason=FinishReason.ERROR, error=error))
