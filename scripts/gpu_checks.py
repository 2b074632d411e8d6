"""Comparisons on a GPU with what is known to be right, in parts side by side: most of their time is compilation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
KERNELS = "scripts/bench_kernels.py"
AT_START = """
import os, sys
os.environ["JAXLLM_CACHE"] = sys.argv[1]  # with no verdicts of before
from jaxllm.kernels.cuda import call, checks
call.require("")
sys.exit(not checks.begin_checks(quantized=True, latent=True, experts=True).join())
"""
"""The checks of a start, of all kernels that an engine may use."""
TESTS = {
    "correct-golden": ["tests/golden/test_golden.py", "-k", "test_logits and not sharded and not live"],
    "correct-smollm2": ["tests/golden/test_smollm2.py", "-k", "batched and (greedy or text)"],
}
NAMES = ("correct-kernels", *TESTS)
THREADS_A_PART, MOST_PARTS = 3, 8
"""CPU threads that a part is expected to keep busy, and parts at once: each has a context of its own on the GPU."""


@dataclass(frozen=True, slots=True)
class Done:
    """A part that ended: its exit status, None where it was stopped for time, and what it printed."""

    status: int | None
    said: str


def check(name: str, seconds: float) -> dict[str, Any]:
    """Run the parts of the check `name`, one of NAMES, for at most so long.

    Returns its exit_status (0: all parts passed; None: time ended a part), how many tests had which outcome, and the
    end of what the parts that did not pass have said.
    """
    began = time.perf_counter()
    environment = dict(os.environ) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if name in TESTS:  # products of float32 must not be rounded to TF32
        environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"}
    workers = max(1, min(MOST_PARTS, (os.cpu_count() or 1) // THREADS_A_PART))
    with tempfile.TemporaryDirectory(prefix="jaxllm-check-") as scratch:
        try:
            commands = parts_of_kernels(Path(scratch)) if name not in TESTS else parts_of_tests(TESTS[name], workers)
        except RuntimeError as error:
            return {"exit_status": 1, "said": str(error), "seconds": time.perf_counter() - began}
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(lambda command: run(command, environment, began + seconds), commands))
    return summary(done) | {"parts": len(commands), "seconds": time.perf_counter() - began}


def parts_of_kernels(scratch: Path) -> list[list[str]]:
    """What engines check at their start, and the rows that compare, by family; those with most to compile first."""
    folder = ROOT / "scripts" / "kernel_rows"
    families = sorted(folder.glob("[a-z]*.py"), key=lambda path: -path.stat().st_size)
    rows = [KERNELS, "--rows", "right", "--seconds", "3600"]
    own = [[*rows, "--only", path.stem, "--json", str(scratch / f"{path.stem}.json")] for path in families]
    return [["-c", AT_START, str(scratch / "cache")], *own]


def parts_of_tests(arguments: Sequence[str], count: int) -> list[list[str]]:
    """The tests that are not slow, dealt out to at most `count` parts. Raises RuntimeError if there are none."""
    collect = [sys.executable, *PYTEST, "-m", "not slow", "--collect-only", *arguments]
    found = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=120)
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"no tests found: {(found.stdout + found.stderr)[-300:]}")
    return [[*PYTEST, *tests[i::count]] for i in range(min(count, len(tests)))]


def run(arguments: Sequence[str], environment: dict[str, str], deadline: float) -> Done:
    """One part, until a time of time.perf_counter()."""
    left = deadline - time.perf_counter()
    if left <= 0:
        return Done(None, "no time was left for it")
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return Done(None, (said.decode(errors="replace") if isinstance(said, bytes) else said) + "it took too long")
    return Done(done.returncode, done.stdout + done.stderr)


def summary(parts: Sequence[Done]) -> dict[str, Any]:
    """What parts say together: a failure wins over what took too long, and both over success."""
    failed = [part.status for part in parts if part.status]
    late = any(part.status is None for part in parts)
    counts: dict[str, int] = {}
    for part in parts:
        for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", part.said):
            counts[what] = counts.get(what, 0) + int(count)
    said = "\n".join(part.said[-600:] for part in parts if part.status != 0)
    return {"exit_status": failed[0] if failed else None if late else 0, **counts, "said": said[-2000:]}
