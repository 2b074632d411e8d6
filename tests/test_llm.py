"""The Python API against a fake engine: results, streaming, errors, and who does the work in which thread."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

import jaxllm.llm
import jaxllm.requests
from jaxllm import LLM, SamplingParams
from jaxllm.settings import ConfigError
from tests.fake_engine import FakeDecoder, FakeEngine


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(jaxllm.llm, "_start_engine", FakeEngine)
    monkeypatch.setattr(jaxllm.requests, "_decoder_maker", lambda tokenizer, params: lambda: FakeDecoder(tokenizer))
    with LLM("fake") as llm:
        yield llm


def generate(llm, inputs, params=None, **kwargs):
    return llm.generate(inputs, params or SamplingParams(max_tokens=3), use_tqdm=False, **kwargs)


def test_one_prompt_gives_one_output(llm):
    output = generate(llm, "abc")
    assert output.outputs[0].text == "def"
    assert output.outputs[0].token_ids == list(b"def")
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].length == 3
    assert output.prompt == "abc" and output.prompt_token_ids == list(b"abc")
    assert output.finished and output.error is None


@pytest.mark.parametrize("prompt", [list(b"abc"), {"prompt": "abc"}, {"prompt_token_ids": list(b"abc")}, tuple(b"abc")])
def test_every_form_of_prompt(llm, prompt):
    assert generate(llm, prompt).outputs[0].text == "def"
    assert [output.outputs[0].text for output in generate(llm, [prompt, "x"])] == ["def", "yz{"]


def test_numpy_tokens(llm):
    numpy = pytest.importorskip("numpy")
    assert generate(llm, numpy.array(list(b"abc"))).outputs[0].text == "def"


def test_empty_batch(llm):
    assert generate(llm, []) == []


def test_params_for_each_prompt(llm):
    outputs = generate(llm, ["a", "b"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [output.outputs[0].text for output in outputs] == ["b", "cd"]
    with pytest.raises(ValueError, match="3 sampling_params for 2 prompts"):
        generate(llm, ["a", "b"], [SamplingParams()] * 3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([[]], None),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"promt": "a"}, "did you mean 'prompt'"),
        ({}, "must be a str"),
        (None, "must be a str"),
        (7, "must be a str"),
        ([1, 2.5], "2.5 must be an integer"),
        ([1, 999], "999 is not in the vocabulary"),
        ([1, -1], "-1 is not in the vocabulary"),
        ("x" * 300, "300 tokens"),
    ],
)
def test_bad_prompt(llm, prompt, message):
    if message is not None:
        with pytest.raises(ValueError, match=message) as caught:
            generate(llm, prompt)
        assert "\n" not in str(caught.value)
    bad = prompt[0] if message is None else prompt
    good, failed, last = generate(llm, ["abc", bad, "abc"])
    assert good.outputs[0].text == last.outputs[0].text == "def"
    assert failed.error is not None and failed.outputs[0].finish_reason == "error" and failed.finished
    assert failed.outputs[0].token_ids == []


def test_bad_params_changed_after_construction(llm):
    params = SamplingParams(max_tokens=3)
    params.max_tokens = 0
    with pytest.raises(ValueError, match="max_tokens"):
        generate(llm, "a", params)
    with pytest.raises(ValueError, match="must be a SamplingParams"):
        generate(llm, "a", {"max_tokens": 3})


def test_engine_error_is_raised(llm):
    with pytest.raises(RuntimeError, match="broke on this request"):
        generate(llm, "a!")
    with pytest.raises(RuntimeError, match="broke on this request"):
        generate(llm, ["a", "a!"])


def test_stop_token_is_left_out_of_the_text(llm):
    params = SamplingParams(max_tokens=9, stop_token_ids=[ord("f")])
    output = generate(llm, "abc", params).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("de", "stop", ord("f"))
    assert output.token_ids == list(b"def")
    params.include_stop_str_in_output = True
    assert generate(llm, "abc", params).outputs[0].text == "def"


def test_echo_truncation_and_no_text(llm):
    assert (
        generate(llm, "abc", SamplingParams(max_tokens=2, exclude_input_from_output=False)).outputs[0].text == "abcde"
    )
    assert generate(llm, "xabc", SamplingParams(max_tokens=2, truncate_prompt_tokens=2)).prompt_token_ids == list(b"bc")
    output = generate(llm, "abc", SamplingParams(max_tokens=2, detokenize=False)).outputs[0]
    assert output.text == "" and output.token_ids == list(b"de")


def test_n_and_best_of(llm):
    outputs = generate(llm, "a", SamplingParams(max_tokens=2, n=3, temperature=1.0)).outputs
    assert [output.index for output in outputs] == [0, 1, 2] and all(output.text == "bc" for output in outputs)
    # The fake gives later sequences better log-probabilities.
    best = generate(llm, "a", SamplingParams(max_tokens=2, n=2, best_of=4, temperature=1.0)).outputs
    assert [output.cumulative_logprob for output in best] == [-0.5, pytest.approx(-2 / 3)]
    assert [output.index for output in best] == [0, 1] and best[0].logprobs is None


def test_logprobs(llm):
    output = generate(llm, "a", SamplingParams(max_tokens=2, logprobs=0)).outputs[0]
    assert output.cumulative_logprob == -2.0 and [list(row) for row in output.logprobs] == [[98], [99]]


def test_streaming_has_increments_and_cumulative_text(llm):
    result = llm.generate_async("abc", SamplingParams(max_tokens=5), streaming=True)
    text, tokens, last = "", [], None
    for last in result:
        text += last.outputs[0].text_diff
        tokens += last.outputs[0].token_ids_diff
        assert text == last.outputs[0].text
    assert last is result and text == "defgh" and tokens == list(b"defgh") and result.finished
    assert list(result) == []  # exhausted
    assert result.result().outputs[0].text == "defgh"


def test_streaming_never_splits_a_character(llm):
    # Bytes after 0xC2 are not continuation bytes for long: nothing is emitted until a character is whole.
    result = llm.generate_async([0xE2, 0x7F], SamplingParams(max_tokens=2), streaming=True)
    assert [state.outputs[0].text for state in result][-1] == "\ufffd\ufffd"


def test_text_is_made_in_the_consumers_thread(llm):
    FakeDecoder.made_in.clear()
    for _ in llm.generate_async("abc", SamplingParams(max_tokens=5), streaming=True):
        pass
    generate(llm, ["a", "b"])
    assert set(FakeDecoder.made_in) == {threading.get_ident()}


def test_await_and_async_for(llm):
    async def main():
        params = SamplingParams(max_tokens=5)
        awaited = await llm.generate_async("abc", params)
        assert awaited.outputs[0].text == "defgh"

        async def stream(prompt):
            text = ""
            async for state in llm.generate_async(prompt, params, streaming=True):
                text += state.outputs[0].text_diff
            return text

        assert await asyncio.gather(*(stream(p) for p in ("a", "b", "c"))) == ["bcdef", "cdefg", "defgh"]
        with pytest.raises(RuntimeError, match="broke"):
            await llm.generate_async("!", params)
        with pytest.raises(ValueError, match="empty"):
            llm.generate_async("", params)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_abort(llm):
    llm._engine.go.clear()
    result = llm.generate_async("abc", SamplingParams(max_tokens=100))
    with pytest.raises(TimeoutError, match="has not ended"):
        result.result(timeout=0.05)
    assert not result.aborted()
    result.abort()
    llm._engine.go.set()
    assert result.result(timeout=10).outputs[0].finish_reason == "cancelled" and result.aborted()
    result.abort()  # harmless


def test_engine_death_reaches_pending_and_new_requests(llm):
    llm._engine.go.clear()
    result = llm.generate_async("abc", SamplingParams(max_tokens=100))
    llm._engine.death = RuntimeError("out of memory")
    llm._engine.go.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        result.result(timeout=10)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(llm, ["a", "b"])


def test_generate_async_takes_one_prompt(llm):
    with pytest.raises(ValueError, match="one prompt, not a list of 2"):
        llm.generate_async(["a", "b"])


def test_chat(llm):
    message = {"role": "user", "content": "Hi"}
    output = llm.chat([message], SamplingParams(max_tokens=1), use_tqdm=False)
    assert bytes(output.prompt_token_ids) == b"<user>Hi<assistant>"
    assert len(llm.chat([[message], [message]], SamplingParams(max_tokens=1), use_tqdm=False)) == 2
    for bad in ([], "Hi", [{"content": "Hi"}], [{"role": "user"}], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError):
            llm.chat(bad)
    with pytest.raises(ValueError, match="messages = 'Hi' must be a list"):
        llm.chat("Hi")


def test_progress_bar_shows_both_speeds(llm, capsys):
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    shown = capsys.readouterr().err
    assert "2/2" in shown and "in " in shown and "out " in shown and "tok/s" in shown


def test_timing(llm):
    timing = generate(llm, "abc").timing
    assert 0 < timing.ttft <= timing.e2e and timing.tokens == 3 and timing.tpot >= 0


def test_shutdown_is_final_and_repeatable(llm):
    llm.shutdown()
    llm.shutdown()
    assert llm._engine.stopped
    for call in (lambda: generate(llm, "a"), lambda: llm.generate_async("a")):
        with pytest.raises(RuntimeError, match="shut down"):
            call()


def test_without_a_tokenizer(monkeypatch):
    monkeypatch.setattr(jaxllm.llm, "_start_engine", FakeEngine)
    with LLM("fake", skip_tokenizer_init=True) as llm:
        assert generate(llm, [97, 98]).outputs[0].token_ids == [99, 100, 101]
        assert generate(llm, [97, 98]).outputs[0].text == ""
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            generate(llm, "text")
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            generate(llm, [97], SamplingParams(stop="x"))


def test_wrong_settings_are_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="did you mean 'tensor_parallel_size'"):
        LLM("fake", tensor_paralel_size=2)
    with pytest.raises(ConfigError, match="not supported"):
        LLM("fake", trust_remote_code=True)
    with pytest.raises(ConfigError, match="not supported"):
        LLM("fake", tokenizer_mode="slow")
    with pytest.raises(ValueError, match=r"needs 1024 devices.*what fits"):
        LLM("fake", tensor_parallel_size=1024)


def test_importing_jaxllm_imports_no_jax():
    code = (
        "import sys, jaxllm, jaxllm.config, jaxllm.cli; jaxllm.SamplingParams; "
        "print([m for m in ('jax', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_llmapi_names():
    import jaxllm.llmapi as api

    assert all(getattr(api, name) is not None for name in api.__all__)
    with pytest.raises(NotImplementedError, match=r"MTPDecodingConfig.*not supported yet"):
        from jaxllm.llmapi import MTPDecodingConfig  # noqa: F401
    with pytest.raises(ImportError):
        from jaxllm.llmapi import Nonsense  # noqa: F401
