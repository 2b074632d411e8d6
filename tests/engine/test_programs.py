"""Programs on disk: an engine that finds them traces nothing, and gives the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm import SamplingParams
from jaxllm.engine import programs
from jaxllm.engine.pipeline import Stage
from jaxllm.engine.programs import Programs
from jaxllm.engine.runner import Runner
from tests.tiny_llm import make_llm, prompts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    return tmp_path / "programs"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled from a trace."""
    made: list[str] = []
    methods = [(Stage, "compile_step")]
    methods += [(Runner, name) for name in vars(Runner) if name.startswith("_compile")]
    for owner, name in methods:

        def compiled(self: object, *args: object, method: object = getattr(owner, name), name: str = name) -> object:
            made.append(name)
            return method(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, compiled)
    return made


def tokens() -> list[list[int]]:
    params = [SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, temperature=0.8, seed=1, logprobs=2)] * 3
    with make_llm(keep_programs=True) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts(6), params, use_tqdm=False)]


def test_a_start_that_finds_its_programs_traces_nothing(folder: Path, traced: list[str]) -> None:
    first = tokens()
    assert {"compile_step", "_compile_sampler", "_compile_reset"} <= set(traced)
    (kept,) = folder.iterdir()
    files = sorted(kept.iterdir())
    assert len(files) >= 12 and all(path.suffix == ".program" for path in files)
    traced.clear()
    assert tokens() == first and not traced
    files[0].write_bytes(files[0].read_bytes()[:-1])  # cut short
    assert tokens() == first and len(traced) == 1
    assert sorted(kept.iterdir()) == files


def test_programs_are_for_what_they_were_made_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def where(*parts: object) -> Path:
        return Programs.made_from(parts, [])._folder

    base = where("a", 1)
    assert base == where("a", 1) and base.parent == folder
    found = {base, where("a", 2), where("a"), where("a1")}
    for name, value in (("XLA_FLAGS", "--xla_x=1"), ("JAXLLM_CUDA", "0"), ("NVIDIA_TF32_OVERRIDE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            found.add(where("a", 1))
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_sources", lambda: "others")
        found.add(where("a", 1))
    with monkeypatch.context() as patch:
        patch.setattr(programs, "DRIVER", Path(__file__))
        found.add(where("a", 1))
    assert len(found) == 9
    monkeypatch.setenv("HOME", "/elsewhere")
    assert where("a", 1) == base
    assert where(where) == where(where) and " at 0x" in repr(where)


def test_the_last_combinations_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "KEPT", 2)
    monkeypatch.setattr(programs, "_sources", lambda: "")
    monkeypatch.setattr(programs.os, "utime", lambda path: None)
    for number in range(3):
        Programs.made_from([number], []).save({})
    assert len(list(folder.iterdir())) == 2
