"""Building native kernels: without a compiler, with a full cache, and with a broken one."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.kernels.linear import api
from jaxllm.kernels.native import build
from jaxllm.kernels.paged_attention import cpu as attention_cpu

has_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in build.COMPILERS), reason="there is no C++ compiler"
)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has built nothing yet, with an empty cache."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("JAXLLM_NATIVE", raising=False)
    monkeypatch.setattr(build, "_usable", {})
    monkeypatch.setattr(build, "_warned", False)
    return tmp_path / "native"


def works() -> bool:
    x, weight = np.ones((3, 40), np.float32), np.ones((20, 40), np.float32)
    return bool((np.asarray(api.matmul(x, weight)) == 40).all())


def test_no_compiler_means_xla_and_one_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert works() and works()
        assert not build.available("paged_attention", attention_cpu.check)
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text


@pytest.mark.parametrize("script", ["echo 'x.cc:1: error: no' >&2; exit 1", "sleep 30"])
def test_a_compiler_that_fails_or_hangs(
    fresh: Path, script: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fake = tmp_path / "fake-c++"
    fake.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr(build, "TIMEOUT_S", 2)
    with caplog.at_level(logging.WARNING):
        assert works()
    assert len(caplog.records) == 1
    assert "error: no" in caplog.text or "took longer than 2 s" in caplog.text
    assert list(fresh.iterdir()) == []


def test_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("JAXLLM_NATIVE", "0")
    assert works()
    assert not caplog.records and not fresh.exists()


def test_another_backend_never_builds(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert works()
    assert not fresh.exists()


@has_compiler
def test_a_wrong_kernel_is_not_used(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Another test may have registered this target from another file, which JAX refuses to replace.
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **options: None)

    def check(target: str) -> None:
        raise ArithmeticError("wrong by 1")

    with caplog.at_level(logging.WARNING):
        assert not build.available("linear", check)
        assert works()
    assert "wrong by 1" in caplog.text and len(caplog.records) == 1


@has_compiler
def test_cache_is_reused_and_a_broken_file_is_replaced(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load("linear")
    path = build.library_path("linear")
    before = path.stat().st_mtime_ns
    assert sorted(p.name for p in fresh.iterdir()) == sorted([path.name, path.with_suffix(".sha256").name])

    runs = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: runs.append(a) or real(*a, **k))
    build.load("linear")
    assert not runs and path.stat().st_mtime_ns == before

    # Written to a new file, as a copy cut short would be: the loaded library is mapped from the old one.
    cut = path.read_bytes()[:5000]
    path.unlink()
    path.write_bytes(cut)
    assert hasattr(build.load("linear"), "jaxllm_linear")
    assert len(runs) == 1 and path.stat().st_size > 5000

    path.with_suffix(".sha256").unlink()
    build.load("linear")
    assert len(runs) == 2


@has_compiler
def test_name_of_the_library_follows_what_it_depends_on(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.library_path("linear"), build.library_path("paged_attention")}
    monkeypatch.setattr(build.jaxlib, "__version__", "0.0")
    names.add(build.library_path("linear"))
    monkeypatch.setattr(build, "_cpu_flags", lambda: "another CPU")
    names.add(build.library_path("linear"))
    assert len(names) == 4
