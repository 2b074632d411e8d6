"""Compiling CUDA C++ at run time, its cache, and the guard; without a GPU, and without NVRTC where it is not there."""

from __future__ import annotations

import ctypes
import logging

import pytest

from jaxllm.kernels.cuda import call, checks, rtc, verdicts
from jaxllm.kernels.cuda.verdicts import Verdicts

KERNEL = """
#include "ptx.cuh"
extern "C" __global__ void scale(const float* x, float* y) { y[threadIdx.x] = FACTOR * x[threadIdx.x]; }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "scale.cu").write_text(KERNEL)
    (tmp_path / "ptx.cuh").write_text((rtc.SOURCES / "ptx.cuh").read_text())
    monkeypatch.setattr(rtc, "SOURCES", tmp_path)
    monkeypatch.setattr(rtc, "_compiled", {})
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setattr(call, "_refused", {})
    monkeypatch.setattr(call, "_warned", False)
    monkeypatch.delenv("JAXLLM_CUDA", raising=False)
    yield
    call.describe_target(None)


def needs_nvrtc() -> None:
    try:
        rtc.version()
    except rtc.CompileError as reason:
        pytest.skip(str(reason))


def test_newer_versions_are_lowered() -> None:
    text = "//\n.version {}\n.target sm_90a\n// .version 9.9\n"
    assert rtc.lower_version(text.format("9.5")) == text.format("8.7")
    assert rtc.lower_version(text.format("8.10")) == text.format("8.7")
    assert rtc.lower_version(text.format("8.4")) == text.format("8.4")


def test_ptx_is_made_once(folder, monkeypatch) -> None:
    made = []

    def compile_(name, source, headers, options):
        made.append(options)
        return ".version 9.0\n.target sm_90a\n"

    monkeypatch.setattr(rtc, "_compile", compile_)
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    first = rtc.compile_ptx("scale", {"FACTOR": 3})
    assert first == ".version 8.7\n.target sm_90a\n"
    rtc.compile_ptx("scale", {"FACTOR": 3})
    rtc._compiled.clear()
    assert rtc.compile_ptx("scale", {"FACTOR": 3}) == first and len(made) == 1  # from disk
    rtc.compile_ptx("scale", {"FACTOR": 4})
    assert len(made) == 2 and "-DFACTOR=4" in made[1]
    for path in (folder / "cache").rglob("*.ptx"):
        path.write_text(path.read_text()[:-3])  # cut short
    rtc._compiled.clear()
    assert rtc.compile_ptx("scale", {"FACTOR": 3}) == first and len(made) == 3
    monkeypatch.setattr(rtc, "version", lambda: (13, 1))
    rtc.compile_ptx("scale", {"FACTOR": 3})
    assert len(made) == 4
    (folder / "ptx.cuh").write_text("// another header")
    rtc.compile_ptx("scale", {"FACTOR": 3})
    assert len(made) == 5


def test_nvrtc(folder) -> None:
    needs_nvrtc()
    ptx = rtc.compile_ptx("scale", {"FACTOR": 3})
    assert ".entry scale" in ptx and ".target sm_90a" in ptx
    with pytest.raises(rtc.CompileError, match=r"refused scale\.cu: .*FACTOR"):
        rtc.compile_ptx("scale", {})


def test_without_nvrtc_there_is_one_warning(guard, monkeypatch, caplog) -> None:
    def missing(name):
        raise OSError(name)

    rtc._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    call.describe_target("9.0")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="libnvrtc was not found"):
                call.require("anything")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    rtc._library.cache_clear()


def test_where_kernels_are_used(guard, monkeypatch, caplog) -> None:
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    with pytest.raises(NotImplementedError, match="no GPU"):
        call.require("anything")
    assert not caplog.records
    call.describe_target("9.0")
    call.require("anything")
    monkeypatch.setenv("JAXLLM_CUDA", "0")
    with pytest.raises(NotImplementedError, match="JAXLLM_CUDA=0"):
        call.require("anything")
    monkeypatch.setenv("JAXLLM_CUDA", "-other,-anything")
    with pytest.raises(NotImplementedError, match="JAXLLM_CUDA=-other"):
        call.require("anything")
    call.require("any")
    monkeypatch.delenv("JAXLLM_CUDA")
    call.describe_target("8.9")
    with pytest.raises(NotImplementedError, match=r"this GPU has 8\.9"):
        call.require("anything")


def test_a_kernel_whose_check_fails_is_turned_off(guard, monkeypatch, caplog) -> None:
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    call.describe_target("9.0")
    ran = []

    def fails():
        raise ArithmeticError("wrong by 3.0")

    call.check_all({"good": lambda: ran.append("good"), "bad": fails})
    assert ran == ["good"]
    call.require("good")
    with pytest.raises(NotImplementedError, match="its check failed: wrong by 3"):
        call.require("bad")
    assert len(caplog.records) == 1 and "'bad'" in caplog.records[0].message


def test_too_much_shared_memory() -> None:
    with pytest.raises(ValueError, match="wants 300000 bytes of shared memory"):
        call.launch("big", "", [], [], grid=(1,), threads=32, shared=300_000)


@pytest.fixture
def gpu(guard, folder, monkeypatch):
    """A driver, an NVRTC and a GPU as far as verdicts look at them."""
    driver = folder / "driver"
    driver.write_text("580.1")
    monkeypatch.setattr(verdicts, "DRIVER", driver)
    monkeypatch.setattr(verdicts, "_sources", lambda: "sources")
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    call.describe_target("9.0")
    return driver


def test_verdicts_hold_for_what_they_were_made_with(gpu, folder, monkeypatch) -> None:
    assert "a" not in Verdicts.read()
    Verdicts.read().add({"a", "b"})
    Verdicts.read().add({"c"})
    assert all(kernel in Verdicts.read() for kernel in "abc") and "d" not in Verdicts.read()
    for name, value in (("_sources", lambda: "others"), ("DRIVER", folder / "scale.cu")):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, name, value)
            assert "a" not in Verdicts.read()
    with monkeypatch.context() as patch:
        patch.setattr(rtc, "version", lambda: (13, 1))
        assert "a" not in Verdicts.read()
    assert "a" in Verdicts.read()
    for path in (folder / "cache" / "cuda").glob("agreed-*"):
        path.write_text(path.read_text() + "\nd")
    assert "a" not in Verdicts.read() and "d" not in Verdicts.read()
    gpu.unlink()  # nobody says what a verdict would hold for
    Verdicts.read().add({"a"})
    gpu.write_text("580.1")
    assert "a" not in Verdicts.read()


def test_sources_of_verdicts(tmp_path, monkeypatch) -> None:
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(rtc, "SOURCES", tmp_path / "cuda")
    found = {verdicts._sources()}
    for name in ("cuda/a.cu", "cuda/b.cuh", "wrapper.py"):
        (tmp_path / name).write_text("one")
        found.add(verdicts._sources())
        (tmp_path / name).write_text("two")
        found.add(verdicts._sources())
    assert len(found) == 7


def test_a_process_checks_what_none_has_checked_before(gpu, monkeypatch) -> None:
    ran: list[str] = []
    wrong: set[str] = set()

    def check(kernel):
        def run():
            ran.append(kernel)
            if kernel in wrong:
                raise ArithmeticError("wrong")

        return run

    def start():
        ran.clear()
        monkeypatch.setattr(checks, "_begun", {})
        monkeypatch.setattr(call, "_refused", {})
        return checks.begin_checks().join()

    monkeypatch.setattr(checks.prefill_cuda, "CHECKS", {"first": check("first"), "second": check("second")})
    monkeypatch.setattr(checks.rows, "is_used", lambda kernel: False)
    products = (checks.linear_cuda, checks.narrow_cuda, checks.wide_cuda, checks.tall_cuda)
    for module in (checks.decode_cuda, checks.rope_write, *products, checks.dense_layer):
        monkeypatch.setattr(module, "check", check(module.KERNEL))
    monkeypatch.setattr(checks.rope_cuda, "check", check(checks.rope_cuda.KERNEL))
    monkeypatch.setattr(checks.narrow_cuda, "check_norms", check(checks.narrow_cuda.NORMS))
    wrong.add("rope_write")
    assert not start() and {"paged_decode", "first", "second", "rope_write"} <= set(ran)
    assert not start() and sorted(ran) == ["rope_write", "second"]
    with pytest.raises(NotImplementedError, match="its check failed: wrong"):
        call.require("rope_write")
    wrong.clear()
    assert start() and sorted(ran) == ["rope_write", "second"]
    assert start() and ran == ["second"]
    assert checks.begin_checks().join() and ran == ["second"]  # once in a process


def test_programs_of_a_start_that_came_later_know_the_outcome(gpu, monkeypatch) -> None:
    monkeypatch.setattr(checks, "_begun", {})
    monkeypatch.setattr(checks, "_check", lambda *wanted: False)
    first = checks.begin_checks()
    assert not first.join()
    assert checks.begin_checks().join()
