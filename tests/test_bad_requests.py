"""Every kind of bad request gets its own one-line error: the value, the rule, the way out. Only that request fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import jaxllm.llm
from jaxllm import LLM, SamplingParams
from tests.one_line import check_message, cli
from tests.tiny_llm import MAX_SEQ_LEN, MODEL, make_llm, make_tokenizer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with make_llm(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as engine:
        yield engine


BAD_PROMPTS: list[tuple[Any, tuple[str, ...]]] = [
    ("", ("prompt is empty", "at least one")),
    ([[]], ("prompt is empty", "at least one token")),
    ({"prompt_token_ids": []}, ("prompt is empty", "at least one token")),
    ([[5] * MAX_SEQ_LEN], ("prompt has 64 tokens", "max_seq_len 64", "shorten it or raise")),
    ({"prompt_token_ids": [5] * 500}, ("prompt has 500 tokens", "shorten it")),
    ([[5, 203]], ("prompt token 203", "vocabulary", r"0\.\.202")),
    ([[5, -1]], ("prompt token -1", r"0\.\.202")),
    (b"abc", ("prompt b'abc' must be a str",)),
    ({"text": "a"}, ("unknown key in a prompt 'text'",)),
]


@pytest.mark.parametrize(("prompt", "parts"), BAD_PROMPTS, ids=lambda value: str(value)[:30])
def test_bad_prompt(llm: LLM, prompt: Any, parts: tuple[str, ...]) -> None:
    one = prompt[0] if isinstance(prompt, list) else prompt
    single = {"prompt_token_ids": one} if isinstance(one, list) else one
    with pytest.raises(ValueError) as caught:
        llm.generate(single, SamplingParams(max_tokens=2), use_tqdm=False)
    check_message(str(caught.value), *parts)
    with pytest.raises(ValueError) as caught:
        llm.generate_async(single, SamplingParams(max_tokens=2))
    check_message(str(caught.value), *parts)


def test_only_the_bad_requests_fail(llm: LLM) -> None:
    good = SamplingParams(max_tokens=4, ignore_eos=True)
    wanted = llm.generate("hello", good, use_tqdm=False).outputs[0].token_ids
    bad = [prompt[0] if isinstance(prompt, list) else prompt for prompt, _ in BAD_PROMPTS]
    inputs: list[Any] = []
    for prompt in bad:
        inputs += ["hello", prompt]
    params = [good] * len(inputs)
    inputs += ["hello", "hello"]
    params += [SamplingParams(max_tokens=4, bad_token_ids=[203]), good]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    for output in [*outputs[:-2:2], outputs[-1]]:
        assert output.error is None and output.outputs[0].token_ids == wanted
    for output, (_, parts) in zip(outputs[1:-2:2], BAD_PROMPTS, strict=True):
        assert output.outputs[0].finish_reason == "error"
        check_message(str(output.error), *parts)
    check_message(str(outputs[-2].error), "bad_token_ids names token 203", r"0\.\.202")
    stats = llm.get_stats()
    assert stats["pages_free"] == stats["pages"]


BAD_PARAMS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"max_tokens": 0}, ("max_tokens=0", ">= 1")),
    ({"max_tokens": -3}, ("max_tokens=-3", ">= 1")),
    ({"max_tokens": 2.5}, (r"max_tokens=2\.5", "integer")),
    ({"temperature": float("nan")}, ("temperature=nan", "finite", "0")),
    ({"temperature": float("inf")}, ("temperature=inf", "finite", "0")),
    ({"temperature": -0.1}, (r"temperature=-0\.1", "0")),
    ({"top_p": 0}, ("top_p=0", "0", "1")),
    ({"top_p": 0.0}, (r"top_p=0\.0", "1")),
    ({"top_p": 1.5}, (r"top_p=1\.5", "1")),
    ({"top_p": float("nan")}, ("top_p=nan",)),
    ({"n": 0}, ("n=0", r"1\.\.16384")),
    ({"max_new_tokens": 5}, ("'max_new_tokens'", "did you mean 'max_tokens'")),
    ({"temprature": 1}, ("'temprature'", "did you mean 'temperature'")),
    ({"use_beam_search": True}, ("beam search is not supported", "instead")),
    ({"logprobs": 21}, ("logprobs=21", r"0\.\.20")),
]


@pytest.mark.parametrize(("values", "parts"), BAD_PARAMS, ids=str)
def test_bad_sampling_params(llm: LLM, values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**values)
    check_message(str(caught.value), *parts)
    (name, value), *_ = values.items()
    if name in SamplingParams.__dataclass_fields__:
        # changed after it was made: refused by generate, and in a batch for this request only
        params = SamplingParams(max_tokens=3)
        setattr(params, name, value)
        with pytest.raises(ValueError) as caught:
            llm.generate("hello", params, use_tqdm=False)
        check_message(str(caught.value), *parts)
        bad, good = llm.generate(["hello"] * 2, [params, SamplingParams(max_tokens=3)], use_tqdm=False)
        check_message(str(bad.error), *parts)
        assert good.error is None and good.outputs[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"cache_salt": 5}, ("cache_salt 5", "valid Unicode", "leave it out")),
        ({"cache_salt": "a\ud800"}, (r"cache_salt 'a\\ud800'", "valid Unicode")),
        ({"priority": 10**400}, ("priority 1000", "finite")),
        ({"priority": "high"}, ("priority = 'high'", "number")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_beside_the_prompt(llm: LLM, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    """They are refused where they are given: the engine's thread, which names pages by the salt, goes on."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for call in (llm.generate, llm.generate_async):
        with pytest.raises(ValueError) as caught:
            call("a prompt of more than a page", params, **arguments)
        check_message(str(caught.value), *parts)
    assert llm.generate("hello", params, use_tqdm=False, cache_salt="pepper").outputs[0].length == 8


@pytest.mark.parametrize("value", [1e39, -1e39, 1e300, 1e-300])
def test_penalties_beyond_float32_are_as_strong_as_they_can_be(llm: LLM, value: float) -> None:
    """An infinite penalty on what was not said would be no number, and every token the first of the vocabulary."""
    common = {"max_tokens": 12, "ignore_eos": True}
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        if name == "repetition_penalty":
            value = abs(value)
        bounded = min(max(value, -1e30), 1e30) if name != "repetition_penalty" else min(max(value, 1e-30), 1e30)
        many = [SamplingParams(**common, **{name: penalty}) for penalty in (value, bounded)]
        extreme, strong = (o.outputs[0].token_ids for o in llm.generate(["hello"] * 2, many, use_tqdm=False))
        assert extreme == strong and set(extreme) != {0}
    biased = SamplingParams(**common, temperature=1.0, seed=1, logit_bias={7: 1e300, 9: 1e300})
    assert set(llm.generate("hello", biased, use_tqdm=False).outputs[0].token_ids) == {7, 9}


def test_what_needs_the_tokenizer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._engine, "tokenizer", None)
    for prompt, params in (("hello", None), ([5], SamplingParams(stop="x"))):
        with pytest.raises(ValueError) as caught:
            llm.generate(prompt, params, use_tqdm=False)
        check_message(str(caught.value), "no(ne| tokenizer)", "skip_tokenizer_init=True", "token ids|stop_token_ids")


class Borrowed:
    """The running engine for a command that would start and stop its own."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm._engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([""], ("prompt is empty", "at least one character")),
        (["z" * 100], ("prompt has 100 tokens", "shorten it or raise")),
        (["hi", "--max-tokens", "0"], ("max_tokens=0", ">= 1")),
        (["hi", "-n", "-1"], ("max_tokens=-1", ">= 1")),
        (["hi", "--temperature", "nan"], ("temperature=nan", "finite")),
        (["hi", "--temperature", "inf"], ("temperature=inf", "finite")),
        (["hi", "--top-p", "0"], (r"top_p=0\.0", "1")),
        (["hi", "--top-q", "0"], ("--top-q", "did you mean --top-[pk]")),
        ([], ("no prompt", "--file")),
    ],
    ids=str,
)
def test_bad_request_on_the_command_line(
    llm: LLM,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(jaxllm.llm, "_start_engine", lambda config: Borrowed(llm))
    check_message(cli(capsys, "generate", MODEL, *arguments), *parts)
