"""Random loads: the lengths that were asked for, the same in all repetitions; what prompts share and what not."""

from __future__ import annotations

import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench.load import SHAREGPT_INPUT, SHAREGPT_OUTPUT, Lengths, Load, random_load
from jaxllm.bench.runners import JaxllmRunner
from jaxllm.config import EngineConfig, KvCacheConfig
from jaxllm.settings import ConfigError
from tests.tiny_llm import MAX_SEQ_LEN, MODEL, PAGE, SLOTS

pytestmark = pytest.mark.quick


def test_lengths() -> None:
    rng = random.Random(0)
    assert {Lengths.parse("3:5", "--input-len").draw(rng) for _ in range(100)} == {3, 4, 5}
    assert Lengths.parse("7", "--input-len").draw(rng) == 7
    for text in ("0", "5:4", "a", "sharegpt:4", ""):
        with pytest.raises(ConfigError, match=r"--output-len = .* must be a number above 0, two as LOW:HIGH"):
            Lengths.parse(text, "--output-len")


def test_as_long_as_conversations() -> None:
    rng = random.Random(0)
    for name, wanted, mean in (("--input-len", SHAREGPT_INPUT, 215), ("--output-len", SHAREGPT_OUTPUT, 198)):
        lengths = Lengths.parse("sharegpt", name)
        assert lengths == wanted
        drawn = [lengths.draw(rng) for _ in range(20_000)]
        assert min(drawn) == 4 and max(drawn) == 1024
        assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.04)
        assert statistics.median(drawn) == pytest.approx(lengths.median, rel=0.04)


def test_repetitions_have_the_same_lengths_and_share_the_prefix_alone() -> None:
    arguments = (6, Lengths(3, 9), Lengths(1, 20), 1000, 5)
    first, second = (random_load(*arguments, run, prefix_len=40) for run in (0, 1))
    assert first.output_lens == second.output_lens and list(map(len, first.prompts)) == list(map(len, second.prompts))
    assert len({tuple(prompt[:40]) for prompt in first.prompts + second.prompts}) == 1
    assert len({tuple(prompt[40:]) for prompt in first.prompts + second.prompts}) == 12
    assert [prompt[40:] for prompt in first.prompts] == random_load(*arguments, 0).prompts


def test_random_weights_need_no_tokenizer(tmp_path: Path) -> None:
    """A directory with nothing but a config.json can be measured."""
    shutil.copy(MODEL / "config.json", tmp_path)
    pages = KvCacheConfig(tokens_per_block=PAGE, max_tokens=512)
    sizes: dict[str, Any] = {"max_batch_size": SLOTS, "max_num_tokens": 32, "max_seq_len": MAX_SEQ_LEN}
    buckets: dict[str, Any] = {"batch_buckets": [SLOTS], "token_buckets": [32]}
    runner = JaxllmRunner(
        EngineConfig(
            model=str(tmp_path), load_format="dummy", dtype="float32", kv_cache_config=pages, **sizes, **buckets
        )
    )
    try:
        run = runner.run(Load([[3, 4, 5], [6, 7]], [4, 2]))
    finally:
        runner.close()
    assert [len(tokens) for tokens in run.tokens] == [4, 2]
