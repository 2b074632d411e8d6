"""The arithmetic of `jaxllm bench pipeline` on made-up schedules, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxllm.bench.pipeline import Timeline, flushed_idle, steady_idle
from jaxllm.cli import main
from tests.tiny_llm import MODEL


def schedule(times: list[float], steps: int, in_flight: int) -> Timeline:
    """What happens when stages take these times and step k needs the tokens of step k - in_flight."""
    line = Timeline([[0.0] * steps for _ in times], [[] for _ in times])
    line.needed = [max(k - in_flight, -1) for k in range(steps)]
    for k in range(steps):
        for stage, seconds in enumerate(times):
            line.done[stage].append(line.starts(stage, k) + seconds)
    return line


@pytest.mark.parametrize(
    ("times", "in_flight"),
    [([1.0, 1.0], 1), ([1.0, 1.0], 2), ([1.0, 3.0], 2), ([1.0, 2.0, 1.0], 2), ([2.0, 1.0, 1.0], 8)],
)
def test_steady_state_is_what_the_formula_says(times: list[float], in_flight: int) -> None:
    line = schedule(times, 400, in_flight)
    assert line.idle(range(100, 300)) == pytest.approx(steady_idle(times, in_flight), abs=0.02)


@pytest.mark.parametrize(("stages", "steps"), [(2, 1), (2, 4), (4, 8)])
def test_an_empty_pipeline_is_what_the_formula_says(stages: int, steps: int) -> None:
    line = schedule([1.0] * stages, steps, steps)
    assert line.idle(range(steps)) == pytest.approx(flushed_idle(stages, steps))


def test_the_command_reports_every_number_of_micro_batches(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.json"
    options = ["--pp=2", "-b=4", "--micro-batches=1,2", "--repeat=1", "--input-len=8", "--output-len=40"]
    assert main(["bench", "pipeline", str(MODEL), *options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["load"], row["in_flight"]) for row in rows] == [
        ("decode", 2), ("prompt", 2), ("decode", 4), ("prompt", 4)
    ]  # fmt: skip
    assert all(0 <= row["idle"] < 1 and len(row["stage_ms"]) == 2 for row in rows)
    assert "micro-batches a stage" in capsys.readouterr().out


def test_without_a_pipeline_there_is_nothing_to_measure(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "pipeline", str(MODEL)]) != 0
    assert "at least 2 stages" in capsys.readouterr().err
