"""Rows through a real engine, and what happens to those that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM
from jaxllm.bench import measures
from jaxllm.bench.measures import BARE_TOKENS, decode_input
from jaxllm.bench.suite import Result, Row, Suite, choose, floors
from jaxllm.config import EngineConfig
from jaxllm.engine.batch import PackedStep
from jaxllm.settings import ConfigError
from tests.tiny_llm import MODEL

ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "skip_tokenizer_init": True,
    "progress": False,
    "dtype": "float32",
    "max_batch_size": 4,
    "max_seq_len": 64,
    "max_num_tokens": 32,
    "batch_buckets": [1, 4],
    "token_buckets": [32],
    "kv_cache_config": {"tokens_per_block": 4, "max_tokens": 512, "enable_block_reuse": False},
}
ROWS = [
    Row("decode-1", "decode", "a", 1, 8, 20, must=1e9, aim=1e-9),
    Row("decode-4", "decode", "a", 4, 8, 20),
    Row("prefill-2x30", "prefill", "a", 2, 30, 1, must=1e-9, aim=1e12),
    Row("throughput-6", "throughput", "a", 6, 8, 5, repeat=1),
]


def suite(path: Path, rows: list[Row] = ROWS, engines: dict[str, Any] | None = None, **settings: Any) -> Suite:
    return Suite(engines or {"a": ENGINE}, rows, path=path, **{"repeat": 2, "seconds": 100.0, **settings})


def test_rows_of_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    found = suite(path)
    assert found.run() == 0
    one, four, prefill, throughput = found.results
    assert [len(r.runs) for r in found.results] == [2, 2, 2, 1]
    assert one.reached(one.row.must) == "yes" and one.reached(one.row.aim) == "no"
    assert prefill.reached(prefill.row.must) == "yes" and prefill.reached(prefill.row.aim) == "no"
    assert throughput.reached(None) == "-"
    # One engine ran all of them, and a bare step is a part of a whole one.
    assert set(found.starts) == {"a"} and prefill.bare is None
    for result in (one, four):
        assert result.bare is not None and result.median is not None and 0 < result.bare < 3 * result.median
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in ROWS]
    assert written["rows"][0]["median"] == one.median and written["machine"]["devices"]
    assert "decode-1" in found.table()

    again = suite(path, [*ROWS, Row("decode-2", "decode", "a", 2, 8, 20)])
    again.resume()
    assert again.run() == 0
    assert [r.row.name for r in again.results] == ["decode-2"], "only what has no figures is measured"
    assert len(json.loads(path.read_text())["rows"]) == 5


def test_the_bare_step_has_the_context_of_the_row() -> None:
    """A step that reads less than the row's own steps would make the engine look slow."""
    with LLM(**ENGINE) as llm:
        packed = decode_input(llm, 4, 40, 203)
    _, positions_R = packed.sampled()
    assert len(packed.rows) == 4 and 40 - BARE_TOKENS <= positions_R.min() <= positions_R.max() < 40


def test_all_requests_of_a_bare_step_decode_however_long_their_prompts_take() -> None:
    """Prompts of many steps: the first request has to go on until the last prompt is done."""
    with LLM(**ENGINE | {"max_num_tokens": 4, "max_seq_len": 96, "token_buckets": [4]}) as llm:
        packed = decode_input(llm, 4, 40, 203)
    _, positions_R = packed.sampled()
    assert len(packed.rows) == 4 and positions_R.min() > 20
    pages_RW = packed.shape.unpack(packed.data).pages_RW
    assert (pages_RW[0, 0, :, :5] > 0).all(), "every row has pages of its own to read"


def test_decoding_is_timed_while_all_decode(tmp_path: Path) -> None:
    """A request that ended no longer slows the others down, so the steps after its end would flatter the row."""
    rows = [Row("short", "decode", "a", 4, 40, 2)]
    found = suite(tmp_path / "r.json", rows, {"a": ENGINE | {"max_num_tokens": 4, "token_buckets": [4]}}, repeat=1)
    assert found.run() == 1
    assert "4 requests of 2 tokens never decoded together" in found.results[0].error


def test_a_row_or_an_engine_that_fails_is_a_result(tmp_path: Path) -> None:
    rows = [Row("bad", "decode", "b", 1, 8, 8), Row("too-long", "decode", "a", 1, 80, 8), ROWS[0]]
    engines = {"b": ENGINE | {"model": "/nonexistent"}, "a": ENGINE}
    found = suite(tmp_path / "r.json", rows, engines, repeat=1)
    assert found.run() == 2
    by_name = {r.row.name: r for r in found.results}
    assert "/nonexistent" in by_name["bad"].error
    assert "80" in by_name["too-long"].error
    assert by_name["decode-1"].runs
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["error"]


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    found = suite(tmp_path / "r.json", seconds=-1.0)
    assert found.run() == len(ROWS)
    assert {r.error for r in found.results} == {"no time was left"} and not found.starts


def test_rows_of_long_prompts_and_of_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over pages that nobody filled reads pages of its own for each request, up to the last position."""
    rows = [
        Row("ttft-60", "ttft", "a", 1, 60, 1, must=1e9),
        Row("step-60", "step", "a", 4, 60, 1),
        Row("step-80", "step", "a", 1, 80, 1),
        Row("sums-4", "sums", "a", 4, 8, 1),
    ]
    seen, launch = [], measures._launch_again

    def noted(llm: LLM, packed: PackedStep) -> list[float]:
        seen.append(packed)
        return launch(llm, packed)

    monkeypatch.setattr(measures, "_launch_again", noted)
    found = suite(tmp_path / "r.json", rows)
    assert found.run() == 1
    ttft, step, longer, sums = found.results
    assert ttft.reached(ttft.row.must) == "yes" and len(ttft.runs) == 2
    assert len(step.runs) == 3 and min(step.runs) > 0 and {r.row.unit for r in found.results} == {"ms"}
    assert "1 x 80 tokens are more than" in longer.error
    assert sums.runs == [0.0], "one rank has nothing to add up"
    (packed,) = seen
    parts = packed.shape.unpack(packed.data[0, 0])
    assert parts.positions_T.tolist() == [59] * 4
    assert len(np.unique(parts.pages_RW[:, :15])) == 4 * 15 and parts.pages_RW[:, :15].min() > 0


def test_share_of_the_floor() -> None:
    assert Result(ROWS[0], [5.0, 4.0, 6.0], floor=4.0).share == pytest.approx(0.8)
    assert Result(ROWS[2], [80.0], floor=100.0).share == pytest.approx(0.8)


def test_a_floor_has_as_many_requests_as_run_at_a_time() -> None:
    config = EngineConfig(**ENGINE)
    floor = floors(config, [SimpleNamespace(device_kind="NVIDIA H200")])
    four, many = (floor(Row("throughput", "throughput", "a", n, 8, 5)) for n in (4, 400))
    assert four is not None and many == four
    larger = {"max_batch_size": 400, "max_num_tokens": 400, "batch_buckets": [400], "token_buckets": [400]}
    wider = floors(EngineConfig(**ENGINE | larger), [SimpleNamespace(device_kind="NVIDIA H200")])
    assert (wider(Row("throughput", "throughput", "a", 400, 8, 5)) or 0) > four
    assert floors(config, [SimpleNamespace(device_kind="cpu")])(ROWS[0]) is None


def test_rows_are_chosen_by_how_they_start() -> None:
    assert [row.name for row in choose(ROWS, "decode,through")] == ["decode-1", "decode-4", "throughput-6"]
    assert choose(ROWS, "") == ROWS
    with pytest.raises(ConfigError, match="no row starts with 'nothing': choose from decode-1"):
        choose(ROWS, "nothing")
