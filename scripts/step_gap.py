#!/usr/bin/env python
"""Where the time between the engine's decode step and the bare one goes: the same step launched in several ways.

    python scripts/step_gap.py                                   # Llama-3.1-8B's shapes with random weights
    python scripts/step_gap.py --batches 256 --steps 96 --settings '{"max_seq_len": 4096}'

From a loop that only launches, to what the engine does, one thing after the other: the input copied anew for each step;
no more than two steps on their way; the tokens read back; the input put on the device ahead, or kept there; work on the
host between. `call` is how long the call that launches a step takes, `wait` how long its tokens are waited for: a call
about as long as the step has waited for the device. All in milliseconds; those of the engine itself come first.

A CUDA graph has to be told of every address that differs from the launch before. The last ways launch a program whose
results are written where given arrays were, so that only the tokens' address changes, or none at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.bench.load import Lengths, random_load
from jaxllm.bench.measures import MEASURES, bare_step, decode_input
from jaxllm.bench.report import aligned

SETTINGS = {
    "max_batch_size": 256,
    "max_seq_len": 2304,
    "batch_buckets": [1, 64, 128, 256],
    "token_buckets": [8192],
    "kv_cache_config": {"enable_block_reuse": False},
    "skip_tokenizer_init": True,
    "progress": False,
}
PHASES = ("schedule", "pack", "dispatch", "update")


@dataclass(frozen=True)
class Way:
    """How steps are launched. flights: steps on their way at most; None: no bound.

    given: what the program takes. same: one array of the host, fresh: a copy of it for each step, ahead: an array that
    was put on the device one step before, resident: one that has been there all along, placed: a copy that another
    program writes to where the step before had its input. read: the tokens are copied to
    the host. busy: milliseconds of Python between reading and the next launch. hold: the logits of a step live until
    the next one is launched, as in the bare loop. places: token arrays whose memory the steps write in turn, and as
    many logits as one; 0: memory that is allocated for each step. copied: the tokens that are read are a copy of
    `last_token`, which a third program makes.
    """

    name: str
    given: str = "same"
    flights: int | None = None
    read: bool = False
    busy: float = 0.0
    hold: bool = False
    places: int = 0
    copied: bool = False


WAYS = (
    Way("bare", hold=True),
    Way("logits dropped"),
    Way("resident, bare", "resident"),
    Way("fresh input", "fresh"),
    Way("two on their way", "fresh", 2),
    Way("and read", "fresh", 2, True),
    Way("and 1 ms of host", "fresh", 2, True, 1.0),
    Way("and 3 ms of host", "fresh", 2, True, 3.0),
    Way("ahead", "ahead", 2, True, 1.0),
    Way("resident", "resident", 2, True, 1.0),
    Way("logits held", "fresh", 2, True, 1.0, True),
    Way("three on their way", "fresh", 3, True, 1.0),
    Way("results in place", "fresh", 2, True, 1.0, places=3),
    Way("all but tokens in place", "resident", 2, True, 1.0, places=3),
    Way("placed, all but tokens in place", "placed", 2, True, 1.0, places=3),
    Way("placed, tokens copied", "placed", 2, True, 1.0, places=1, copied=True),
    Way("all in place, bare", "resident", places=1),
)


def compile_in_place(llm: LLM, bucket: Any) -> Any:
    """The step of a bucket with two more arguments, in whose memory the tokens and the logits are written."""
    runner = llm._engine._runner
    (stage,) = runner.stages
    shape = runner.packer.shape(bucket)
    forward, arguments = stage.functions.forward(shape), stage.arguments(shape, runner.packer.spare_slot + 1)
    traced = jax.jit(forward).trace(*arguments)
    results = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=arguments[2].sharding), traced.out_info[:2]
    )
    jitted = jax.jit(
        lambda w, kv, last, packed, *_: forward(w, kv, last, packed), keep_unused=True, donate_argnums=(1, 2, 4, 5)
    )
    program = jitted.lower(*arguments, *results).compile(stage.functions.compiler_options(shape))
    return program, results


def measure(llm: LLM, data: np.ndarray, bucket: Any, way: Way, steps: int, in_place: Any) -> dict[str, float]:
    """Milliseconds of a step, of the call that launches it, and of the wait for its tokens."""
    runner = llm._engine._runner
    (stage,) = runner.stages
    program, place = stage.programs[bucket], program_input(stage, runner.packer.shape(bucket), runner)
    tokens: deque[jax.Array] = deque()
    logits: Any = None
    if way.places:
        program, (token, logit) = in_place
        empty = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)  # noqa: E731
        tokens.extend(empty(token) for _ in range(way.places))
        logits = empty(logit)
    resident = jax.device_put(data, place)
    calls, waits = [], []
    flights: deque[jax.Array] = deque()
    ahead = jax.device_put(data.copy(), place)
    jax.block_until_ready((resident, ahead))
    write = jax.jit(lambda old, new: new, donate_argnums=0, keep_unused=True).lower(resident, resident).compile()
    copy = jax.jit(lambda last_token: last_token[:-1]).lower(runner._last_token).compile()

    def finish() -> None:
        token_R, began = flights.popleft(), time.perf_counter()
        if way.read:
            np.asarray(token_R)
        else:
            token_R.block_until_ready()
        waits.append(time.perf_counter() - began)
        while time.perf_counter() - began - waits[-1] < 1e-3 * way.busy:
            pass

    give: dict[str, Callable[[], Any]] = {
        "same": lambda: data,
        "fresh": data.copy,
        "ahead": lambda: ahead,
        "resident": lambda: resident,
        "placed": data.copy,
    }
    began = time.perf_counter()
    for _ in range(steps):
        given = give[way.given]()
        before = time.perf_counter()
        if way.given == "placed":
            given = resident = write(resident, given)
        places = (tokens.popleft(), logits) if way.places else ()
        token_R, logits, _, runner._last_token, stage.kv = program(
            stage.weights, stage.kv, runner._last_token, given, *places
        )
        del places
        if way.places:
            tokens.append(token_R)
        elif not way.hold:
            del logits
        if way.copied:
            token_R = copy(runner._last_token)
        if way.read:
            token_R.copy_to_host_async()
        calls.append(time.perf_counter() - before)
        if way.given == "ahead":
            ahead = jax.device_put(data.copy(), place)
        if way.flights is not None:
            flights.append(token_R)
        if way.flights is not None and len(flights) >= way.flights:
            finish()
    jax.block_until_ready(token_R)
    seconds = time.perf_counter() - began
    figures = {"step": seconds / steps, "call": statistics.median(calls), "call max": max(calls)}
    figures["wait"] = statistics.median(waits) if waits else 0.0
    return {name: 1e3 * value for name, value in figures.items()}


def program_input(stage: Any, shape: Any, runner: Any) -> Any:
    """Where a step's packed input has to be."""
    return stage.arguments(shape, runner.packer.spare_slot + 1)[3].sharding


def engine_step(llm: LLM, batch: int, vocab: int) -> dict[str, float]:
    """The engine's milliseconds per token, and by phase on the wall of its thread: one batch of 128 in, 256 out."""
    engine = llm._engine
    load = random_load(batch, Lengths(128, 128), Lengths(256, 256), vocab, 0, 0)
    warm_up = random_load(batch, Lengths(128, 128), Lengths(32, 32), vocab, 0, 1)
    llm.generate(warm_up.prompts, SamplingParams(max_tokens=32, ignore_eos=True), use_tqdm=False)
    engine.reset_stats()
    found = {"step": MEASURES["decode"](llm, load)}
    stats = engine.stats()
    return found | {name: stats["host_ms"][name] for name in PHASES} | {"wait": stats["wait_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--steps", type=int, default=48, help="of each way (default: %(default)s)")
    parser.add_argument("--model", help="another model (default: Llama-3.1-8B's shapes with random weights)")
    parser.add_argument("--settings", default="{}", help="JSON of engine settings that win over the script's own")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        config = files("jaxllm.plan") / "models" / "Llama-3.1-8B.json"
        (Path(directory) / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        model = {"model": args.model} if args.model else {"model": directory, "load_format": "dummy"}
        with LLM(**(SETTINGS | model | json.loads(args.settings))) as llm:
            vocab = llm._engine.model_config.vocab_size
            for batch in map(int, args.batches.split(",")):
                engine = engine_step(llm, batch, vocab)
                print(f"\nbatch {batch}: engine " + ", ".join(f"{name} {ms:.2f}" for name, ms in engine.items()))
                print(f"bare step of the suite {bare_step(llm, batch, 256, vocab):.2f}")
                packed = decode_input(llm, batch, 256, vocab)
                data, bucket = np.array(packed.data), packed.shape.bucket
                in_place = compile_in_place(llm, bucket)
                rows = {}
                for way in WAYS:
                    measure(llm, data, bucket, way, 8, in_place)
                    rows[way.name] = measure(llm, data, bucket, way, args.steps, in_place)
                cells = [["way", *next(iter(rows.values()))]]
                cells += [[name, *(f"{value:.2f}" for value in row.values())] for name, row in rows.items()]
                print("\n".join(aligned(cells)), f"\n(input of {data.nbytes:,} bytes)", flush=True)
                found[str(batch)] = {"engine": engine, "ways": rows}
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
