"""Figures of a benchmark: medians over the repetitions, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from jaxllm.bench.load import Load
from jaxllm.bench.runners import Run, Runner, num_threads

# key -> (heading, format)
_COLUMNS = {
    "output_tok_s": ("out tok/s", "{:.1f}"),
    "total_tok_s": ("in+out tok/s", "{:.1f}"),
    "requests_s": ("req/s", "{:.2f}"),
    "ttft_ms": ("TTFT ms", "{:.1f}"),
    "tpot_ms": ("TPOT ms", "{:.2f}"),
    "seconds": ("seconds", "{:.2f}"),
}


@dataclass
class Row:
    """One library's figures: `runs` holds every repetition, `median` the median of each figure."""

    name: str
    note: str
    start_seconds: dict[str, float]
    runs: list[dict[str, float]] = field(default_factory=list)
    same_tokens: str = ""

    @property
    def median(self) -> dict[str, float]:
        return {key: statistics.median(run[key] for run in self.runs) for key in self.runs[0]} if self.runs else {}

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the seconds of the repetitions."""
        seconds = [run["seconds"] for run in self.runs if "seconds" in run]
        return (max(seconds) - min(seconds)) / statistics.median(seconds) if seconds else 0.0


@dataclass
class Report:
    """A finished benchmark.

    Attributes:
        title: what was measured.
        load: the parameters of the load.
        rows: one for each library, jaxllm first.
        host: the host's milliseconds per step by phase, when profiled.
    """

    title: str
    load: dict[str, Any]
    rows: list[Row]
    host: dict[str, float] | None = None

    def table(self) -> str:
        lines = [self.title, "  " + ", ".join(f"{name} {value}" for name, value in self.load.items()), ""]
        ours = self.rows[0].median.get("output_tok_s") if self.rows else None
        keys = [key for key in _COLUMNS if any(key in row.median for row in self.rows)]
        if keys:
            cells = [["", *(_COLUMNS[key][0] for key in keys), "jaxllm is", "spread"]]
            for row in self.rows:
                figures = [_COLUMNS[key][1].format(row.median[key]) if key in row.median else "-" for key in keys]
                theirs = row.median.get("output_tok_s")
                ratio = f"{ours / theirs:.2f}x" if row is not self.rows[0] and ours and theirs else ""
                cells.append([row.name, *figures, ratio, f"{100 * row.spread:.0f} %"])
            lines += aligned(cells)
        for row in self.rows:
            start = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.start_seconds.items())
            lines.append(
                f"  {row.name}: {row.note}; start, s: {start}" + (f"; {row.same_tokens}" if row.same_tokens else "")
            )
        if self.host:
            lines += [
                "",
                "host cost of one decode step, ms of CPU time of the engine's thread (median of the repetitions)",
            ]
            lines += aligned([[name, f"{value:.3f}"] for name, value in self.host.items()])
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the machine and the versions it was measured on."""
        out: dict[str, Any] = {"title": self.title, "load": self.load, "machine": machine()}
        out["rows"] = [asdict(row) | {"median": row.median} for row in self.rows]
        if self.host:
            out["host_ms_per_step"] = self.host
        return out

    def emit(self, json_path: str | None = None) -> None:
        """Print the table; write the JSON to `json_path` too ("-": to stdout, instead of the table)."""
        if json_path == "-":
            json.dump(self.to_json(), sys.stdout, indent=2)
            print()
            return
        print(self.table(), flush=True)
        if json_path:
            with open(json_path, "w", encoding="utf-8") as file:
                json.dump(self.to_json(), file, indent=2)
                file.write("\n")


def figures(load: Load, run: Run) -> dict[str, float]:
    """What is reported of one run. Rates count the tokens that were asked for, not padding."""
    out = {
        "seconds": run.seconds,
        "output_tok_s": load.output_tokens / run.seconds,
        "total_tok_s": (load.input_tokens + load.output_tokens) / run.seconds,
        "requests_s": len(load.prompts) / run.seconds,
    }
    if run.ttft is not None:
        out["ttft_ms"] = 1e3 * run.ttft
    if run.tpot is not None:
        out["tpot_ms"] = 1e3 * run.tpot
    return out


def measure(runners: list[Runner], warm_up: Load, loads: list[Load], peer_repeat: int | None = None) -> list[Row]:
    """Run each load through every runner in turn, so that a noisy minute hits all of them, and collect the figures."""
    rows = [Row(runner.name, runner.note, runner.start_seconds) for runner in runners]
    for runner in runners:
        _progress(f"{runner.name}: warm-up")
        runner.run(warm_up)
    equal = [0] * len(runners)
    compared = 0
    for number, load in enumerate(loads):
        ours: list[list[int]] = []
        for place, runner in enumerate(runners):
            if place and peer_repeat is not None and number >= peer_repeat:
                continue
            _progress(f"{runner.name}: run {number + 1} of {len(loads)}")
            run = runner.run(load)
            rows[place].runs.append(figures(load, run))
            if place == 0:
                ours = run.tokens
            else:
                equal[place] += sum(a == b for a, b in zip(ours, run.tokens, strict=True))
        if peer_repeat is None or number < peer_repeat:
            compared += len(load.prompts)
    for row, count in zip(rows[1:], equal[1:], strict=True):
        row.same_tokens = f"same greedy tokens as jaxllm in {count} of {compared} requests"
    return rows


def machine() -> dict[str, Any]:
    """Where it was measured, as far as that can be told without privileges."""
    versions = {}
    for name in ("jaxllm", "jax", "jaxlib", "flax", "torch", "transformers", "llama-cpp-python"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import jax

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "versions": versions,
    }


def aligned(cells: list[list[str]]) -> list[str]:
    """Rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _progress(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
