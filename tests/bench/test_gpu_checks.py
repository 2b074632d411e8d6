"""The parts of scripts/gpu_checks.py are the whole, and one that fails or hangs is heard of in time."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_checks
from gpu_checks import ROOT, Done


def test_every_test_is_in_one_part() -> None:
    parts = gpu_checks.parts_of_tests(["tests/bench/test_gpu_checks.py"], 3)
    tests = [argument for part in parts for argument in part if "::" in argument]
    names = {name for name in globals() if name.startswith("test_")}
    assert len(parts) == 3 and len(tests) == len(set(tests))
    assert {test.split("::")[1] for test in tests} == names
    with pytest.raises(RuntimeError, match="no tests found"):
        gpu_checks.parts_of_tests(["tests/bench/test_gpu_checks.py", "-k", "absent"], 3)


def test_every_family_is_a_part(tmp_path: Path) -> None:
    start, *parts = gpu_checks.parts_of_kernels(tmp_path)
    families = {part[part.index("--only") + 1] for part in parts}
    assert families == {path.stem for path in (ROOT / "scripts" / "kernel_rows").glob("[a-z]*.py")} > {"mla", "moe"}
    for family in families - {"all_reduce"}:  # which takes two GPUs
        rows = importlib.import_module(f"kernel_rows.{family}").rows()
        assert any("right" in row.name for row in rows), f"nothing compares the kernels of {family}"
    refused = gpu_checks.run(start, dict(os.environ) | {"JAX_PLATFORMS": "cpu"}, time.perf_counter() + 60)
    assert refused.status == 1 and "no GPU" in refused.said, "a machine without a GPU has no kernels that are right"


def test_a_part_that_hangs_ends() -> None:
    began = time.perf_counter()
    hangs = ["-c", "import time; print('began', flush=True); time.sleep(60)"]
    done = gpu_checks.run(hangs, dict(os.environ), began + 2)
    assert done.status is None and done.said.startswith("began") and time.perf_counter() - began < 20
    assert gpu_checks.run(hangs, dict(os.environ), began) == Done(None, "no time was left for it")


def test_a_failure_wins() -> None:
    passed, failed, late = (
        Done(0, "3 passed, 2 skipped in 1 s"),
        Done(1, "a line\n1 failed, 2 passed in 1 s"),
        Done(None, "x"),
    )
    assert gpu_checks.summary([passed, passed]) == {"exit_status": 0, "passed": 6, "skipped": 4, "said": ""}
    assert gpu_checks.summary([passed, late])["exit_status"] is None
    found = gpu_checks.summary([passed, late, failed])
    assert found["exit_status"] == 1 and found["failed"] == 1 and found["passed"] == 5 and "a line" in found["said"]
