"""While an engine runs, the collector of cycles looks at what is new alone, and threads take short turns."""

from __future__ import annotations

import gc
import sys

import pytest

from jaxllm import LLM
from jaxllm.engine import interpreter

pytestmark = pytest.mark.quick


def test_an_engine_sets_aside_what_is_there(llm: LLM) -> None:
    assert interpreter.engines() > 0 and gc.get_freeze_count() > 50_000
    gc.collect()
    assert len(gc.get_objects()) < gc.get_freeze_count()
    assert sys.getswitchinterval() == pytest.approx(interpreter.SWITCH_SECONDS)


@pytest.mark.parametrize("interval", [5e-3, 2.5e-4])
def test_the_last_engine_gives_it_back(monkeypatch: pytest.MonkeyPatch, interval: float) -> None:
    monkeypatch.setattr(interpreter, "_engines", 0)
    monkeypatch.setattr(interpreter, "_interval", 0.0)
    was, before = gc.get_freeze_count(), sys.getswitchinterval()
    try:
        sys.setswitchinterval(interval)
        interpreter.hold()
        interpreter.hold()
        interpreter.release()
        assert gc.get_freeze_count() >= was and gc.get_freeze_count() > 0 and interpreter.engines() == 1
        assert sys.getswitchinterval() == pytest.approx(min(interval, interpreter.SWITCH_SECONDS))
        interpreter.release()
        assert gc.get_freeze_count() == 0 and interpreter.engines() == 0
        assert sys.getswitchinterval() == pytest.approx(interval)
    finally:
        sys.setswitchinterval(before)
        if was:  # other tests' engines run
            gc.freeze()
