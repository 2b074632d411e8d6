"""After warm-up nothing is compiled or traced, whatever is asked for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest

from jaxllm import LLM, SamplingParams
from tests.tiny_llm import VOCAB, make_llm, prompts

pytestmark = pytest.mark.quick

EVENTS = (
    "/jax/core/compile/backend_compile_duration",
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
_open_counters: list[Counter[str]] = []


def _listen(event: str, duration: float, **_: object) -> None:
    for counter in _open_counters:
        counter[event] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the events that JAX reports while the block runs, in any thread."""
    counter: Counter[str] = Counter()
    _open_counters.append(counter)
    try:
        yield counter
    finally:
        _open_counters.remove(counter)


def test_the_counter_counts() -> None:
    with counting() as seen:
        jax.jit(lambda x: jnp.sin(x) * 3.25 + 1)(jnp.arange(7.0)).block_until_ready()
    assert all(seen[event] > 0 for event in EVENTS), seen
    step = jax.jit(lambda x: x * 1.75)
    step(jnp.ones(3)).block_until_ready()
    x = jnp.zeros(3) + 2.0
    with counting() as seen:
        step(x).block_until_ready()
    assert not any(seen[event] for event in EVENTS), seen


def random_params(rng: random.Random) -> SamplingParams:
    """Any mixture of features that the engine has."""

    def maybe(share: float, *values: object) -> object:
        return rng.choice(values) if rng.random() < share else None

    stop = maybe(0.2, "e", ["th", "an"], ["zq"])
    return SamplingParams(
        max_tokens=rng.randint(1, 12),
        n=rng.choice((1, 1, 1, 1, 2, 3)),
        best_of=maybe(0.05, 3, 4),
        temperature=maybe(0.5, 0.0, 0.5, 1.0, 2.0),
        top_k=maybe(0.2, 1, 5, 100),
        top_p=maybe(0.2, 0.3, 0.9),
        min_p=maybe(0.2, 0.05),
        seed=maybe(0.5, 1, 2**63),
        min_tokens=1 if rng.random() < 0.3 else None,
        repetition_penalty=maybe(0.15, 1.2),
        presence_penalty=maybe(0.15, 0.5),
        frequency_penalty=maybe(0.15, 0.5),
        stop=stop,
        stop_token_ids=maybe(0.2, [5, 6], list(range(100, 120))),
        bad=maybe(0.15, "a", ["th", "on the"]),
        bad_token_ids=maybe(0.1, [7], list(range(3, VOCAB - 20))),
        logit_bias=maybe(0.15, {9: 2.0}, dict.fromkeys(range(VOCAB - 1), 0.5)),
        ignore_eos=rng.random() < 0.5,
        logprobs=maybe(0.25, 0, 3, 20),
        prompt_logprobs=maybe(0.15, 0, 5, 20),
        detokenize=stop is not None or rng.random() < 0.5,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["default", "tight"])
def test_no_compiles_after_warm_up(llm: LLM, kind: str) -> None:
    """500 requests through the default engine; 100 through a pool so small that sequences are preempted."""
    rng = random.Random(4)
    engine = llm if kind == "default" else make_llm(llm.config.tokenizer, kv_tokens=80)
    count = 500 if kind == "default" else 100
    inputs = prompts(count, seed=5, low=1, high=50)
    params = [random_params(rng) for _ in range(count)]
    with counting() as seen:
        results = []
        for i, (prompt, wanted) in enumerate(zip(inputs, params, strict=True)):
            results.append(engine.generate_async(prompt, wanted, streaming=i % 4 == 0))
            if i % 10 == 0:
                rng.choice(results).abort()
        for result in results:
            result.result(timeout=200)
    assert not any(seen[event] for event in EVENTS), seen
    reasons = {completion.finish_reason for result in results for completion in result.outputs}
    assert reasons == {"length", "stop", "cancelled"}
    stats = engine.get_stats()
    assert stats["pages_free"] == stats["pages"]
    if kind == "tight":
        assert stats["preemptions"] > 0
        engine.shutdown()
