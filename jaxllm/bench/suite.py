"""A set of loads, each a row with a target, through the public engine: what a script of fixed measurements is made of.

Rows that need the same engine share it. Results are written after every row, so that a run that ends early, or is
started again, loses nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.bench.load import Lengths, random_load
from jaxllm.bench.measures import BARE_STEPS, MEASURES, STEPS, bare_step, generate
from jaxllm.bench.report import aligned, machine
from jaxllm.config import EngineConfig
from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.llm import LLM

WARM_UP_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Row:
    """One load and what it should reach.

    kind: decode (ms per token of `batch` requests that decode together), prefill (prompt tokens per second of `batch`
    prompts), throughput (output tokens per second of `batch` requests submitted at once), ttft (ms from the submission
    of `batch` long prompts to the last first token), step (ms of a decode step alone over a context of `input_len`
    tokens that nobody computed), sums (ms of the sums over ranks of a decode step, one after the other and alone).
    engine: name of the engine settings it runs with. must, aim, peer: figures to reach, and another library's.
    warm_up: False where the rows before have warmed up all that the row needs.
    """

    name: str
    kind: str
    engine: str
    batch: int
    input_len: int
    output_len: int
    must: float | None = None
    aim: float | None = None
    peer: float | None = None
    repeat: int | None = None
    warm_up: bool = True

    @property
    def unit(self) -> str:
        return "tok/s" if self.kind in ("prefill", "throughput") else "ms"


@dataclass(slots=True)
class Result:
    """A measured row. runs: of every repetition, in the row's unit. bare: the same step launched without scheduler and
    host work between, ms. floor: what memory and arithmetic allow at best, in the row's unit. error: why there are no
    figures."""

    row: Row
    runs: list[float] = field(default_factory=list)
    bare: float | None = None
    floor: float | None = None
    error: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.runs) if self.runs else None

    @property
    def share(self) -> float | None:
        """Share of the floor that was reached, 1 at best."""
        if self.median is None or self.floor is None:
            return None
        return self.floor / self.median if self.row.unit == "ms" else self.median / self.floor

    def reached(self, target: float | None) -> str:
        if self.median is None or target is None:
            return "-"
        good = self.median <= target if self.row.unit == "ms" else self.median >= target
        return "yes" if good else "no"

    def to_json(self) -> dict[str, Any]:
        values = {"median": self.median, "unit": self.row.unit, "share_of_floor": self.share}
        return (
            asdict(self.row)
            | {"runs": self.runs, "bare_ms": self.bare, "floor": self.floor}
            | values
            | ({"error": self.error} if self.error else {})
        )


class Suite:
    """Runs rows and keeps their results in `path`."""

    def __init__(
        self,
        engines: dict[str, dict[str, Any]],
        rows: Sequence[Row],
        *,
        path: Path | None,
        repeat: int,
        seconds: float,
        seed: int = 0,
    ) -> None:
        self.engines = engines
        self.rows = rows
        self.path = path
        self.repeat = repeat
        self.deadline = time.monotonic() + seconds
        self.seed = seed
        self.starts: dict[str, dict[str, float]] = {}
        self.results: list[Result] = []
        self._earlier: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Takes the rows that `path` has figures for from there."""
        if self.path is None or not self.path.exists():
            return
        content = json.loads(self.path.read_text(encoding="utf-8"))
        self._earlier = [row for row in content["rows"] if row.get("runs")]
        self.starts = content["start_seconds"]

    def run(self) -> int:
        """Measures the rows; the number of those without a figure."""
        done = {row["name"] for row in self._earlier}
        todo = [row for row in self.rows if row.name not in done]
        for name, settings in self.engines.items():
            rows = [row for row in todo if row.engine == name]
            if not rows:
                continue
            if time.monotonic() > self.deadline:
                self._add(*(Result(row, error="no time was left") for row in rows))
                continue
            try:
                self._run_engine(name, EngineConfig(**settings), rows)
            except Exception as error:  # an engine that does not start is a result, too
                left = [row for row in rows if row not in [result.row for result in self.results]]
                self._add(*(Result(row, error=_one_line(error)) for row in left))
        return sum(not result.runs for result in self.results)

    def _run_engine(self, name: str, config: EngineConfig, rows: Sequence[Row]) -> None:
        import jax

        from jaxllm.llm import LLM

        started = time.perf_counter()
        with LLM.from_config(config) as llm:
            self.starts[name] = dict(llm.start_report) | {"total": time.perf_counter() - started}
            floor = floors(config, jax.devices())
            for row in rows:
                if time.monotonic() > self.deadline:
                    self._add(Result(row, error="no time was left"))
                    continue
                result = Result(row)
                try:
                    self._measure(llm, result)
                    result.floor = floor(row)
                except Exception as error:  # one row is not the end of the others
                    result.error = _one_line(error)
                self._add(result)

    def _measure(self, llm: LLM, result: Result) -> None:
        row = result.row
        repeat = self.repeat if row.repeat is None else row.repeat
        vocab = llm._engine.model_config.vocab_size
        if row.kind in STEPS:
            result.runs = STEPS[row.kind](llm, row.batch, row.input_len, vocab)
            return
        # The warm-up has as many requests as the row, but few tokens: all steps of a long prompt are the same program.
        for number in range(-1 if row.warm_up else 0, repeat):
            length = row.output_len if number >= 0 else min(row.output_len, 4)
            prompt = row.input_len if number >= 0 or row.kind != "ttft" else min(row.input_len, WARM_UP_TOKENS)
            load = random_load(row.batch, Lengths(prompt, prompt), Lengths(length, length), vocab, self.seed, number)
            if number < 0:
                generate(llm, load)
            else:
                result.runs.append(MEASURES[row.kind](llm, load))
            if time.monotonic() > self.deadline and result.runs:
                break
        if row.kind == "decode":
            # At the mean context of the row's steps: a batch of 256 reads 3 % more for every 32 tokens.
            context = row.input_len + row.output_len // 2
            result.bare = bare_step(llm, row.batch, context, vocab, steps=max(BARE_STEPS, row.output_len))

    def _add(self, *results: Result) -> None:
        self.results += results
        for result in results:
            print(
                f"[{result.row.name}: {result.median or result.error} {result.row.unit}]", file=sys.stderr, flush=True
            )
        if self.path is not None:
            self.path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "engines": self.engines,
            "start_seconds": self.starts,
            "rows": self._earlier + [result.to_json() for result in self.results],
        }

    def table(self) -> str:
        """The results of this run as text."""
        cells = [["row", "median", "unit", "runs", "bare step ms", "share of floor", "must", "", "aim", "", "peer", ""]]
        for r in self.results:
            runs = " ".join(f"{value:.4g}" for value in r.runs)
            share = "-" if r.share is None else f"{100 * r.share:.0f} %"
            median, bare = _number(r.median), _number(r.bare)
            targets = [part for target in (r.row.must, r.row.aim) for part in (_number(target), r.reached(target))]
            cells.append(
                [r.row.name, median, r.row.unit, runs, bare, share, *targets, _number(r.row.peer), r.error[:100]]
            )
        return "\n".join(aligned(cells))


def floors(config: EngineConfig, devices: Sequence[Any]) -> Callable[[Row], float | None]:
    """What the plan's roofline says of a row, in its unit; None on a device that is not in its table."""
    from jaxllm.engine.sizes import DEFAULTS, kv_cache_dtype
    from jaxllm.parallel.layout import Layout
    from jaxllm.plan.find import find_model
    from jaxllm.plan.gpus import GPUS
    from jaxllm.plan.plan import DTYPES
    from jaxllm.plan.roofline import Load as PlanLoad
    from jaxllm.plan.roofline import Roofline
    from jaxllm.plan.sizes import quantized

    kind = devices[0].device_kind.lower()
    gpu = next((gpu for name, gpu in GPUS.items() if name in kind), None)
    if gpu is None:
        return lambda row: None
    model = quantized(find_model(config.model), config)
    mapping = config.resolve_mapping(len(devices))
    dtype = DTYPES[config.dtype if config.dtype != "auto" else model.dtype]
    kept = None if model.config is None else model.config.quantization
    roofline = Roofline(
        model,
        model.lay_out(Layout(mapping, dtype)),
        mapping.stage_layers(model.num_layers),
        gpu,
        kv_cache_dtype(config, dtype, kept is not None and kept.cache).itemsize,
        config.max_num_tokens or 8192,
    )

    lanes = roofline.sizes.layout.size("requests")  # that compute a prompt each at a time
    most = lanes * (config.max_batch_size or DEFAULTS["gpu"].max_batch_size)

    def floor(row: Row) -> float | None:
        if row.kind == "sums":
            return None
        speed = roofline.speed(min(row.batch, most), PlanLoad(row.input_len, row.output_len))
        if row.kind in ("decode", "step"):
            return 1e3 * speed.tpot
        if row.kind == "ttft":
            return 1e3 * -(-row.batch // lanes) * speed.ttft
        return min(row.batch, lanes) * row.input_len / speed.ttft if row.kind == "prefill" else speed.throughput

    return floor


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def choose(rows: Sequence[Row], names: str) -> list[Row]:
    """The rows whose names start with one of `names` (comma-separated); all for an empty string. Raises ConfigError."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(row.name.startswith(name) for row in rows):
            raise ConfigError(f"no row starts with {name!r}: choose from {', '.join(row.name for row in rows)}")
    return [row for row in rows if not wanted or any(row.name.startswith(name) for name in wanted)]


def scaled(row: Row, factor: int) -> Row:
    """The row with all its lengths and its batch divided, to try a script out."""
    return replace(
        row,
        batch=max(1, row.batch // factor),
        input_len=max(2, row.input_len // factor),
        output_len=max(2 if row.kind == "decode" else 1, row.output_len // factor),
    )
