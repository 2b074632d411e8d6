"""`jaxllm bench throughput`: many requests of different lengths, all submitted at once."""

from __future__ import annotations

from jaxllm.bench.load import Lengths, random_load
from jaxllm.bench.profile import record, table
from jaxllm.bench.report import Report, measure
from jaxllm.bench.runners import JaxllmRunner, check_names, make_peers
from jaxllm.config import EngineConfig


def run_throughput(
    config: EngineConfig,
    *,
    num_requests: int = 64,
    input_len: str = "64",
    output_len: str = "8:256",
    repeat: int = 3,
    seed: int = 0,
    compare: list[str] | None = None,
    compare_batch: int = 16,
    compare_repeat: int | None = None,
    profile: str | None = None,
    prefix_len: int = 0,
) -> Report:
    """Measure `num_requests` requests with lengths drawn from ranges; `compare` runs other libraries beside.

    profile: a directory for a trace of one more repetition, whose longest kernels are printed.
    prefix_len: tokens before those of `input_len` that all prompts share.

    Raises ConfigError for a bad length or an unknown or missing library.
    """
    isl, osl = Lengths.parse(input_len, "--input-len"), Lengths.parse(output_len, "--output-len")
    check_names(compare or [])
    runner = JaxllmRunner(config)
    try:
        peers = make_peers(
            compare or [], config.model, batch_size=compare_batch, context=prefix_len + isl.high + osl.high + 8
        )
        loads = [random_load(num_requests, isl, osl, runner.vocab_size, seed, run, prefix_len) for run in range(repeat)]
        short = Lengths(min(8, osl.low), min(8, osl.low))
        warm_up = random_load(min(num_requests, compare_batch), isl, short, runner.vocab_size, seed, -1)
        rows = measure([runner, *peers], warm_up, loads, compare_repeat)
        if profile:
            print(table(record(profile, lambda: runner.run(loads[0]))), flush=True)
    finally:
        runner.close()
    load = {"requests": num_requests, "shared prefix": prefix_len, "input tokens": str(isl), "output tokens": str(osl)}
    return Report(f"throughput of {config.model}", load | {"repetitions": repeat}, rows)
