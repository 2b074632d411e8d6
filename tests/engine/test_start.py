"""What an engine does at its start beside loading and compiling."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.engine import devices, start
from jaxllm.engine.pipeline import Stage
from jaxllm.engine.runner import Runner
from jaxllm.engine.sizes import MEMORY_FRACTION
from tests.tiny_llm import make_llm


class Checks:
    def __init__(self, outcome: bool):
        self.outcome = outcome

    def join(self) -> bool:
        return self.outcome


@pytest.mark.parametrize("agreed", [True, False])
def test_programs_with_a_kernel_that_is_wrong_are_made_again(monkeypatch: pytest.MonkeyPatch, agreed: bool) -> None:
    done = []
    compile_all: Callable[..., None] = Runner.compile

    def compiled(runner: Runner, *args: object) -> None:
        done.append("compiled")
        compile_all(runner, *args)

    monkeypatch.setattr(start, "begin_checks", lambda *models: Checks(agreed))
    monkeypatch.setattr(Runner, "compile", compiled)
    monkeypatch.setattr(jax, "clear_caches", lambda: done.append("forgot"))
    with make_llm() as llm:
        assert llm.start_report["checks"] >= 0
    assert done == (["compiled"] if agreed else ["compiled", "forgot", "compiled"])


def test_programs_find_the_memory_of_pages_and_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compilers try out has room where pages will be; what had none beside others is compiled by itself."""
    tried: list[list[jax.ShapeDtypeStruct]] = []
    compile_step: Callable[..., object] = Stage.compile_step

    def crowded(stage: Stage, *args: object) -> object:
        tried.append([pages for pages in stage.kv if isinstance(pages, jax.ShapeDtypeStruct)])
        if len(tried) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.97GiB")
        return compile_step(stage, *args)

    monkeypatch.setattr(Stage, "compile_step", crowded)
    with make_llm() as llm:
        stage, *others = llm._engine._runner.stages
        assert not others and len(tried) == len(stage.programs) + 1
        assert all(len(pages) == len(stage.kv) for pages in tried), "no pages before all programs are there"
        assert all(isinstance(pages, jax.Array) for pages in stage.kv)
        assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2


def test_other_faults_of_compilers_are_final(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stage: Stage, *args: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas")

    monkeypatch.setattr(Stage, "compile_step", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ptxas"), make_llm():
        pass


def test_bytes_of_the_fullest_device() -> None:
    first, second = jax.devices()[:2]
    arrays = {
        "a": jax.device_put(np.zeros((3, 5), np.float32), first),
        "b": jax.device_put(np.zeros(7, np.int8), second),
        "c": jax.device_put(np.zeros(100, np.int8), second),
    }
    assert start._bytes(arrays) == 107
    both = jax.sharding.Mesh(np.array([first, second]), "x")
    arrays["d"] = jax.device_put(np.zeros((2, 64), np.int8), jax.NamedSharding(both, jax.P("x")))
    arrays["e"] = jax.device_put(np.zeros(10, np.int8), jax.NamedSharding(both, jax.P()))
    assert start._bytes(arrays) == 107 + 64 + 10
    assert start._bytes({}) == 0


def test_no_device_is_no_matter_of_the_early_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, lost = [], []

    def none() -> None:
        asked.append(os.environ["XLA_CLIENT_MEM_FRACTION"])
        raise RuntimeError("no device")

    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(threading, "excepthook", lost.append)
    devices.look_early().join(10)
    assert asked == [str(MEMORY_FRACTION)] and not lost
