"""A long load on the scheduler and a fake device.

`python test_scheduler_simulation.py 20000` prints what it did.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.scheduler import Scheduler
from tests.engine.fake_device import EOS, STOP_ID, VOCAB, Harness, Params


def random_prompt(rng: random.Random, harness: Harness, prefixes: list[list[int]]) -> list[int]:
    kind = rng.random()
    if kind < 0.5:
        base = rng.choice(prefixes)
    elif kind < 0.7 and harness.histories:
        base = rng.choice(harness.histories)  # the next turn of a conversation
    else:
        base = []
    base = base[: rng.randrange(len(base) + 1)] if rng.random() < 0.3 else base
    return (base + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))])[:110]


def simulate(num_requests: int, seed: int) -> dict[str, int]:
    """Run `num_requests` requests through every combination of settings, in equal shares; returns counts."""
    rng = random.Random(seed)
    totals: dict[str, int] = {}
    settings_ = [
        (policy, depth, cache, chunked)
        for policy in ("MAX_UTILIZATION", "GUARANTEED_NO_EVICT")
        for depth in (1, 2)
        for cache in (True, True, False)
        for chunked in (True, True, False)
    ]
    for number, (policy, depth, cache, chunked) in enumerate(settings_):
        size = rng.choice([4, 8])
        turns = (1, 1, 1, 2, 1, 4)[number % 6]
        pool = PagePool((160, 400, 800)[number % 3] // size, size, cache)
        scheduler = Scheduler(
            pool,
            max_batch_size=(4, 16, 16, 32)[number % 4],
            max_num_tokens=rng.choice([32, 64, 128]),
            max_seq_len=128,
            tile=8,
            max_tiles=12,
            policy=policy,
            chunked_prefill=chunked,
            eos_token_ids=[EOS],
            priority_queue=number % 2 == 1,
            micro_batches=turns,
        )
        harness = Harness(scheduler, depth if turns == 1 else turns + depth - 1)
        prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randrange(8, 40))] for _ in range(6)]
        share = num_requests // len(settings_) + (number < num_requests % len(settings_))
        while harness.added < share:
            for _ in range(rng.choice([0, 0, 1, 5])):
                if harness.added < share:
                    request_params = Params(
                        n=rng.choice([1, 1, 1, 1, 2, 4]),
                        max_tokens=rng.choice([None, None, 1, 8, 40]),
                        min_tokens=rng.choice([None, None, 3]),
                        ignore_eos=rng.random() < 0.1,
                        stop_token_ids=rng.choice([None, [STOP_ID]]),
                        wait_for_token=rng.random() < 0.1,
                    )
                    prompt = random_prompt(rng, harness, prefixes)
                    if rng.random() < 0.3:  # starts small and grows: this is what runs out of pages
                        prompt = prompt[:5]
                        request_params.max_tokens, request_params.ignore_eos = 60, True
                    harness.add(
                        prompt,
                        request_params,
                        priority=rng.choice([0.2, 0.5, 0.5, 0.8]),
                        cache_salt=rng.choice([None, None, "tenant"]),
                        prefix_cache=rng.random() < 0.95,
                    )
            events = harness.advance()
            if harness.requests and rng.random() < 0.05:
                harness.abort(rng.choice(harness.requests))
            for event in events:
                if not event.seq.finished and rng.random() < 0.01:
                    harness.stop(event.seq)
            if harness.steps % 50 == 0:
                scheduler.check()
            while len(harness.requests) > 60:  # let the queue shrink now and then
                harness.advance()
        harness.drain()
        counts = {
            "requests": harness.added,
            "steps": harness.steps,
            "tokens": harness.tokens,
            "preemptions": scheduler.num_preemptions,
            "hits": pool.stats.hits,
            "misses": pool.stats.misses,
            "evictions": pool.stats.evictions,
        }
        totals = {name: totals.get(name, 0) + count for name, count in counts.items()}
    return totals


def test_simulation_of_20000_requests_takes_under_30_s_and_no_jax() -> None:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, __file__, "20000"], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    report = dict(line.split("=") for line in result.stdout.split())
    assert report["jax"] == "False"
    assert int(report["requests"]) == 20000
    assert float(report["seconds"]) < 30  # of processor time: the machine may be busy
    for name in ("preemptions", "hits", "misses", "evictions"):
        assert int(report[name]) > 1000, f"the load exercises too little: {name} {report[name]}"


def main(num_requests: int, seed: int = 0) -> None:
    """Print the counts of one simulation, and the processor time it took, as `name=value` words."""
    start = time.process_time()
    totals = simulate(num_requests, seed)
    seconds = time.process_time() - start
    counts = [f"{name}={value}" for name, value in totals.items()]
    print(*counts, f"seconds={seconds:.1f}", f"jax={'jax' in sys.modules}")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
