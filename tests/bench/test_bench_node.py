"""The groups of scripts/bench_node.py fit their GPUs; its processes share them, and one that hangs ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_node
from node_groups import LONGEST, Group, groups

from jaxllm.bench.suite import Row
from jaxllm.config import EngineConfig
from jaxllm.plan.find import find_model
from jaxllm.plan.gpus import find_gpu
from jaxllm.plan.plan import make_plan

WORKER = """
import json, sys, time
job = json.loads(sys.stdin.readline() or "null") or sys.exit()
(row,) = job["rows"]
if row["kind"] == "prefill":
    time.sleep(60)
if row["kind"] == "decode":
    time.sleep(0.5)
    row |= {"runs": [1.0], "median": 1.0, "visible": job["environment"]["CUDA_VISIBLE_DEVICES"]}
    content = {"machine": "m", "rows": [row], "engines": {}, "start_seconds": {}}
    open(job["path"], "w").write(json.dumps(content))
"""


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_all_engines_fit(gpus: int, tmp_path: Path) -> None:
    made = groups(gpus, [131_000, LONGEST], 512)
    names = [row.name for group in made for row in group.rows]
    assert len(names) == len(set(names)) and any(name.endswith(str(LONGEST)) for name in names)
    for group in made:
        bench_node.prepare(group, tmp_path, {}, tiny=False, layers=None)
        assert {row.engine for row in group.rows} <= set(group.engines) and group.gpus <= gpus
        for engine in group.engines.values():
            config = EngineConfig(**engine.settings)
            plan = make_plan(find_model(config.model), config, config.resolve_mapping(group.gpus), find_gpu("h200"))
            assert not plan.problems and plan.mapping.world_size == group.gpus, group.name
            for row in group.rows:
                assert row.input_len + row.output_len <= plan.max_seq_len
                at_once = min(row.batch, engine.settings["max_batch_size"])  # throughput has more in turn
                assert at_once * (row.input_len + row.output_len) <= plan.pool_tokens, row.name


def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[tuple[str, int]], **options: float) -> dict:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(bench_node, "__file__", str(script))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = []
    for number, (kind, gpus) in enumerate(kinds):
        group = Group(str(number), gpus, options.get("limit", 20), {}, [Row(str(number), kind, "a", 1, 1, 1)])
        jobs.append(bench_node.Job(group, tmp_path / f"{number}.json"))
    path, content = tmp_path / "all.json", {"machine": None, "rows": []}
    bench_node.Node(jobs, 4, path, 1, options.get("seconds", 30), content).run()
    assert json.loads(path.read_text()) == content
    return {row["name"]: row for row in content["rows"]} | {"groups": content["groups"]}


@pytest.mark.timeout(60)
def test_groups_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = node(tmp_path, monkeypatch, [("decode", 4), ("decode", 1), ("decode", 2), ("decode", 4), ("decode", 1)])
    assert [found[str(n)]["runs"] for n in range(5)] == [[1.0]] * 5
    on = {name: group["gpus"] for name, group in found["groups"].items()}
    assert on["0"] == on["3"] == [0, 1, 2, 3]
    assert not set(on["1"]) & set(on["2"]) and found["1"]["gpus"] == 1
    assert all(found[name]["visible"] == ",".join(map(str, gpus)) for name, gpus in on.items())


@pytest.mark.timeout(60)
def test_what_hangs_or_dies_costs_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = node(tmp_path, monkeypatch, [("prefill", 4), ("ttft", 4), ("decode", 4)], limit=3)
    assert "it took over 3" in found["0"]["error"] and "ended with 0" in found["1"]["error"]
    assert found["2"]["runs"] == [1.0]


@pytest.mark.timeout(60)
def test_everything_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = node(tmp_path, monkeypatch, [("prefill", 4), ("decode", 4)], seconds=3)
    assert "it took over" in found["0"]["error"] and found["1"]["error"] == "no time was left"


def test_tiny_rows_are_small() -> None:
    row = bench_node._tiny(Row("a", "decode", "a", 256, 1_000_000, 1000))
    assert (row.batch, row.output_len) == (4, 4) and row.input_len < 4000
