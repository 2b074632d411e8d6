"""The README's tables and plots are what the saved results say."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
ROW = {
    "name": "decode-8", "kind": "decode", "batch": 8, "input_len": 128, "output_len": 256, "unit": "ms", "peer": 5.0,
    "median": 4.0, "runs": [3.9, 4.0, 4.1], "bare_ms": 3.95, "floor": 3.5, "share_of_floor": 0.875,
}  # fmt: skip


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    return module


def test_the_readme_is_up_to_date(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main() == 0, capsys.readouterr().err


def test_what_is_out_of_date_is_named(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.ROOT = tmp_path
    (tmp_path / "configs/results/x").mkdir(parents=True)
    tables.load = lambda name: {"rows": [ROW]}
    (tmp_path / "README.md").write_text(
        "a\n<!-- bench x/b.json -->\nold\n<!-- end -->\n<!-- plot x/d.svg x/b.json -->\n<!-- end -->\n"
    )
    assert tables.main() == 1
    assert "README.md, configs/results/x/d.svg: not what" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
    assert tables.main() == 0
    made = (tmp_path / "README.md").read_text()
    assert "old" not in made and "| decode, batch 8 | 4.00 ms | 3.90 to 4.10, 3 runs | 3.95 ms | 88 % | 5.00 |" in made
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    assert tables.main() == 0


def test_rows_for_several_gpus(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.node("nowhere/node.json") == "Not measured yet.\n"
    tables.ROOT = tmp_path
    place = tmp_path / "configs/results/x"
    place.mkdir(parents=True)
    (place / "node.json").touch()
    wide = ROW | {"name": "a-tp4-decode-8", "engine": "a-tp4", "gpus": 4, "peer": None}
    rows = [ROW | {"name": "a-tp1-decode-8", "engine": "a-tp1", "gpus": 1, "median": 8.0, "peer": None}, wide]
    rows.append(wide | {"name": "a-tp4-sums-8", "kind": "sums", "median": 0.79})
    rows.append(
        wide | {"name": "a-tp4-throughput-8", "kind": "throughput", "unit": "tok/s", "median": 400.0, "peer": 300}
    )
    rows.append(wide | {"name": "a-tp4-ttft-128", "kind": "ttft", "median": None})
    tables.load = lambda name: {"rows": rows}
    made = tables.node("x/node.json", "nowhere/node.json")
    assert "| a-tp4: decode, batch 8 | 4 | 4.00 ms | - | 3.95 ms | 20 % | 88 % | - |" in made
    assert "| a-tp4: 8 requests, 128 in, 256 out | 4 | 400 tok/s | 100 tok/s | 3.95 ms | - | 88 % | 300 tok/s |" in made
    assert "| a: decode, batch 8 | 8.00 ms | 4.00 ms (50 %) |" in made and "ttft" not in made


def test_loads_in_words(tables: ModuleType) -> None:
    assert tables.label(ROW | {"name": "fp8-decode-8"}) == "fp8: decode, batch 8"
    assert (
        tables.label(ROW | {"name": "long-8x32768", "input_len": 32768}) == "decode, batch 8, 32,768 tokens of context"
    )
    assert tables.label(ROW | {"name": "prefill-8x128", "kind": "prefill"}) == "prefill, 8 x 128 tokens"
    assert tables.label(ROW | {"name": "throughput-8", "kind": "throughput"}) == "8 requests, 128 in, 256 out"


def test_plot(tables: ModuleType) -> None:
    tables.load = lambda name: {"rows": [ROW, ROW | {"name": "fp8-decode-64", "batch": 64, "peer": None}]}
    lines = tables.curves(["x"])
    assert lines == {
        "jaxllm": {8: 4.0}, "vLLM": {8: 5.0}, "floor": {8: 3.5}, "jaxllm fp8": {64: 4.0}, "floor fp8": {64: 3.5},
    }  # fmt: skip
    drawn = ElementTree.fromstring(tables.svg(lines, "title"))
    written = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"title", "8", "64", "jaxllm 4.00", "jaxllm fp8 4.00", "vLLM 5.00"} <= set(written)


def test_the_server_and_the_costs(tables: ModuleType) -> None:
    streams = {"output_throughput": 950.0, "step_ms": 4.2, "p50_ttft_ms": 11.0, "p99_ttft_ms": 205.0}
    row = {"concurrency": 64, "throughput_ratio": 0.95, "throughput_ratio_to_offline": 0.94, "streams": streams}
    row |= {"engine": {"output_throughput": 1000.0, "step_ms": 4.0}, "offline": {"output_throughput": 1010.6}}
    tables.load = lambda name: {"rows": [row]}
    made = "| 64 | 950 tok/s | 1,000 tok/s | 1,011 tok/s | 95.0, 94.0 % | 4.20, 4.00 ms | 11.00, 205 ms |"
    assert made in tables.server("x")
    found = {"kl": 0.01234, "worst_kl": 0.5, "agreement": 0.9, "weight_bytes": 137e6}
    kinds = [found | {"kind": {"name": name}} for name in ("float32", "fp8 weights")]
    tables.load = lambda name: {"model": "m", "random_weights": False, "reference": "float32", "costs": kinds}
    made = tables.costs("x").splitlines()
    assert made[2:] == ["| m | fp8 weights | float32 | 0.0123, 0.5000 | 90.0 % | 137 MB |"], "no row of the reference"


def test_unknown_marks_are_refused(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="<!-- chart --> is not known; use bench, layouts, node, server, costs, plot"):
        tables.make("<!-- chart a.json -->\n<!-- end -->\n")
