"""One running engine for all tests of this directory that do not need a special one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm import LLM
from tests.engine.runs import PROMPTS, run
from tests.tiny_llm import make_llm, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def llm(tokenizer_dir: Path) -> Iterator[LLM]:
    """The default engine: overlap, chunked prefill, prefix cache."""
    with make_llm(tokenizer_dir) as engine:
        yield engine


@pytest.fixture(scope="session")
def wanted(llm: LLM) -> list[list[int]]:
    """The greedy tokens of PROMPTS, one prompt at a time."""
    return [tokens for prompt in PROMPTS for tokens in run(llm, prompt)]
