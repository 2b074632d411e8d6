"""The engine: one thread that schedules steps, launches them and hands out their tokens.

    step = scheduler.schedule()      who runs, host only
    flight = runner.launch(step)     on its way to the device
    tokens = flight.read()           waits for the device
    scheduler.update(step, tokens)   who goes on

The plain loop does these one after the other. The overlap loop launches the next step, or the next two, before it reads
the last one, so that the device never waits for the host; with a pipeline it keeps as many steps on their way as the
scheduler makes independent of each other, so that no stage waits. All give the same tokens.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.engine import interpreter
from jaxllm.engine.grammar import GrammarCompiler, Guides
from jaxllm.engine.iterations import IterationLog
from jaxllm.engine.owners import EngineDeadError, Owners
from jaxllm.engine.request import Request, Sequence
from jaxllm.engine.results import ResultMaker
from jaxllm.engine.runner import InFlight
from jaxllm.engine.start import Started, start
from jaxllm.engine.step import LaneSteps, Step

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 0.5  # an idle loop passes this often, so that anyone can tell it from a loop that hangs


class Engine:
    """A model that serves requests from any thread. Raises ValueErrors that name what is wrong before loading anything.

    Attributes:
        tokenizer: None with `skip_tokenizer_init`.
        model_config: the model's sizes.
        start_report: seconds by phase of the start.
        iterations: what each of the last steps looked like.
    """

    def __init__(self, config: EngineConfig):
        parts: Started = start(config)
        self.config = config
        self.tokenizer = parts.tokenizer
        self.model_config = parts.model_config
        self.start_report = parts.seconds
        self._runner = parts.runner
        self._slots = parts.slots
        self._scheduler = parts.scheduler
        self._results = ResultMaker(parts.tokenizer)
        self._grammars = GrammarCompiler(parts.tokenizer, parts.end_token_ids)
        self._guides = Guides(self._grammars)
        self._owners = Owners(parts.scheduler, self._results, self._guides, stream_interval=config.stream_interval)
        self.iterations = IterationLog()
        # A request to add, an id to cancel, (id, index) of a sequence to stop, None to shut down.
        self._inbox: queue.SimpleQueue[Request | int | tuple[int, int] | None] = queue.SimpleQueue()
        self._beat = time.monotonic()
        self._clock = self._runner.clock
        self._quiet_tokens = 0
        self._counts = {"steps": 0, "decode_steps": 0, "prompt_tokens": 0, "output_tokens": 0, "requests": 0}
        self._thread = threading.Thread(target=self._run, name="jaxllm-engine", daemon=True)
        interpreter.hold()
        self._thread.start()

    # ---- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request; its `on_update` is called from the engine's thread from now on.

        Raises:
            ValueError: the request can never be served.
            EngineDeadError: the engine does not run any more.
        """
        params: Any = request.params
        bad = self._slots.validate(params, self.model_config.vocab_size)
        self._scheduler.validate(request)
        star = self.config.cp_config.star
        if star is not None:
            # What a prompt token attended to depends on where its prompt's query begins.
            request.cache_salt = f"{request.cache_salt!r} {star.query_start(len(request.prompt_token_ids))}"
        if any(len(sequence) > 1 for sequence in bad):
            for seq in request.sequences:
                seq.wait_for_token = True
        self._owners.enter(request, bad, self._guides.prepare(request))
        self._inbox.put(request)

    def abort(self, request_id: int) -> None:
        """Cancels a request: its pages are free before the next step is scheduled. Unknown ids are ignored."""
        self._inbox.put(request_id)

    def stop(self, request_id: int, index: int) -> None:
        """Ends one sequence of a request as "stop", when its owner has seen enough of it. Unknown ones are ignored."""
        self._inbox.put((request_id, index))

    @property
    def max_seq_len(self) -> int:
        """Most tokens of one sequence, prompt and output."""
        return self._scheduler.max_seq_len

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, and what the engine's thread has not looked at yet."""
        return self._scheduler.num_waiting + self._inbox.qsize()

    @property
    def death(self) -> Exception | None:
        """Why the engine does not run any more; None while it does."""
        return self._owners.death

    @property
    def seconds_silent(self) -> float:
        """Seconds since the loop last passed: up to half a second while idle, under load the time of a step."""
        return time.monotonic() - self._beat

    def shutdown(self, timeout: float = 60.0) -> None:
        """Stops the thread after the step in flight; pending requests end with an EngineDeadError.

        Waits for it, but in the thread itself, which calls owners back: there it stops when they return.
        """
        if self._thread.is_alive():
            self._inbox.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout)

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        host_ms and host_cpu_ms: mean milliseconds per step by phase, on the wall and of the engine thread's CPU time.
        """
        pools, steps = self._scheduler.pools, max(self._counts["steps"], 1)
        phases, clock = ("schedule", "pack", "dispatch", "update"), self._clock
        return {
            **self._counts,
            "step_seconds": self.iterations.total_seconds,
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "preemptions": self._scheduler.num_preemptions,
            "pages": sum(pool.capacity for pool in pools),
            "pages_free": sum(pool.num_free for pool in pools),
            "pages_cached": sum(pool.num_cached for pool in pools),
            "cache_hits": sum(pool.stats.hits for pool in pools),
            "cache_misses": sum(pool.stats.misses for pool in pools),
            "evictions": sum(pool.stats.evictions for pool in pools),
            "host_ms": {**{name: 1e3 * clock.wall[name] / steps for name in phases}, "steps": self._counts["steps"]},
            "host_cpu_ms": {name: 1e3 * clock.cpu[name] / steps for name in phases},
            "wait_ms": 1e3 * clock.wall["wait"] / steps,
            **self._runner.expert_stats(),
        }

    def reset_stats(self) -> None:
        """Starts the counters and times of `stats` anew."""
        self._counts.update(dict.fromkeys(self._counts, 0))
        self._clock.reset()

    # ---- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self.config.disable_overlap_scheduler:
                self._plain_loop()
            else:
                self._overlap_loop()
            death: Exception = EngineDeadError("the engine was shut down")
        except BaseException as error:  # whatever ends this thread, nobody may be left waiting
            logger.exception("the engine failed")
            death = EngineDeadError(f"the engine failed: {error}")
            death.__cause__ = error
        self._owners.end_all(death)
        self._runner.release()
        interpreter.release()
        self._grammars.close()

    def _plain_loop(self) -> None:
        while self._take_requests(wait=True):
            step = self._schedule()
            if step is not None:
                self._finish(self._launch(step))

    def _overlap_loop(self) -> None:
        flights: deque[InFlight] = deque()
        while self._take_requests(wait=not flights):
            step = self._schedule()
            if step is not None:
                flights.append(self._launch(step))
            if flights and (step is None or len(flights) > self._ahead(flights) or flights[0].arrived):
                self._finish(flights.popleft())

    def _ahead(self, flights: deque[InFlight]) -> int:
        """Steps to be on their way while one is waited for.

        Decodes of few requests take the device less than it takes the host to hear of a step and launch another, so
        two; where prompts are computed, which takes long, one more would keep a new request waiting.
        """
        turns = self._scheduler.micro_batches
        return 2 if turns == 1 and not any(flight.step.prefills for flight in flights) else turns

    def _take_requests(self, wait: bool) -> bool:
        """Moves what arrived into the scheduler; sleeps while there is nothing to do. False when told to stop."""
        while True:
            idle = wait and not self._scheduler.has_work()
            self._beat = time.monotonic()
            try:
                item = self._inbox.get(block=idle, timeout=_BEAT_SECONDS)
            except queue.Empty:
                if idle:
                    continue
                return True
            if item is None:
                return False
            if isinstance(item, Request):
                self._counts["requests"] += self._owners.open(item)
            elif isinstance(item, tuple):
                self._owners.stop(*item)
            else:
                self._owners.cancel(item)

    def _schedule(self) -> Step | LaneSteps | None:
        started = self._clock.now()
        scheduler: Any = self._scheduler
        step, repeats = scheduler.schedule(), self._runner.repeats
        wanted = step is not None and self._runner.can_repeat(step) and self._inbox.empty()
        if wanted and scheduler.can_repeat(step, repeats):
            scheduler.repeat(step, repeats)
        self._clock.add("schedule", started)
        return step

    def _launch(self, step: Step | LaneSteps) -> InFlight:
        for seq in step.started:
            self._start(seq)
        masks = self._guides.masks(step, self._runner.sampler.mask_words)
        if masks is not None:
            self._runner.sampler.set_masks(*masks)
        self._counts["steps"] += step.repeats
        self._counts["decode_steps"] += 0 if step.prefills else step.repeats
        self.iterations.launched()
        return self._runner.launch(step)

    def _start(self, seq: Sequence) -> None:
        self._slots.start(seq, self._owners.bad_words(seq.request))
        params: Any = seq.request.params
        if params.has_penalties:
            self._runner.sampler.reset_penalties(seq)
        if seq.index == 0 and seq.num_output == 0:
            self._counts["prompt_tokens"] += seq.num_prompt

    def _finish(self, flight: InFlight) -> None:
        """Reads a step's tokens, moves its sequences on and tells their owners."""
        before = self._clock.now()
        tokens = flight.read()
        arrived = self._clock.add("wait", before)
        seconds = self.iterations.arrived()
        self._results.add_prompt_logprobs(flight)
        for number, tokens_R in enumerate(tokens, 1):
            self._take(flight, tokens_R, number == len(tokens))
        self._note_iteration(flight.step, seconds)
        self._runner.packer.recycle(flight.packed)
        self._clock.add("update", arrived)

    def _take(self, flight: InFlight, tokens_R: list[int], last: bool) -> None:
        """Moves the sequences of a step on by one token; `last`: there are no more of this step."""
        events = self._scheduler.update(flight.step, tokens_R)
        quiet, self._quiet_tokens = self._quiet_tokens, self._scheduler.num_quiet_tokens
        self._counts["output_tokens"] += len(events) + self._quiet_tokens - quiet
        self._owners.deliver(events, flight, last)

    def _note_iteration(self, step: Step | LaneSteps, seconds: float) -> None:
        scheduler, used, hits, misses, evictions = self._scheduler, 0, 0, 0, 0
        for pool in scheduler.pools:
            used += pool.capacity - pool.num_free
            hits += pool.stats.hits
            misses += pool.stats.misses
            evictions += pool.stats.evictions
        batch = (len(step.prefills), len(step.decodes), step.num_tokens)
        queue_sizes = (scheduler.num_running, scheduler.num_waiting)
        self.iterations.add(seconds, *batch, *queue_sizes, used, hits, misses, evictions)
