#!/usr/bin/env python
"""Models that need several GPUs, scaling and long contexts on one host with 2, 4 or 8 H200s, with random weights.

    python scripts/bench_node.py --gpus 4                        # all rows, the most valuable first, in 330 s
    python scripts/bench_node.py --gpus 8 --seconds 900          # the same for eight; `--gpus 2`: what fits two
    python scripts/bench_node.py --gpus 4 --rows llama-3.3,qwen  # rows whose names start so
    python scripts/bench_node.py --gpus 4 --resume               # only what the JSON file has no figures for
    python scripts/bench_node.py --gpus 4 --plan                 # does it fit, and what allows the roofline? No GPU

Rows that share an engine are a group: a process of its own with a time limit, so that one that hangs costs no more than
that. Groups that need fewer GPUs than there are run side by side. Results are written after every row. Greedy, prefix
cache off, through the public engine; `--tiny` tries everything out on CPU devices (JAX_NUM_CPU_DEVICES=8).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from node_groups import LONGEST, Group, groups

from jaxllm.bench.suite import Row, Suite, choose
from jaxllm.config import EngineConfig

AHEAD = 4
"""Processes that already import what they need while others measure."""
TINY = 256
"""What `--tiny` divides lengths and batches by."""
TINY_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "vocab_size": 320,
}


@dataclass(slots=True)
class Job:
    """A group, with the file that its process writes. process: while it runs; gpus: its own of the host's."""

    group: Group
    path: Path
    process: subprocess.Popen[str] | None = None
    gpus: tuple[int, ...] = ()
    began: float = 0.0


def work() -> int:
    """A group's process: imports, then waits for a line with what it is to do, or the end."""
    import jaxllm.engine.engine
    import jaxllm.llm  # noqa: F401

    line = sys.stdin.readline()
    if not line.strip():
        return 0
    job = json.loads(line)
    os.environ.update(job["environment"])
    rows = [Row(**row) for row in job["rows"]]
    suite = Suite(job["engines"], rows, path=Path(job["path"]), repeat=job["repeat"], seconds=job["seconds"])
    failed = suite.run()
    print(suite.table(), flush=True)
    return min(failed, 1)


class Node:
    """Runs jobs on the GPUs of this host, the first that fits next, and gathers what they find in one file."""

    def __init__(self, jobs: list[Job], gpus: int, path: Path, repeat: int, seconds: float, content: dict[str, Any]):
        self.waiting = jobs
        self.running: list[Job] = []
        self.free = list(range(gpus))
        self.path = path
        self.repeat = repeat
        self.deadline = time.monotonic() + seconds
        self.content = content
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self.names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]

    def run(self) -> None:
        try:
            while self.waiting or self.running:
                self._start()
                time.sleep(0.2)
                self._end()
        finally:
            for job in [*self.running, *self.waiting]:
                if job.process is not None:
                    job.process.kill()
                    job.process.wait()

    def _start(self) -> None:
        """Starts processes that only wait, and gives work to those for which there are GPUs."""
        for job in self.waiting[: len(self.running) + AHEAD]:
            if job.process is None:
                command = [sys.executable, __file__, "--work"]
                job.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        for job in list(self.waiting):
            if time.monotonic() > self.deadline:
                self.waiting.remove(job)
                self._note(job, "no time was left")
                if job.process is not None:
                    job.process.communicate("\n")
                continue
            if job.process is None or job.group.gpus > len(self.free):
                continue  # a later one that needs fewer may fit
            self.waiting.remove(job)
            job.gpus, self.free = tuple(self.free[: job.group.gpus]), self.free[job.group.gpus :]
            job.began = time.monotonic()
            self._tell(job)
            self.running.append(job)

    def _tell(self, job: Job) -> None:
        assert job.process is not None and job.process.stdin is not None
        message = {
            "environment": {"CUDA_VISIBLE_DEVICES": ",".join(self.names[gpu] for gpu in job.gpus)},
            "engines": {name: engine.settings for name, engine in job.group.engines.items()},
            "rows": [asdict(row) for row in job.group.rows],
            "path": str(job.path),
            "repeat": self.repeat,
            "seconds": min(job.group.seconds, self.deadline - time.monotonic()),
        }
        print(f"[{job.group.name}: on {job.gpus}]", file=sys.stderr, flush=True)
        try:
            job.process.stdin.write(json.dumps(message) + "\n")
            job.process.stdin.close()
        except OSError as error:  # it died while it imported; `_end` says so
            print(f"[{job.group.name}: {error}]", file=sys.stderr, flush=True)

    def _end(self) -> None:
        """Takes the results of processes that are done, and ends those whose time is over."""
        for job in list(self.running):
            assert job.process is not None
            took = time.monotonic() - job.began
            late = took > job.group.seconds or time.monotonic() > self.deadline
            if job.process.poll() is None and not late:
                continue
            if job.process.poll() is None:
                job.process.kill()
            job.process.wait()
            self.running.remove(job)
            self.free = sorted([*self.free, *job.gpus])
            said = f"it took over {took:.0f} s" if late else f"its process ended with {job.process.returncode}"
            self._note(job, said, took)

    def _note(self, job: Job, said: str, took: float = 0.0) -> None:
        """Adds a group's rows to the results; those that it has nothing of with what was `said`."""
        found = {"rows": [], "engines": {}, "start_seconds": {}}
        if job.path.exists():
            found |= json.loads(job.path.read_text(encoding="utf-8"))
            self.content["machine"] = self.content.get("machine") or found["machine"]
        rows = {row["name"]: row for row in found["rows"]}
        for row in job.group.rows:
            empty = asdict(row) | {"runs": [], "median": None, "unit": row.unit, "error": said}
            self.content["rows"].append(rows.get(row.name, empty) | {"gpus": job.group.gpus})
        for key in ("engines", "start_seconds"):
            self.content.setdefault(key, {}).update(found[key])
        self.content.setdefault("groups", {})[job.group.name] = {"gpus": list(job.gpus), "seconds": round(took, 1)}
        self.path.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        print(f"[{job.group.name}: {took:.0f} s]", file=sys.stderr, flush=True)


def prepare(group: Group, directory: Path, extra: dict[str, Any], *, tiny: bool, layers: int | None) -> None:
    """Writes the config.json of each engine's model, and points its settings there."""
    for name, engine in group.engines.items():
        shipped = files("jaxllm.plan") / "models" / f"{engine.model}.json"
        config = json.loads(shipped.read_text(encoding="utf-8")) | engine.config
        if layers:
            config["num_hidden_layers"] = layers
        if tiny:
            config |= {key: value for key, value in TINY_CONFIG.items() if key in config or key == "head_dim"}
            batch = {"max_batch_size": 4, "batch_buckets": [1, 4], "max_num_tokens": 128}
            settings = engine.settings | batch | {"token_buckets": [128], "dtype": "float32"}
            kv = settings["kv_cache_config"] | {"max_tokens": 8192, "tokens_per_block": 4}
            cp = {"cp_config": settings["cp_config"]} if "cp_config" in settings else {}
            if "block_size" in cp.get("cp_config", {}):
                cp["cp_config"] = cp["cp_config"] | {"block_size": 16}
            engine.settings = settings | cp | {"kv_cache_config": kv, "max_seq_len": LONGEST // TINY + 96}
        place = directory / name
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        engine.settings = engine.settings | {"model": str(place)} | extra
    if tiny:
        group.seconds *= 4  # fake devices share a CPU
        group.rows = [_tiny(row) for row in group.rows]


def _tiny(row: Row) -> Row:
    lengths = {"input_len": max(8, row.input_len // TINY), "output_len": max(1, min(row.output_len, 4))}
    return replace(row, batch=min(row.batch, 4), **lengths)


def plan(chosen: list[Group]) -> int:
    """Prints what each engine takes of a GPU, and what the roofline allows its rows; 1 where one does not fit."""
    from jaxllm.bench.report import aligned
    from jaxllm.plan.find import find_model
    from jaxllm.plan.gpus import find_gpu
    from jaxllm.plan.plan import make_plan
    from jaxllm.plan.roofline import Load

    cells = [["row", "GPUs", "weights GiB", "KV GiB", "KV tokens", "free", "TPOT ms", "TTFT ms", "out tok/s", ""]]
    bad = 0
    for group in chosen:
        for row in group.rows:
            config = EngineConfig(**group.engines[row.engine].settings)
            mapping = config.resolve_mapping(group.gpus)
            model = find_model(config.model)
            found = make_plan(model, config, mapping, find_gpu("h200"), Load(row.input_len, row.output_len))
            bad += not found.ok
            worst = min(found.stages, key=lambda stage: stage.free, default=None)
            sizes = ["-"] * 4
            if worst is not None:
                sizes = [f"{worst.weights / 2**30:.1f}", f"{worst.kv / 2**30:.1f}", f"{found.pool_tokens:,}"]
                sizes.append(f"{worst.free / 2**30:.1f}")
            speed = min(found.speeds, key=lambda speed: abs(speed.batch - row.batch), default=None)
            figures = ["-"] * 3
            if speed is not None:
                figures = [f"{1e3 * speed.tpot:.2f}", f"{1e3 * speed.ttft:,.0f}", f"{speed.throughput:,.0f}"]
            cells.append([row.name, str(group.gpus), *sizes, *figures, "; ".join(found.problems)])
    print("\n".join(aligned(cells)))
    return min(bad, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), default=4, help="of this host (default: %(default)s)")
    parser.add_argument("--rows", default="", help="names, or their beginnings, separated by commas (default: all)")
    parser.add_argument("--json", type=Path, default=Path("bench_node.json"), help="results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has figures for")
    parser.add_argument("--repeat", type=int, default=2, help="after the warm-up (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=330, help="end everything after (default: %(default)s)")
    parser.add_argument("--lengths", help="of long prompts (default: 131000,1000000, on two GPUs 262000,500000)")
    parser.add_argument("--requests", type=int, default=512, help="of the largest throughputs (default: %(default)s)")
    parser.add_argument("--settings", default="{}", help="JSON of engine settings that win over the rows' own")
    parser.add_argument("--layers", type=int, help="only so many of each model's layers")
    parser.add_argument("--tiny", action="store_true", help="shrunken models and loads, to try the script out")
    parser.add_argument("--list", action="store_true", help="print the rows of each group")
    parser.add_argument("--plan", action="store_true", help="print the plans of the rows")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()

    lengths = args.lengths or ("262000,500000" if args.gpus == 2 else "131000,1000000")
    made = groups(args.gpus, [int(length) for length in lengths.split(",")], args.requests)
    wanted = {row.name for row in choose([row for group in made for row in group.rows], args.rows)}
    content: dict[str, Any] = {"machine": None, "rows": []}
    if args.resume and args.json.exists():
        content = json.loads(args.json.read_text(encoding="utf-8"))
        content["rows"] = [row for row in content["rows"] if row.get("runs")]
        wanted -= {row["name"] for row in content["rows"]}
    chosen = []
    for group in made:
        rows = [row for row in group.rows if row.name in wanted]
        if rows:
            chosen.append(replace(group, rows=rows))
    if args.list:
        for group in chosen:
            print(f"{group.name}, {group.gpus} GPUs, at most {group.seconds:.0f} s:")
            print("".join(f"  {row.name}\n" for row in group.rows), end="")
        return 0
    with tempfile.TemporaryDirectory(prefix="jaxllm-node-") as name:
        directory = Path(name)
        for group in chosen:
            prepare(group, directory, json.loads(args.settings), tiny=args.tiny, layers=args.layers)
        if args.plan:
            return plan(chosen)
        jobs = [Job(group, directory / f"{group.name}.json") for group in chosen]
        node = Node(jobs, args.gpus, args.json, args.repeat, args.seconds, content)
        node.run()
    missing = [row["name"] for row in content["rows"] if not row.get("runs")]
    print(f"{len(content['rows']) - len(missing)} rows measured; without figures: {', '.join(missing) or 'none'}")
    return min(len(missing), 1)


if __name__ == "__main__":
    sys.exit(main())
