"""Compiling CUDA C++ at run time, its cache, and the guard; without a GPU, and without NVRTC where it is not there."""

from __future__ import annotations

import ctypes
import logging

import pytest

from jaxllm.kernels.cuda import call, rtc

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
