#!/usr/bin/env python
"""README's tables and plots of measurements, made from the saved results in configs/results.

    python scripts/readme_tables.py            # writes README.md and the plots
    python scripts/readme_tables.py --check    # says what is out of date, and exits with 1

README.md marks each place with what is to be made there, and from which files (by their place in configs/results):

    <!-- bench h200/bench.json -->        rows of scripts/bench_h200.py
    <!-- layouts h200-x2/layouts.json -->  jaxllm bench layouts
    <!-- node h200-x4/node.json -->        rows of scripts/bench_node.py, of the files there are
    <!-- server h200/server.json -->      scripts/bench_server.py
    <!-- costs h200/quantization.json -->  scripts/quantization_cost.py
    <!-- plot decode.svg h200/bench.json -->   decode milliseconds by batch size, as configs/results/decode.svg
    <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "configs/results"
MARK = re.compile(r"(<!-- (\w+) ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PEER = "vLLM"

Json = dict[str, Any]


def load(name: str) -> Json:
    """A file of configs/results. Raises SystemExit, which names it, where it is not JSON."""
    try:
        return json.loads((ROOT / RESULTS / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{RESULTS}/{name} cannot be read: {error}") from None


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows]).replace(
        "| --- ", "|---"
    )


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def bench(*names: str) -> str:
    """Rows of the suite: what was reached, of which floor, and beside whom."""
    rows, notes = [], []
    for name in names:
        content = load(name)
        notes += [content["note"]] if content.get("note") else []
        for row in content["rows"]:
            if row.get("median") is None:
                continue
            unit = " ms" if row["unit"] == "ms" else " " + row["unit"]
            found = number(row["median"]) + unit
            bare = number(row["bare_ms"]) + " ms" if row.get("bare_ms") else "-"
            share = f"{100 * row['share_of_floor']:.0f} %" if row.get("share_of_floor") else "-"
            peer = number(row["peer"]) if row.get("peer") else "-"
            runs = row["runs"]
            spread = "one run" if len(runs) == 1 else f"{number(min(runs))} to {number(max(runs))}, {len(runs)} runs"
            rows.append([label(row), found, spread, bare, share, peer])
        for name_of_start, entry in content.get("starts", {}).items():
            if "seconds" in entry:
                what = "process start to first token, " + name_of_start.removeprefix("start-")
                rows.append([what, f"{entry['seconds']:.1f} s", "one run", "-", "-", "-"])
    made = table(["load", "jaxllm", "runs", "the step alone", "share of the floor", PEER], rows)
    return made + "".join(f"\n{note}\n" for note in notes)


def label(row: Json) -> str:
    """A load in words: what comes before the kind in its name, the kind, the batch and the lengths."""
    name, kind = row["name"], row["kind"]
    before = name.split(kind)[0].strip("-") if kind in name else ""
    lead = f"{before}: " if before else ""
    if kind == "decode":
        context = f", {row['input_len']:,} tokens of context" if row["input_len"] > 1000 else ""
        return f"{lead}decode, batch {row['batch']}{context}"
    if kind == "prefill":
        return f"{lead}prefill, {row['batch']} x {row['input_len']:,} tokens"
    if kind == "ttft":
        return f"{lead}first token after {row['input_len']:,}"
    if kind == "step":
        return f"{lead}decode step, batch {row['batch']} over {row['input_len']:,} tokens that nobody computed"
    return f"{lead}{row['batch']} requests, {row['input_len']:,} in, {row['output_len']:,} out"


def layouts(*names: str) -> str:
    """`jaxllm bench layouts`: distance from the first layout, TPOT by batch and TTFT by prompt, and how much faster."""
    rows: list[Json] = [row for name in names for row in load(name)["rows"] if not row.get("error")]
    batches = sorted({int(batch) for row in rows for batch in row["tpot_ms"]})
    prompts = sorted({int(length) for row in rows for length in row["ttft_ms"]})
    head = ["layout", "max, mean \\|dlogp\\|", *(f"TPOT batch {n}" for n in batches), *(f"TTFT {n:,}" for n in prompts)]
    cells = []
    for i, row in enumerate(rows):
        distance = "-" if i == 0 else f"{row['largest_difference']:.3f}, {row['mean_difference']:.3f}"
        line = ["one GPU" if row["layout"] == "1" else row["layout"], distance]
        for key, sizes in (("tpot_ms", batches), ("ttft_ms", prompts)):
            for size in sizes:
                ms, first = row[key].get(str(size)), rows[0][key].get(str(size))
                faster = f" ({first / ms:.2f}x)" if ms and first and i else ""
                line.append("-" if ms is None else f"{ms:.2f}{faster}" if ms < 100 else f"{ms:,.0f}{faster}")
        cells.append(line)
    return table(head, cells)


def node(*names: str) -> str:
    """Rows for several GPUs, each with its sums' share of the step; and how decodes scale with tensor parallelism."""
    there = [name for name in names if (ROOT / RESULTS / name).exists()]
    if not there:
        return "Not measured yet.\n"
    found = [row for name in there for row in load(name)["rows"] if row.get("median") is not None]
    sums = {(row["engine"], row["batch"]): row["median"] for row in found if row["kind"] == "sums"}
    head = ["load", "GPUs", "jaxllm", "a GPU", "the step alone", "of it sums", "share of the floor", "TensorRT-LLM"]
    rows, decodes = [], {}
    for row in found:
        if row["kind"] == "sums":
            continue
        per_gpu, bare, peer = "-", row.get("bare_ms"), row.get("peer")
        if row["unit"] != "ms":
            per_gpu = f"{number(row['median'] / row['gpus'])} tok/s"
        time = sums.get((row["engine"], row["batch"]))
        share = f"{100 * time / bare:.0f} %" if time and bare and row["kind"] == "decode" else "-"
        floor = f"{100 * row['share_of_floor']:.0f} %" if row.get("share_of_floor") else "-"
        speed = f"{number(row['median'])} {row['unit']}"
        cells = [label(row), str(row["gpus"]), speed, per_gpu, f"{number(bare)} ms" if bare else "-", share, floor]
        rows.append([*cells, f"{number(peer)} tok/s" if peer else "-"])
        if (split := re.fullmatch(r"(.*)-tp\d+", row["engine"])) and row["kind"] == "decode":
            decodes.setdefault((split[1], row["batch"]), {})[row["gpus"]] = row["median"]
    made = table(head, rows)
    scaling = {key: times for key, times in decodes.items() if len(times) > 1}
    if not scaling:
        return made
    counts = sorted({gpus for times in scaling.values() for gpus in times})
    lines = []
    for (model, batch), times in scaling.items():
        least = min(times)
        line = [f"{model}: decode, batch {batch}"]
        for gpus in counts:
            efficiency = f" ({100 * times[least] * least / (times[gpus] * gpus):.0f} %)" if gpus in times else ""
            line.append(f"{number(times[gpus])} ms{efficiency if gpus != least else ''}" if gpus in times else "-")
        lines.append(line)
    head = ["tensor parallelism (efficiency)", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in counts)]
    return f"{made}\n{table(head, lines)}"


def server(*names: str) -> str:
    """scripts/bench_server.py: streams against one request that is answered whole, and against `LLM.generate`."""
    cells, notes = [], []
    for name in names:
        content = load(name)
        notes += [content["note"]] if content.get("note") else []
        for row in content["rows"]:
            streams, engine = row["streams"], row["engine"]
            speed = [f"{number(found['output_throughput'])} tok/s" for found in (streams, engine, row["offline"])]
            shares = f"{100 * row['throughput_ratio']:.1f}, {100 * row['throughput_ratio_to_offline']:.1f} %"
            steps = f"{streams['step_ms']:.2f}, {engine['step_ms']:.2f} ms"
            ttft = f"{number(streams['p50_ttft_ms'])}, {number(streams['p99_ttft_ms'])} ms"
            cells.append([str(row["concurrency"]), *speed, shares, steps, ttft])
    head = ["streams", "through the server", "the engine", "`LLM.generate`", "of both", "step: streams, engine"]
    head.append("TTFT p50, p99")
    return table(head, cells) + "".join(f"\n{note}\n" for note in notes)


def costs(*names: str) -> str:
    """scripts/quantization_cost.py: how far quantised models are from the reference."""
    cells = []
    for name in names:
        content = load(name)
        model = f"{content['model']}, random weights" if content["random_weights"] else content["model"]
        for cost in content["costs"]:
            if cost["kind"]["name"] != content["reference"]:
                agreement = f"{100 * cost['agreement']:.1f} %"
                size = f"{cost['weight_bytes'] / 1e6:,.0f} MB" if cost["weight_bytes"] else "-"
                figures = [f"{cost['kl']:.4f}, {cost['worst_kl']:.4f}", agreement, size]
                cells.append([model, cost["kind"]["name"], content["reference"], *figures])
    return table(["model", "quantised", "against", "KL mean, worst (nats)", "same top token", "weights"], cells)


# ---- plots --------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 56, 150, 34, 44
COLOURS = {"jaxllm": "#1f6feb", PEER: "#d1242f", "floor": "#57606a"}


def curves(names: list[str]) -> dict[str, dict[int, float]]:
    """Milliseconds by batch of every curve: ours, the peer's and the floor, of each precision."""
    found: dict[str, dict[int, float]] = {}
    for name in names:
        for row in load(name)["rows"]:
            if row["kind"] != "decode" or row["input_len"] > 1000 or row.get("median") is None:
                continue
            before = row["name"].split("decode")[0].strip("-")
            for who, value in (("jaxllm", row["median"]), (PEER, row.get("peer")), ("floor", row.get("floor"))):
                if value is not None:
                    found.setdefault(f"{who} {before}".strip(), {})[row["batch"]] = value
    return found


def svg(lines: dict[str, dict[int, float]], title: str) -> str:
    """Curves over batch sizes, which stand at equal distances, as SVG."""
    batches = sorted({batch for line in lines.values() for batch in line})
    top = max((value for line in lines.values() for value in line.values()), default=1.0) * 1.08
    span = WIDTH - LEFT - RIGHT

    def x(batch: int) -> float:
        return LEFT + span * (batches.index(batch) + 0.5) / len(batches)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    out.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>')
    out.append(text(LEFT, 20, title, size=14))
    for tick in range(0, int(top) + 1, 2 if top > 7 else 1):
        out.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de" stroke-width="1"/>')
        out.append(text(LEFT - 8, y(tick) + 4, str(tick), anchor="end"))
    for batch in batches:
        out.append(text(x(batch), HEIGHT - BOTTOM + 18, str(batch), anchor="middle"))
    out.append(text(LEFT + span / 2, HEIGHT - 8, "batch", anchor="middle"))
    ends: list[float] = []
    for name, line in sorted(lines.items(), key=lambda item: -max(item[1].values())):
        colour, dashed = COLOURS[name.split()[0]], ' stroke-dasharray="5 4"' if " " in name else ""
        points = [(x(batch), y(line[batch])) for batch in sorted(line)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        at = points[-1][1] + 4
        while any(abs(at - other) < 14 for other in ends):
            at += 1
        ends.append(at)
        out.append(text(points[-1][0] + 10, at, f"{name} {line[max(line)]:.2f}", colour=colour))
    return "\n".join([*out, "</svg>", ""])


def text(x: float, y: float, what: str, *, anchor: str = "start", size: int = 12, colour: str = "#24292f") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{what}</text>'


# ---- files --------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[..., str]] = {
    "bench": bench,
    "layouts": layouts,
    "node": node,
    "server": server,
    "costs": costs,
}


def make(readme: str) -> tuple[str, dict[str, str]]:
    """The README with everything made anew, and the plots by their paths. Raises SystemExit for an unknown mark."""
    plots: dict[str, str] = {}

    def section(found: re.Match[str]) -> str:
        begin, kind, arguments, _, end = found.groups()
        names = arguments.split()
        if kind == "plot":
            path = f"{RESULTS}/{names[0]}"
            plots[path] = svg(curves(names[1:]), "ms per token while a batch decodes, 128 tokens in, 256 out")
            return f"{begin}![Milliseconds per token by batch size]({path})\n{end}"
        if kind not in TABLES:
            raise SystemExit(f"README.md: <!-- {kind} --> is not known; use {', '.join([*TABLES, 'plot'])}")
        return f"{begin}\n{TABLES[kind](*names)}\n{end}"

    return MARK.sub(section, readme), plots


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    readme, plots = make((ROOT / "README.md").read_text(encoding="utf-8"))
    old = []
    for path, content in {"README.md": readme, **plots}.items():
        file = ROOT / path
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            old.append(path)
            if not check:
                file.write_text(content, encoding="utf-8")
    if check and old:
        print(f"{', '.join(old)}: not what configs/results say; run python scripts/readme_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
