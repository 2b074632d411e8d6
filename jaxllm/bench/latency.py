"""`jaxllm bench latency` and `jaxllm bench host`: one fixed batch at a time."""

from __future__ import annotations

import statistics
import threading
import time

from jaxllm.bench.load import Lengths, random_load
from jaxllm.bench.profile import record, table
from jaxllm.bench.report import Report, Row, measure
from jaxllm.bench.runners import JaxllmRunner, check_names, make_peers
from jaxllm.config import EngineConfig
from jaxllm.settings import ConfigError

HOST_PHASES = ("schedule", "pack", "dispatch", "update")


def run_latency(
    config: EngineConfig,
    *,
    batch_size: int = 1,
    input_len: str = "64",
    output_len: str = "128",
    repeat: int = 3,
    seed: int = 0,
    compare: list[str] | None = None,
    compare_repeat: int | None = None,
    host_profile: bool = False,
    profile: str | None = None,
    prefix_len: int = 0,
) -> Report:
    """Measure batches of `batch_size` requests that start together; `compare` runs other libraries beside.

    profile: a directory for a trace of one more repetition, whose longest kernels are printed.
    prefix_len: tokens before those of `input_len` that all prompts share.

    Raises ConfigError for a bad length or an unknown or missing library.
    """
    isl, osl = Lengths.parse(input_len, "--input-len"), Lengths.parse(output_len, "--output-len")
    check_names(compare or [])
    runner = JaxllmRunner(_sized(config, batch_size))
    try:
        peers = make_peers(
            compare or [], config.model, batch_size=batch_size, context=prefix_len + isl.high + osl.high + 8
        )

        def load(run: int, length: Lengths = osl):  # type: ignore[no-untyped-def]
            return random_load(batch_size, isl, length, runner.vocab_size, seed, run, prefix_len)

        warm_up = load(-1, Lengths(min(8, osl.low), min(8, osl.low)))
        rows = measure([runner, *peers], warm_up, [load(run) for run in range(repeat)], compare_repeat)
        host = _host_profile(runner, batch_size, isl, osl, repeat, seed) if host_profile else None
        if profile:
            print(table(record(profile, lambda: runner.run(load(repeat)))), flush=True)
    finally:
        runner.close()
    title = f"latency of {config.model}, batch {batch_size}"
    lengths = {"shared prefix": prefix_len, "input tokens": str(isl), "output tokens": str(osl)}
    return Report(title, {**lengths, "repetitions": repeat}, rows, host)


def run_host(
    config: EngineConfig,
    *,
    batch_size: int = 64,
    input_len: str = "16",
    output_len: str = "128",
    repeat: int = 3,
    seed: int = 0,
) -> Report:
    """Measure what the host spends on one decode step at `batch_size`, outside XLA."""
    isl, osl = Lengths.parse(input_len, "--input-len"), Lengths.parse(output_len, "--output-len")
    runner = JaxllmRunner(_sized(config, batch_size))
    try:
        host = _host_profile(runner, batch_size, isl, osl, repeat, seed)
    finally:
        runner.close()
    row = Row(runner.name, runner.note, runner.start_seconds)
    load = {"input tokens": str(isl), "output tokens": str(osl), "repetitions": repeat}
    return Report(f"host cost per decode step of {config.model}, batch {batch_size}", load, [row], host)


def _sized(config: EngineConfig, batch_size: int) -> EngineConfig:
    """Room for the batch, and no more: larger buckets would only take time to compile."""
    if config.max_batch_size is None:
        return config.model_copy(update={"max_batch_size": batch_size})
    if config.max_batch_size < batch_size:
        raise ConfigError(
            f"--batch-size {batch_size} is more than max_batch_size = {config.max_batch_size}; raise the second"
        )
    return config


def _host_profile(
    runner: JaxllmRunner, batch_size: int, isl: Lengths, osl: Lengths, repeat: int, seed: int
) -> dict[str, float]:
    """Medians over `repeat` runs of the milliseconds per step of each phase, counted while the batch is full."""
    runs: list[dict[str, float]] = []
    for run in range(-1, repeat):  # the first one is the warm-up
        figures = _one_profile(runner, batch_size, isl, osl, seed, run)
        if run >= 0:
            runs.append(figures)
    return {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}


def _one_profile(
    runner: JaxllmRunner, batch_size: int, isl: Lengths, osl: Lengths, seed: int, run: int
) -> dict[str, float]:
    from jaxllm.sampling_params import SamplingParams

    load = random_load(batch_size, isl, osl, runner.vocab_size, seed, run)
    one_ended = threading.Event()
    results = []
    for prompt, length in zip(load.prompts, load.output_lens, strict=True):
        result = runner.llm.generate_async(prompt, SamplingParams(max_tokens=length, ignore_eos=True))
        result.add_done_callback(lambda _: one_ended.set())
        results.append(result)
    # Only steps in which all of them decode count: from the last first token to the first last one.
    while not one_ended.is_set() and not all(result.timing.tokens for result in results):
        time.sleep(0.002)
    if one_ended.is_set():
        for result in results:
            result.abort()
        raise ConfigError(
            f"--output-len {osl} is too short: the first request ended before the last one began; raise it"
        )
    before, started = _host_totals(runner), time.perf_counter()
    one_ended.wait()
    after, seconds = _host_totals(runner), time.perf_counter() - started
    for result in results:
        result.result()
    steps = after["steps", ""] - before["steps", ""]
    if steps < 1:
        raise ConfigError(f"--output-len {osl} is too short: no step ran with the whole batch; raise it")
    figures = {name: (after[name, "cpu"] - before[name, "cpu"]) / steps for name in HOST_PHASES}
    figures["host total"] = sum(figures.values())
    figures["host total, wall"] = sum(after[name, "wall"] - before[name, "wall"] for name in HOST_PHASES) / steps
    figures["step, wall"] = 1e3 * seconds / steps
    figures["steps"] = steps
    return figures


def _host_totals(runner: JaxllmRunner) -> dict[tuple[str, str], float]:
    """Milliseconds of each phase since the start, and ("steps", ""); the engine reports means over all steps."""
    stats = runner.llm.get_stats()
    wall, cpu = stats["host_ms"], stats["host_cpu_ms"]
    steps = wall["steps"]
    totals = {(name, kind): ms[name] * steps for name in HOST_PHASES for kind, ms in (("wall", wall), ("cpu", cpu))}
    return totals | {("steps", ""): steps}
