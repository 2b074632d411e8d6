"""While an engine runs, the collector of cycles looks at what came after its start, and at nothing else."""

from __future__ import annotations

import gc

import pytest

from jaxllm import LLM
from jaxllm.engine import garbage

pytestmark = pytest.mark.quick


def test_an_engine_sets_aside_what_is_there(llm: LLM) -> None:
    assert garbage.engines() > 0 and gc.get_freeze_count() > 50_000
    gc.collect()
    assert len(gc.get_objects()) < gc.get_freeze_count()


def test_the_last_engine_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_engines", 0)
    was = gc.get_freeze_count()
    garbage.freeze()
    garbage.freeze()
    garbage.unfreeze()
    assert gc.get_freeze_count() >= was and gc.get_freeze_count() > 0 and garbage.engines() == 1
    garbage.unfreeze()
    assert gc.get_freeze_count() == 0 and garbage.engines() == 0
    if was:  # other tests' engines run
        gc.freeze()
