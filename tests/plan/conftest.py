"""Plans are those of a machine where nobody has set XLA's share of the memory."""

import pytest


@pytest.fixture(autouse=True)
def default_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
