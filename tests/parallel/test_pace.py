"""Launches far ahead of CPU devices: a bounded number is on its way, and no rank waits for one without a thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.engine.devices import THREADS, prepare
from jaxllm.mapping import Mapping
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.pace import LIMIT, Paced, paced

pytestmark = pytest.mark.quick


def sums(tp: int, times: int) -> tuple[Callable[..., Any], jax.Array]:
    """A program of so many sums over tp devices, one after the other, and what it takes."""
    mesh = make_mesh(Mapping(tp=tp))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("tp"), out_specs=PartitionSpec("tp"), check_vma=False)
    def run(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, times, lambda _, x: lax.psum(x, "tp") / tp, x)

    x = jax.device_put(jnp.ones(tp), jax.sharding.NamedSharding(mesh, PartitionSpec("tp")))
    return paced(run.lower(x).compile(), mesh), x


def test_as_many_as_the_limit_are_on_their_way() -> None:
    program, x = sums(2, 500)
    launched = []
    for _ in range(3 * LIMIT):
        launched.append(program(x))
        assert sum(not out.is_ready() for out in launched) <= LIMIT
    assert all((out == 1).all() for out in launched)


def test_ranks_that_wait_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's pool has more threads than there are ranks, if that was said before it was made."""
    devices = len(jax.devices())
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert names.count("tf_XLAEigen") >= THREADS * devices > devices
    monkeypatch.setenv("PJRT_NPROC", "5")
    prepare()
    assert os.environ["PJRT_NPROC"] == "5", "the user knows better"
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=16")
    prepare()
    assert os.environ["PJRT_NPROC"] == str(16 * THREADS)


def test_programs_of_one_device_are_as_they_were() -> None:
    program, x = sums(1, 1)
    assert not isinstance(program, Paced)
    assert (program(x) == 1).all()


def test_the_programs_of_an_engine_are_paced() -> None:
    from tests.tiny_llm import make_llm  # not for the process below

    with make_llm(tensor_parallel_size=2) as llm:
        runner = llm._engine._runner
        programs = [*runner._programs.values(), *runner.stages[0].programs.values()]
        assert programs and all(isinstance(program, Paced) for program in programs)
        assert runner.scratch_bytes() > 0


LAUNCHES = """
import sys
sys.path[:0] = {paths}
import jax
jax.config.update("jax_num_cpu_devices", {devices})
from tests.parallel.test_pace import sums
program, x = sums({devices}, 10)
for _ in range(2):
    for _ in range(100):
        out = program(x)
    out.block_until_ready()
"""


@pytest.mark.timeout(100)
def test_no_rank_waits_for_one_that_has_no_thread() -> None:
    """In a process of its own, with as many devices as the runtime has threads: XLA ends one that is stuck."""
    script = LAUNCHES.format(paths=sys.path, devices=max(2, os.cpu_count() or 1))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
