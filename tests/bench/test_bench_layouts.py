"""Layouts one after the other: what is right, what is not, and what cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxllm.bench import layouts
from jaxllm.bench.layouts import parse_layout, render, run_layouts
from jaxllm.config import EngineConfig
from jaxllm.settings import ConfigError
from tests.tiny_llm import MODEL

CONFIG = {"model": str(MODEL), "progress": False, "dtype": "float32", "max_num_tokens": 256, "token_buckets": [256]}


def test_right_and_wrong_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "PROMPT", 64)
    monkeypatch.setattr(layouts, "OUTPUT", 8)
    path = tmp_path / "rows.json"
    one, two, refused = run_layouts(EngineConfig(**CONFIG), ["1", "tp2", "pp9"], [1], [48], 1, str(path))
    assert one.largest_difference == 0 and not one.error and not two.error
    assert 0 < two.largest_difference < 2e-3 and two.tpot_ms[1] > 0 and two.ttft_ms[48] > 0
    assert "pp9" in render([one, two, refused]) and "pp=9 needs 9 devices" in refused.error
    assert [row["layout"] for row in json.loads(path.read_text())["rows"]] == ["1", "tp2", "pp9"]
    monkeypatch.setitem(layouts.BOUNDS, "float32", (two.largest_difference / 2, 1.0))
    one, two = run_layouts(EngineConfig(**CONFIG), ["1", "tp2"], [1], [48], 1)
    assert two.error.startswith("wrong") and not one.error


@pytest.mark.parametrize("text", ["tp", "cp2", "tp2:RING", "xp2", "cp2:SPIRAL", ""])
def test_layouts_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_layout(text)
