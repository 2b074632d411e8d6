"""A trace of real programs, and what is read from it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.bench.profile import Kernel, kernels, record, table


def test_the_kernels_of_a_trace(tmp_path: Path) -> None:
    step = jax.jit(lambda x: jnp.sin(x @ x).sum())
    x = jnp.ones((400, 400))
    step(x)

    def run() -> None:
        for _ in range(7):
            step(x).block_until_ready()

    found = record(tmp_path, run)
    assert found == kernels(tmp_path)
    assert found[0].calls >= 7 and found[0].milliseconds > 0
    assert found == sorted(found, key=lambda k: -k.milliseconds)
    assert not [k for k in found if "::" in k.name or k.name.startswith("end")]
    # the product is the longest of them
    assert "fusion" in found[0].name or "dot" in found[0].name
    assert found[0].name in table(found)


def test_a_directory_without_a_trace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        kernels(tmp_path)


def test_the_table_adds_up() -> None:
    text = table([Kernel("a", 2, 6.0), Kernel("b", 1, 3.0), Kernel("c", 1, 1.0)], count=1)
    assert "60.0 %" in text and "3000.0" in text
    assert text.splitlines()[-1].split()[-2:] == ["40.0", "%"]
