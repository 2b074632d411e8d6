#!/usr/bin/env python
"""What the scheduler makes of a load, on a device that is only a cost model: output tokens per second, ITL and padding.

    python scripts/simulate_load.py                                        # 512 requests, 1000 in and 1000 out
    python scripts/simulate_load.py --chunks 8192,2048 --output-len 1:1000
    python scripts/simulate_load.py --step-ms 1:3.9,64:4.5,256:6.6,8192:165 --bandwidth 4.2

The scheduler, the pages and the buckets are the engine's own; nothing is computed, so it takes seconds on a laptop. A
step takes what its bucket's tokens cost beside attention (--step-ms, interpolated) and the time in which the pages of
its decodes are read; attention within prompts is in --step-ms. The defaults are Llama-3.1-8B in bfloat16 on one H200.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass, field

import numpy as np

from jaxllm.bench.load import Lengths
from jaxllm.bench.report import aligned
from jaxllm.engine import buckets
from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import Request
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Step
from jaxllm.sampling_params import SamplingParams

PAGE, TILE = 32, 128


@dataclass
class Costs:
    """Milliseconds of a step: by the tokens of its bucket, and bytes of KV for each token of context at GB/s."""

    step_ms: dict[int, float]
    kv_bytes: int
    bandwidth: float  # TB/s

    def step(self, bucket: buckets.Bucket, context: int) -> float:
        tokens = bucket.tokens(TILE)
        products = float(np.interp(tokens, list(self.step_ms), list(self.step_ms.values())))
        return products + 1e3 * context * self.kv_bytes / (self.bandwidth * 1e12)


@dataclass
class Run:
    """What came of one policy. itl: gaps between the tokens of a request, ms. padding: share of the tokens computed."""

    seconds: float = 0.0
    output_tokens: int = 0
    steps: int = 0
    mixed: int = 0
    preemptions: int = 0
    real: int = 0
    padded: int = 0
    itl: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)


class PromptsFirst(Scheduler):
    """Holds decodes back while prompts can be computed: the batch is filled before it decodes."""

    _hold = True

    def schedule(self, prompts: bool = True, ahead: bool = True) -> Step | None:
        self._hold = True
        step = super().schedule(prompts, ahead)
        self._hold = False
        return super().schedule(prompts, ahead) if step is None else step

    def _schedule_decodes(self, step: Step, ahead: bool = False) -> None:
        if not self._hold:
            super()._schedule_decodes(step, ahead)


def simulate(
    lengths: list[tuple[int, int]],
    costs: Costs,
    *,
    slots: int,
    chunk: int,
    tiles: list[int],
    pages: int,
    first: bool,
    cut: bool = True,
) -> Run:
    """Runs requests of (prompt, output) tokens, all submitted at once, to their end.

    chunk: prompt tokens of a step. tiles: sizes of the compiled buckets with prompts. first: fill the batch first.
    cut: cut chunks to fill a bucket.
    """
    most = chunk // TILE
    counts = sorted({n for n in tiles if n < most} | {most})
    scheduler = (PromptsFirst if first else Scheduler)(
        PagePool(pages, PAGE, False),
        max_batch_size=slots,
        max_num_tokens=chunk + slots,
        max_seq_len=max(map(sum, lengths)) + 1,
        tile=TILE,
        max_tiles=most,
        tile_counts=counts if cut else (),
    )
    sizes = [n for n in (1, 8, 32, 64, 128, 256, 384, 512) if n <= slots]
    picker = buckets.Picker(buckets.plan(slots, most, batch_sizes=sizes, tile_counts=counts), TILE)
    for number, (prompt, output) in enumerate(lengths):
        scheduler.add(Request(number, [1] * prompt, SamplingParams(max_tokens=output, ignore_eos=True)))
    run, now, heard = Run(), 0.0, [0.0] * len(lengths)
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        needed = sum(-(-(c.stop - c.start) // TILE) for c in step.prefills)
        bucket = picker.pick(len(step.decodes), needed)
        now += 1e-3 * costs.step(bucket, sum(step.positions))
        run.steps += 1
        run.mixed += bool(step.prefills and step.decodes)
        run.real += step.num_tokens
        run.padded += bucket.tokens(TILE) - step.num_tokens
        for event in scheduler.update(step, [5] * step.num_rows):
            number = event.seq.request.request_id
            (run.itl if heard[number] else run.ttft).append(1e3 * (now - heard[number]))
            heard[number] = now
            run.output_tokens += 1
    run.seconds, run.preemptions = now, scheduler.num_preemptions
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=512)
    parser.add_argument("--input-len", default="1000", metavar="N[:M]")
    parser.add_argument("--output-len", default="1000", metavar="N[:M]")
    parser.add_argument("--slots", default="256", metavar="LIST", help="max_batch_size (default: %(default)s)")
    parser.add_argument("--chunks", default="8192,4096,2048,1024", metavar="LIST", help="prompt tokens of a step")
    parser.add_argument("--tiles", default="1,2,4,8,16,32,64", metavar="LIST", help="tiles of 128 of the buckets")
    parser.add_argument("--kv-tokens", type=int, default=750_000, help="page pool (default: %(default)s)")
    parser.add_argument("--kv-bytes", type=int, default=131_072, help="of a token of context (default: %(default)s)")
    parser.add_argument("--step-ms", default="1:4.2,64:4.8,256:7.0,8448:190", metavar="TOKENS:MS,...")
    parser.add_argument("--bandwidth", type=float, default=3.9, help="of decode attention, TB/s (default: %(default)s)")
    parser.add_argument("--no-cut", action="store_true", help="pad steps, and do not cut chunks to fill them")
    args = parser.parse_args()

    rng = random.Random(0)
    isl, osl = Lengths.parse(args.input_len, "--input-len"), Lengths.parse(args.output_len, "--output-len")
    lengths = [(isl.draw(rng), osl.draw(rng)) for _ in range(args.num_requests)]
    points = (point.split(":") for point in args.step_ms.split(","))
    costs = Costs({int(tokens): float(ms) for tokens, ms in points}, args.kv_bytes, args.bandwidth)
    tiles = [int(n) for n in args.tiles.split(",")]
    cells = [["slots", "chunk", "batch first", "output tok/s", "s", "steps", "mixed", "padding", "preempted"]]
    cells[0] += ["TTFT mean s", "ITL mean ms", "p99", "max"]
    for slots in map(int, args.slots.split(",")):
        for chunk in map(int, args.chunks.split(",")):
            for first in (False, True):
                run = simulate(
                    lengths, costs, slots=slots, chunk=chunk, tiles=tiles, pages=args.kv_tokens // PAGE, first=first,
                    cut=not args.no_cut,
                )  # fmt: skip
                row = [str(slots), str(chunk), "yes" if first else "no", f"{run.output_tokens / run.seconds:,.0f}"]
                row += [f"{run.seconds:.1f}", str(run.steps), str(run.mixed)]
                row += [f"{100 * run.padded / (run.real + run.padded):.1f} %", str(run.preemptions)]
                p99 = float(np.percentile(run.itl, 99))
                row += [f"{statistics.fmean(run.ttft) / 1e3:.1f}", f"{statistics.fmean(run.itl):.1f}"]
                cells.append([*row, f"{p99:.0f}", f"{max(run.itl):.0f}"])
    print("\n".join(aligned(cells)))


if __name__ == "__main__":
    main()
