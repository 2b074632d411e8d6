"""`jaxllm bench pipeline`: how much of their time the stages of a pipeline stand idle.

A thread for each stage waits for the output of every step there, which gives the time at which the stage was done with
it. A stage is busy with a step from the moment at which it could start (the step was launched, the stage was done with
the step before, its input had come from the stage before it and, in the first stage, the tokens it needs from the last
one) until it is done. What is left of the wall time is the bubble.
"""

from __future__ import annotations

import json
import queue
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxllm.bench.load import Lengths, random_load
from jaxllm.bench.report import aligned, machine
from jaxllm.config import EngineConfig
from jaxllm.settings import ConfigError


@dataclass(slots=True)
class Timeline:
    """What a stage clock has seen, in seconds: when step k was launched on stage s, and when it was done there.

    needed[k]: the step whose tokens step k needs, -1 for none. decodes[k], chunks[k]: what was in the step.
    """

    launched: list[list[float]]
    done: list[list[float]]
    needed: list[int] = field(default_factory=list)
    decodes: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def starts(self, stage: int, step: int) -> float:
        """When the stage could start on the step."""
        times = [self.launched[stage][step]]
        if step:
            times.append(self.done[stage][step - 1])
        if stage:
            times.append(self.done[stage - 1][step])
        elif self.needed[step] >= 0:
            times.append(self.done[-1][self.needed[step]])
        return max(times)

    def busy(self, stage: int, steps: range) -> list[float]:
        """Seconds that the stage worked on each of the steps."""
        return [max(0.0, self.done[stage][k] - self.starts(stage, k)) for k in steps]

    def idle(self, steps: range) -> float:
        """Share of the stages' time in which they stood idle, from the first start to the last end of these steps."""
        wall = self.done[-1][steps[-1]] - self.starts(0, steps[0])
        worked = sum(sum(self.busy(stage, steps)) for stage in range(len(self.done)))
        return 1.0 - worked / (wall * len(self.done))


def steady_idle(stage_seconds: list[float], in_flight: int) -> float:
    """Idle share when `in_flight` independent steps go round and round through stages that take this long.

    The slowest stage, or the round trip of all that is in flight, sets the pace. 0 for equal stages that are full.
    """
    total = sum(stage_seconds)
    pace = max(max(stage_seconds), total / in_flight)
    return 1.0 - total / (len(stage_seconds) * pace)


def flushed_idle(stages: int, steps: int) -> float:
    """Idle share when `steps` equal steps go through an empty pipeline: (p - 1) / (m + p - 1)."""
    return (stages - 1) / (steps + stages - 1)


class StageClock:
    """Watches the stages of a running engine."""

    def __init__(self, engine: Any) -> None:
        self._runner = engine._runner
        count = len(self._runner.stages)
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(count)]
        self._steps_before: int | None = None
        self.timeline = Timeline([[] for _ in range(count)], [[] for _ in range(count)])
        self._threads = [threading.Thread(target=self._wait, args=(s,), daemon=True) for s in range(count)]

    def __enter__(self) -> Timeline:
        for thread in self._threads:
            thread.start()
        launch = self._runner.launch

        def noted(step: Any) -> Any:
            self.timeline.decodes.append(len(step.decodes))
            self.timeline.chunks.append(len(step.prefills))
            return launch(step)

        self._runner.launch = noted
        self._runner.watch = self._launched
        return self.timeline

    def __exit__(self, *error: object) -> None:
        self._runner.watch = None
        del self._runner.launch
        for stage, thread in enumerate(self._threads):
            self._queues[stage].put(None)
            thread.join()

    def _launched(self, times: list[float], outputs: list[Any], returned: Any) -> None:
        if self._steps_before is None:
            self._steps_before = returned.number
        self.timeline.needed.append(max(returned.step_here - self._steps_before - 1, -1))
        for stage, (launched, output) in enumerate(zip(times, outputs, strict=True)):
            self.timeline.launched[stage].append(launched)
            self._queues[stage].put(output)

    def _wait(self, stage: int) -> None:
        while (output := self._queues[stage].get()) is not None:
            output.block_until_ready()
            self.timeline.done[stage].append(time.perf_counter())


@dataclass(slots=True)
class Bubble:
    """One measurement; times in milliseconds, shares of 1. expected: what the stages' own times allow at best."""

    load: str
    micro_batches: int
    in_flight: int
    stage_ms: list[float]
    idle: float
    expected: float
    formula: float
    steps: int


def run_pipeline(
    config: EngineConfig,
    *,
    batch_size: int,
    chunk: int,
    output_len: int,
    micro_batches: list[int],
    repeat: int,
    seed: int,
) -> list[Bubble]:
    """Measures decodes of a full batch, and a prompt of `chunk` tokens for each micro-batch in flight.

    Raises ConfigError when there is no pipeline, or nothing to measure.
    """
    stages = config.pipeline_parallel_size
    if stages < 2:
        raise ConfigError(f"pipeline_parallel_size = {stages}: a pipeline has at least 2 stages; set --pp")
    found = []
    for m in micro_batches:
        turns = m * stages
        if batch_size < turns:
            raise ConfigError(f"--batch-size {batch_size} is less than the {turns} micro-batches in flight; raise it")
        settings = {
            "tokenizer": None,
            "skip_tokenizer_init": True,
            "pp_micro_batches": m,
            "max_batch_size": batch_size,
            "max_num_tokens": max(chunk, batch_size),
            "max_seq_len": max(turns * max(chunk, batch_size) + 1, 16 + output_len),
            "batch_buckets": [-(-batch_size // turns)],
            "token_buckets": [max(chunk, batch_size)],
        }
        found += _measure(config.model_copy(update=settings), turns, m, output_len, repeat, seed)
    return found


def _measure(config: EngineConfig, turns: int, m: int, output_len: int, repeat: int, seed: int) -> list[Bubble]:
    from jaxllm.llm import LLM

    stages = config.pipeline_parallel_size
    batch, chunk = config.max_batch_size, config.max_num_tokens
    assert batch is not None and chunk is not None
    decodes: list[Bubble] = []
    prompts: list[Bubble] = []
    with LLM.from_config(config) as llm:
        vocab = llm._engine.model_config.vocab_size
        for run in range(-1, repeat):  # the first one is the warm-up
            line = _watch(llm, random_load(batch, Lengths(4, 4), Lengths(output_len, output_len), vocab, seed, run))
            full = zip(line.decodes, line.chunks, strict=True)
            steps = _longest([chunks == 0 and decodes_ >= batch // turns for decodes_, chunks in full])
            if len(steps) < 4 * turns:
                raise ConfigError(f"--output-len {output_len} is too short: only {len(steps)} full steps; raise it")
            seconds = [statistics.median(line.busy(stage, steps)) for stage in range(stages)]
            decodes.append(
                Bubble("decode", m, turns, _ms(seconds), line.idle(steps), steady_idle(seconds, turns), 0.0, len(steps))
            )
            line = _watch(llm, random_load(1, Lengths(turns * chunk, turns * chunk), Lengths(1, 1), vocab, seed, run))
            steps = range(len(line.decodes))
            seconds = [statistics.median(line.busy(stage, steps)) for stage in range(stages)]
            slowest = max(seconds) * (len(steps) - 1) + sum(seconds)
            expected = 1 - len(steps) * sum(seconds) / (stages * slowest)
            formula = flushed_idle(stages, len(steps))
            prompts.append(Bubble("prompt", m, turns, _ms(seconds), line.idle(steps), expected, formula, len(steps)))
    return [sorted(kind[1:], key=lambda b: b.idle)[(len(kind) - 1) // 2] for kind in (decodes, prompts)]


def _watch(llm: Any, load: Any) -> Timeline:
    from jaxllm.sampling_params import SamplingParams

    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in load.output_lens]
    with StageClock(llm._engine) as line:
        llm.generate(load.prompts, params, use_tqdm=False)
    return line


def _longest(wanted: list[bool]) -> range:
    """The longest run of consecutive steps that are wanted."""
    best, start = range(0), 0
    for index, good in enumerate([*wanted, False]):
        if not good:
            best = max(best, range(start, index), key=len)
            start = index + 1
    return best


def _ms(seconds: list[float]) -> list[float]:
    return [round(1e3 * s, 3) for s in seconds]


def table(found: list[Bubble]) -> str:
    """The measurements as text."""
    cells = [
        [
            "load",
            "micro-batches a stage",
            "in flight",
            "steps",
            "ms a step and stage",
            "idle",
            "by stage times",
            "formula",
        ]
    ]
    for b in found:
        times = " ".join(f"{ms:.2f}" for ms in b.stage_ms)
        shares = [f"{100 * share:.1f} %" for share in (b.idle, b.expected, b.formula)]
        cells.append([b.load, str(b.micro_batches), str(b.in_flight), str(b.steps), times, *shares])
    return "\n".join(
        [
            "share of stage time idle: measured; at best with these times of the stages; with equal stages: 0 for a",
            "steady stream of decodes, (p - 1) / (m + p - 1) for m chunks of a prompt in an empty pipeline",
            "",
            *aligned(cells),
        ]
    )


def emit(found: list[Bubble], title: str, json_path: str | None) -> None:
    """Print the table; write JSON to `json_path` too ("-": to stdout, instead of the table)."""
    content = {"title": title, "machine": machine(), "rows": [asdict(b) for b in found]}
    if json_path == "-":
        json.dump(content, sys.stdout, indent=2)
        print()
        return
    print(f"{title}\n{table(found)}", flush=True)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
