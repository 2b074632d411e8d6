"""Keys and values in e4m3: what the engine says is that of exact pages but for rounding, on every layout the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.mapping import CpType
from jaxllm.parallel.context import planes
from tests import tiny_llm
from tests.parallel.test_matrix import only_greedy
from tests.tiny_llm import PAGE, make_llm, prompts, tokens_of

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, prompt_logprobs=1)


@cache
def one_device() -> tuple[list[list[int]], list[float]]:
    return answer()


def answer(dtype: str = "fp8", **settings: Any) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of some prompts, and the log probability of each prompt token; the first prompt once more, whose
    pages are in the prefix cache by then."""
    kv = {"tokens_per_block": PAGE, "max_tokens": 512, "dtype": dtype}
    with only_greedy(), make_llm(kv_cache_config=kv, **settings) as llm:
        (stage, *_) = llm._engine._runner.stages
        assert stage.kv[0].dtype == (jnp.float8_e4m3fn if dtype == "fp8" else jnp.float32)
        given = prompts(5, low=9, high=50)
        outputs = llm.generate([*given], PARAMS, use_tqdm=False)
        again = llm.generate(given[:1], SamplingParams(max_tokens=10, ignore_eos=True), use_tqdm=False)
        assert tokens_of(again) == tokens_of(outputs[0])
        found = [
            entry[tokens[i]].logprob
            for output, tokens in zip(outputs, given, strict=True)
            for i, entry in enumerate(output.outputs[0].prompt_logprobs or [])
            if entry
        ]
        return tokens_of(outputs), found


def test_it_is_rounding() -> None:
    (_, exact), (_, found) = answer(dtype="float32"), one_device()
    difference = np.abs(np.asarray(exact) - np.asarray(found))
    assert 0 < difference.mean() < 0.1  # of numbers with a sixteenth of an error each; garbage differs by several


CP = [
    {"context_parallel_size": 2, "cp_config": {"cp_type": kind}} for kind in (CpType.RING, CpType.ULYSSES, CpType.HELIX)
]
slow = [pytest.param(layout, marks=pytest.mark.slow) for layout in ({"pipeline_parallel_size": 2}, *CP[1:])]


@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, CP[0], *slow], ids=str)
def test_layouts(layout: dict[str, Any]) -> None:
    assert answer(**layout)[0] == one_device()[0]


@pytest.mark.slow
def test_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llm, "MODEL", tiny_llm.MODEL.parent / "deepseek_v3")
    (tokens, exact), (split, _) = answer(), answer(tensor_parallel_size=2)
    assert tokens == split
    _, wide = answer("float32")
    assert 0 < np.abs(np.asarray(exact) - np.asarray(wide)).mean() < 0.2


def test_what_is_too_large() -> None:
    large = jnp.asarray([[[1000.0, -1000.0, 3.3]]])
    found = jax.jit(lambda k: planes(k, k, np.dtype(jnp.float8_e4m3fn)))(large)
    np.testing.assert_array_equal(found.astype(jnp.float32)[0, :, 0], [[448, -448, 3.25]] * 2)
