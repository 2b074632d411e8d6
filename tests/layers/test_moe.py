"""The router, against loops in NumPy; and which rows of a step get experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import LLM, SamplingParams
from jaxllm.kernels.grouped_matmul import api
from jaxllm.layers.moe import Router, top
from jaxllm.parallel.params import ParamSpec, Segment

T, D, E, X = 40, 6, 12, 4


def spec(*shape: int) -> ParamSpec:
    return ParamSpec(shape, np.dtype(np.float32), (None,) * len(shape), (Segment("w", 0, shape[0]),))


def test_top_takes_the_lowest_of_equals() -> None:
    values = np.array([[0.5, 0.9, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0]], np.float32)
    found, places = top(jnp.asarray(values), 3)
    assert places.tolist() == [[1, 2, 0], [0, 1, 2]]
    np.testing.assert_array_equal(found, np.take_along_axis(values, np.asarray(places), 1))


def route(scores: np.ndarray, bias: np.ndarray, groups: int, groups_chosen: int, best: int) -> list[int]:
    """The experts of one token."""
    choice = scores + bias
    size = E // groups
    of_group = [np.sort(choice[g * size : (g + 1) * size])[-best:].sum() for g in range(groups)]
    open_groups = np.argsort(of_group)[-groups_chosen:] if groups > 1 else range(groups)
    open_experts = [e for e in range(E) if e // size in open_groups]
    return sorted(open_experts, key=lambda e: -choice[e])[:X]


@pytest.mark.parametrize(("groups", "groups_chosen"), [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("with_bias", "best"), [(False, 1), (True, 2)])
def test_router(groups: int, groups_chosen: int, sigmoid: bool, with_bias: bool, best: int) -> None:
    rng = np.random.default_rng(groups)
    x, weight = rng.standard_normal((T, D), np.float32), rng.standard_normal((E, D), np.float32)
    bias = rng.standard_normal(E).astype(np.float32) if with_bias else np.zeros(E, np.float32)

    @jax.jit
    def run(x):
        router = Router(
            spec(E, D),
            spec(E) if with_bias else None,
            chosen=X,
            normalise=True,
            sigmoid=sigmoid,
            groups=groups,
            groups_chosen=groups_chosen,
            group_best=best,
            scale=2.5,
        )
        nnx.update(router, {"weight": jnp.asarray(weight), **({"bias": jnp.asarray(bias)} if with_bias else {})})
        return router(x)

    chosen, weights = map(np.asarray, run(x))
    logits = x @ weight.T
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for t in range(T):
        wanted = route(scores[t], bias, groups, groups_chosen, best)
        assert chosen[t].tolist() == wanted
        # the bias chooses, it does not weigh
        np.testing.assert_allclose(weights[t], 2.5 * scores[t][wanted] / scores[t][wanted].sum(), rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"tensor_parallel_size": 2, "enable_attention_dp": True}, marks=pytest.mark.slow)],
    ids=["one rank", "two lanes"],
)
def test_padding_of_prompts_gets_no_experts(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of 5 tokens fills a small part of its step, whose other rows are all alike."""
    real, rows = api.experts, []

    def experts(x_TD: jax.Array, chosen_TX: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        jax.debug.callback(lambda chosen: rows.append((len(chosen), int((chosen >= 0).any(axis=1).sum()))), chosen_TX)
        return real(x_TD, chosen_TX, *args, **kwargs)

    monkeypatch.setattr(api, "experts", experts)
    with LLM(
        Path(__file__).parents[1] / "golden" / "mixtral",
        skip_tokenizer_init=True,
        dtype="float32",
        progress=False,
        max_batch_size=2,
        max_num_tokens=32,
        max_seq_len=64,
        batch_buckets=[2],
        token_buckets=[32],
        kv_cache_config={"tokens_per_block": 4, "max_tokens": 256},
        **settings,
    ) as llm:
        llm.generate([[3, 4, 5, 6, 7]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        jax.effects_barrier()
    ranks = settings.get("tensor_parallel_size", 1)
    in_prompt = [found for size, found in rows if size >= 32]
    assert in_prompt == [5] * 2 * ranks, rows
