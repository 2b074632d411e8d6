"""`jaxllm bench layouts`: the same model on several layouts, one after the other: right, and how fast.

Right means the log probabilities of the tokens of one prompt, against those of the first layout: random weights have
near ties everywhere, so that greedy tokens part ways for reasons that say nothing.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.mapping import CpType
from jaxllm.settings import ConfigError

PROMPT = 256
"""Tokens of the prompt whose log probabilities are compared."""

OUTPUT = 64
"""Tokens that each request decodes when TPOT is measured."""

BOUNDS = {"bfloat16": (0.1, 0.025), "float32": (2e-3, 2e-4)}
"""Largest and mean difference of log probabilities that are right, by dtype. Each sum of another order is off by half a
unit in the last place, 2^-9 of its value in bfloat16; over the 64 sums of 32 layers that makes 2^-9 * sqrt(64) = 0.016
of a logit of about 1, and the largest of 255 lies at about four times the mean."""

_SETTINGS = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "cp": "context_parallel_size"}


@dataclass(slots=True)
class LayoutRow:
    """One layout. Differences are of log probabilities (natural); times in milliseconds.

    tpot: by batch size. ttft: by prompt length. start: seconds. error: why there are no figures.
    """

    layout: str
    largest_difference: float
    mean_difference: float
    tpot_ms: dict[int, float] = field(default_factory=dict)
    ttft_ms: dict[int, float] = field(default_factory=dict)
    start: float = 0.0
    error: str = ""


def parse_layout(text: str) -> dict[str, Any]:
    """Settings of a layout such as `1`, `tp2`, `pp2`, `cp2:RING`, `dp2` or `tp2+cp2:HELIX`. Raises ConfigError."""
    settings: dict[str, Any] = {}
    for part in text.split("+"):
        match = re.fullmatch(r"(tp|pp|cp|dp)(\d+)(?::(\w+))?", part)
        if part == "1":
            continue
        if match is None or (match[3] is not None) != (match[1] == "cp"):
            raise ConfigError(f"layout {text!r} is not understood; write 1, tp2, pp2, dp2, cp2:RING or tp2+pp2")
        size = int(match[2])
        if match[1] == "dp":
            settings |= {"tensor_parallel_size": size, "enable_attention_dp": True}
        else:
            settings[_SETTINGS[match[1]]] = size
        if match[3]:
            if match[3].upper() not in CpType.__members__:
                raise ConfigError(f"layout {text!r}: cp_type must be one of {', '.join(CpType.__members__)}")
            settings["cp_config"] = {"cp_type": match[3].upper()}
    return settings


def run_layouts(
    config: EngineConfig,
    layouts: Sequence[str],
    batch_sizes: Sequence[int],
    prompt_lens: Sequence[int],
    repeat: int,
    json_path: str | None = None,
) -> list[LayoutRow]:
    """Measures every layout; the first one is what the others are compared with.

    json_path: is written after every row, so that a run that ends early loses nothing; "-": stdout, at the end.
    """
    parsed = [(text, parse_layout(text)) for text in layouts]
    rows: list[LayoutRow] = []
    reference: list[float] | None = None
    for text, settings in parsed:
        try:
            row, logprobs, dtype = _measure(config, text, settings, batch_sizes, prompt_lens, repeat)
        except Exception as error:  # a layout that cannot run is a result, too
            if reference is None:
                raise
            row = LayoutRow(text, math.nan, math.nan, error=" ".join(str(error).split()) or type(error).__name__)
        else:
            reference = logprobs if reference is None else reference
            differences = [abs(a - b) for a, b in zip(logprobs, reference, strict=True)]
            row.largest_difference, row.mean_difference = max(differences), statistics.fmean(differences)
            largest, mean = BOUNDS[dtype]
            if not (row.largest_difference <= largest and row.mean_difference <= mean):
                row.error = f"wrong: in {dtype} at most {largest:g} and on average {mean:g} are rounding"
        rows.append(row)
        print("\n".join(render(rows).splitlines()[-1:]), file=sys.stderr, flush=True)
        if json_path and json_path != "-":
            Path(json_path).write_text(_to_json(config, rows) + "\n", encoding="utf-8")
    return rows


def _measure(
    config: EngineConfig,
    text: str,
    settings: dict[str, Any],
    batch_sizes: Sequence[int],
    prompt_lens: Sequence[int],
    repeat: int,
) -> tuple[LayoutRow, list[float], str]:
    from jaxllm.llm import LLM
    from jaxllm.sampling_params import SamplingParams

    longest = max(*prompt_lens, 2 * PROMPT) + OUTPUT + 1
    values = config.model_dump(exclude_unset=True) | settings | {"skip_tokenizer_init": True, "max_seq_len": longest}
    values |= {"max_batch_size": max(batch_sizes), "batch_buckets": sorted(batch_sizes)}
    with LLM.from_config(EngineConfig(**values)) as llm:
        vocab = llm._engine.model_config.vocab_size
        numbers = random.Random(0)

        def prompt(length: int) -> list[int]:
            return [numbers.randrange(vocab) for _ in range(length)]

        (output,) = llm.generate([prompt(PROMPT)], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        found = output.outputs[0].prompt_logprobs
        assert found is not None
        logprobs = [entry[token].logprob for entry, token in zip(found, output.prompt_token_ids, strict=True) if entry]
        row = LayoutRow(text, 0.0, 0.0, start=sum(llm.start_report.values()))
        for batch in batch_sizes:
            tpots = []
            for _ in range(1 + repeat):
                params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
                outputs = llm.generate([prompt(128) for _ in range(batch)], params, use_tqdm=False)
                # From the last first token on, all of them decode.
                last = max(o.timing.first_token for o in outputs)
                done = max(o.timing.finished for o in outputs)
                steps = len(outputs[-1].outputs[0].token_ids) - 1
                tpots.append(1e3 * (done - last) / steps)
            row.tpot_ms[batch] = statistics.median(tpots[1:])
        for number, length in enumerate(prompt_lens):
            ttfts = []
            # Prompts of all lengths run the same programs, which the first warms up.
            for _ in range(repeat + (number == 0)):
                (output,) = llm.generate([prompt(length)], SamplingParams(max_tokens=1), use_tqdm=False)
                ttfts.append(1e3 * (output.timing.first_token - output.timing.submitted))
            row.ttft_ms[length] = statistics.median(ttfts[number == 0 :])
        dtype = str(llm._engine._runner.functions.layout.dtype)
    return row, logprobs, dtype


def render(rows: Sequence[LayoutRow]) -> str:
    """The table."""
    from jaxllm.bench.report import aligned

    batches, lengths = list(rows[0].tpot_ms), list(rows[0].ttft_ms)
    times = [*(f"TPOT b{batch}" for batch in batches), *(f"TTFT {length}" for length in lengths)]
    table = [["layout", "max |dlogp|", "mean", *times, "start s", ""]]
    for row in rows:
        measured = [row.tpot_ms.get(batch) for batch in batches] + [row.ttft_ms.get(length) for length in lengths]
        cells = ["-" if ms is None else f"{ms:.2f}" for ms in measured]
        differences = [f"{row.largest_difference:.2e}", f"{row.mean_difference:.2e}"]
        table.append([row.layout, *differences, *cells, f"{row.start:.0f}", row.error[:120]])
    return "\n".join(aligned(table))


def emit(config: EngineConfig, rows: Sequence[LayoutRow], json_path: str | None) -> None:
    """Prints the table, or with "-" its JSON."""
    print(_to_json(config, rows) if json_path == "-" else render(rows))


def _to_json(config: EngineConfig, rows: Sequence[LayoutRow]) -> str:
    """The rows with the machine and the settings."""
    from jaxllm.bench.report import machine

    settings = config.model_dump(exclude_unset=True, mode="json")
    return json.dumps({"machine": machine(), "settings": settings, "rows": [asdict(r) for r in rows]}, indent=2)
