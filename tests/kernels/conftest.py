"""Kernels without a GPU."""

import pytest

from tests.kernels.emulator.launches import Launches


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Launches go to the emulator."""
    return Launches(monkeypatch)
