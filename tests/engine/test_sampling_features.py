"""Every sampling feature through the engine, against the model's logits over whole sequences and NumPy."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.request import Request
from jaxllm.engine.slots import SlotTable
from jaxllm.engine.tokenizer import IncrementalDecoder
from tests.tiny_llm import EOS, VOCAB, full_logits, log_softmax, make_llm, prompts, tokens_of

pytestmark = pytest.mark.timeout(300)

PROMPTS = prompts(5, seed=21, low=2, high=20)
LENGTH = 16
Story = tuple[list[int], list[int], str]
GREEDY = SamplingParams(max_tokens=LENGTH, ignore_eos=True)


def run(llm: LLM, inputs: Any, params: Any = GREEDY) -> list[list[int]]:
    return tokens_of(llm.generate(inputs, params, use_tqdm=False))


@pytest.fixture(scope="module")
def plain(llm: LLM) -> list[list[int]]:
    """Greedy tokens of PROMPTS."""
    return run(llm, PROMPTS)


def check_against(
    llm: LLM, params: SamplingParams, change: Callable[[np.ndarray, list[int], list[int]], np.ndarray]
) -> list[list[int]]:
    """Runs PROMPTS greedily and checks each token to be the best after `change(logits, prompt, outputs so far)`."""
    outputs = run(llm, PROMPTS, params)
    logits = full_logits([prompt + output for prompt, output in zip(PROMPTS, outputs, strict=True)])
    for prompt, output, rows in zip(PROMPTS, outputs, logits, strict=True):
        for i, token in enumerate(output):
            changed = change(rows[len(prompt) + i - 1].astype(np.float64), prompt, output[:i])
            assert changed[token] >= changed.max() - 1e-4, (prompt, output, i)
    return outputs


# ---- logprobs -----------------------------------------------------------------------------------------------------


def test_logprobs(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, replace(GREEDY, logprobs=3, prompt_logprobs=2), use_tqdm=False)
    whole = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
    for output, tokens, rows in zip(outputs, whole, full_logits(whole), strict=True):
        completion, prompt = output.outputs[0], output.prompt_token_ids
        expected = log_softmax(rows)
        assert completion.prompt_logprobs[0] is None
        found = [*completion.prompt_logprobs[1:], *completion.logprobs]
        assert len(found) == len(tokens) - 1 and len(completion.logprobs) == LENGTH
        total = 0.0
        for i, entry in enumerate(found):
            row, token = expected[i], tokens[i + 1]
            count = 2 if i < len(prompt) - 1 else 3
            best = np.argsort(-row, kind="stable")[:count].tolist()
            assert set(entry) == {token, *best}
            for t, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[t], abs=2e-4)
                assert logprob.rank == 1 + int((row > row[t] + 1e-6).sum())
            total += row[token] if i >= len(prompt) - 1 else 0.0
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_logprobs_are_of_the_raw_distribution(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=8, temperature=3.0, top_k=50, seed=4, logit_bias={7: 4.0}, repetition_penalty=1.5, logprobs=0,
        ignore_eos=True,
    )  # fmt: skip
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)
    tokens = PROMPTS[0] + output.outputs[0].token_ids
    rows = log_softmax(full_logits([tokens])[0])
    for i, entry in enumerate(output.outputs[0].logprobs):
        at = len(PROMPTS[0]) + i
        assert list(entry) == [tokens[at]]
        assert entry[tokens[at]].logprob == pytest.approx(rows[at - 1][tokens[at]], abs=2e-4)


def test_prompt_logprobs_ignore_the_prefix_cache(llm: LLM) -> None:
    prompt = prompts(1, seed=77, low=40, high=40)[0]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    first = llm.generate(prompt, params, use_tqdm=False).outputs[0].prompt_logprobs
    second = llm.generate(prompt, params, use_tqdm=False).outputs[0].prompt_logprobs
    assert len(first) == len(second) == 40
    rows = log_softmax(full_logits([prompt])[0])
    for i in range(1, 40):
        assert first[i][prompt[i]].logprob == pytest.approx(rows[i - 1][prompt[i]], abs=2e-4)
        assert first[i][prompt[i]].logprob == pytest.approx(second[i][prompt[i]].logprob, abs=1e-5)


# ---- where a text ends --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(llm: LLM) -> Story:
    """A prompt, its greedy tokens, and their text."""
    for prompt in prompts(20, seed=31, low=3, high=8):
        output = llm.generate(prompt, GREEDY, use_tqdm=False).outputs[0]
        if EOS not in output.token_ids and len(set(output.token_ids)) > 8 and len(output.text) >= 18:
            return prompt, output.token_ids, output.text
    raise AssertionError("no prompt has an output of many different tokens")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_stop_string_over_tokens(llm: LLM, story: Story, keep: bool, streaming: bool) -> None:
    prompt, tokens, text = story
    for start in range(4, 8):
        stop = text[start : start + 3]
        at = text.find(stop)
        params = replace(GREEDY, stop=["never\n", stop], include_stop_str_in_output=keep)
        result = llm.generate_async(prompt, params, streaming=streaming)
        streamed = "".join(state.outputs[0].text_diff for state in result)
        output = result.outputs[0]
        assert output.finish_reason == "stop" and output.stop_reason == stop
        assert output.text == streamed == text[: at + (3 if keep else 0)]
        # it ends at the token that completes the stop string
        shorter = llm.tokenizer.decode(output.token_ids[:-1])
        assert output.token_ids == tokens[: len(output.token_ids)]
        assert stop in llm.tokenizer.decode(output.token_ids) and stop not in shorter


def test_streamed_text_is_never_taken_back(llm: LLM, story: Story) -> None:
    prompt, _, text = story
    # never found, but many beginnings of it are
    stops = [text[i : i + 4] + "\n" for i in range(0, 12, 2)]
    result = llm.generate_async(prompt, replace(GREEDY, stop=stops), streaming=True)
    pieces = [state.outputs[0].text for state in result]
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    assert pieces[-1] == text and result.outputs[0].finish_reason == "length"


def test_stop_string_waits_for_min_tokens(llm: LLM, story: Story) -> None:
    prompt, tokens, _ = story
    letters = list(string.printable.strip())
    output = llm.generate(prompt, replace(GREEDY, stop=letters, min_tokens=5), use_tqdm=False).outputs[0]
    assert len(output.token_ids) == 5 and output.token_ids == tokens[:5]
    assert output.finish_reason == "stop"


def test_stop_token_ids(llm: LLM, story: Story) -> None:
    prompt, tokens, _ = story
    stop = next(token for i, token in enumerate(tokens) if i >= 4 and token not in tokens[:i])
    at = tokens.index(stop)
    for keep in (False, True):
        params = replace(GREEDY, stop_token_ids=[stop], include_stop_str_in_output=keep)
        output = llm.generate(prompt, params, use_tqdm=False).outputs[0]
        assert output.token_ids == tokens[: at + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == llm.tokenizer.decode(tokens[: at + (1 if keep else 0)])


def test_the_token_that_ends_a_sequence_is_not_searched_for_stop_strings(llm: LLM, story: Story) -> None:
    prompt, tokens, _ = story
    decode = llm.tokenizer.decode
    at = next(
        i
        for i, token in enumerate(tokens)
        if i >= 2
        and token not in tokens[:i]
        and decode(tokens[: i + 1]).find(decode([token])) == len(decode(tokens[:i]))
    )
    params = replace(GREEDY, stop_token_ids=[tokens[at]], stop=decode(tokens[at : at + 1]))
    output = llm.generate(prompt, params, use_tqdm=False).outputs[0]
    assert (output.token_ids, output.stop_reason) == (tokens[: at + 1], tokens[at])
    assert output.text == decode(tokens[:at])


def test_what_the_decoder_held_back_comes_at_the_end(llm: LLM, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfinished(IncrementalDecoder):
        def flush(self) -> str:
            return super().flush() + "\ufffd"

    monkeypatch.setattr("jaxllm.engine.results.IncrementalDecoder", Unfinished)
    prompt, tokens, _ = story
    params = replace(GREEDY, max_tokens=5, stop="~~~~")
    assert llm.generate(prompt, params, use_tqdm=False).outputs[0].text == llm.tokenizer.decode(tokens[:5]) + "\ufffd"


def test_end_token(llm: LLM, story: Story) -> None:
    prompt, tokens, _ = story
    # the model's own end token, made the best one after everything
    pushed = SamplingParams(max_tokens=10, logit_bias={EOS: 1e4})
    output = llm.generate(prompt, pushed, use_tqdm=False).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([EOS], "stop", None)
    ignored = llm.generate(prompt, replace(pushed, ignore_eos=True), use_tqdm=False).outputs[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 10, "length")
    held = llm.generate(prompt, replace(pushed, min_tokens=4), use_tqdm=False).outputs[0]
    assert held.token_ids == [*tokens[:4], EOS]
    other = llm.generate(prompt, replace(GREEDY, ignore_eos=False, end_id=tokens[2]), use_tqdm=False).outputs[0]
    assert other.token_ids == tokens[: tokens.index(tokens[2]) + 1] and other.finish_reason == "stop"


# ---- changed logits -----------------------------------------------------------------------------------------------


def test_logit_bias(llm: LLM, plain: list[list[int]]) -> None:
    bias = {plain[0][0]: -5.0, 17: 3.5, 40: float("-inf"), VOCAB - 1: 2.0}

    def change(row: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
        for token, value in bias.items():
            row[token] += value
        return row

    assert check_against(llm, replace(GREEDY, logit_bias=bias), change) != plain


def test_many_biases_in_one_step(llm: LLM, plain: list[list[int]]) -> None:
    """More changed logits than the small sampler has room for: 5 requests with 202 banned tokens each."""
    params = [replace(GREEDY, bad_token_ids=[t for t in range(VOCAB) if t != 50 + i]) for i in range(5)]
    params += [replace(GREEDY, logit_bias={t: 1.0 for t in range(VOCAB)})] * 3  # changes nothing
    assert run(llm, PROMPTS + PROMPTS[:3], params) == [[50 + i] * LENGTH for i in range(5)] + plain[:3]


def test_bad_token_ids_and_words(llm: LLM, story: Story) -> None:
    prompt, tokens, _ = story
    at = next(i for i, token in enumerate(tokens) if i >= 2 and token not in tokens[:i])
    output = run(llm, prompt, replace(GREEDY, bad_token_ids=[tokens[at], 199]))[0]
    assert output[:at] == tokens[:at] and not {tokens[at], 199} & set(output)
    # a word of several tokens: its tokens may appear, its sequence must not
    word = llm.tokenizer.decode(tokens[4:7])
    encoded = llm.tokenizer.encode(word, add_special_tokens=False)
    assert len(encoded) > 1
    output = run(llm, prompt, replace(GREEDY, bad=word))[0]
    pieces = [tuple(output[i : i + len(encoded)]) for i in range(LENGTH)]
    assert tuple(encoded) not in pieces
    assert output != tokens or tuple(encoded) != tuple(tokens[4:7])


def test_only_the_end_of_a_bad_word_is_banned_and_only_after_its_beginning() -> None:
    table = SlotTable(1, 0, None)
    (seq,) = Request(0, [4, 5], GREEDY).sequences
    seq.slot = 0
    entry = table.start(seq, [(5, 6, 7), (8, 9), (3,)])
    for outputs, banned in (([], {3}), ([6], {3, 7}), ([9, 6], {3}), ([6, 8], {3, 9}), ([5], {3})):
        seq.tokens[2:] = outputs
        assert {token for token, value in entry.step_bias(len(outputs)) if value == -np.inf} == banned


def test_bad_word_of_one_token(llm: LLM, story: Story) -> None:
    prompt, tokens, _ = story
    assert tokens[0] not in run(llm, prompt, replace(GREEDY, bad=[llm.tokenizer.decode(tokens[:1])]))[0]


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 3.0},
        {"frequency_penalty": 1.2},
        {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.8},
    ],
    ids=str,
)
def test_penalties(llm: LLM, plain: list[list[int]], penalties: dict[str, float]) -> None:
    def change(row: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
        factor = penalties.get("repetition_penalty", 1.0)
        seen = np.unique(prompt + output)  # Hugging Face: prompt and output
        row[seen] = np.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
        counts = np.bincount(output, minlength=VOCAB)
        row -= penalties.get("frequency_penalty", 0.0) * counts
        return row - penalties.get("presence_penalty", 0.0) * (counts > 0)

    assert check_against(llm, replace(GREEDY, **penalties), change) != plain


# ---- random numbers -----------------------------------------------------------------------------------------------

SAMPLED = [
    replace(GREEDY, temperature=0.8, seed=1),
    replace(GREEDY, temperature=1.3, top_p=0.9, seed=2),
    replace(GREEDY, top_k=12, seed=3),
    replace(GREEDY, temperature=1.0, min_p=0.05, seed=4),
    replace(GREEDY, temperature=1.0, seed=2**63 + 5, frequency_penalty=0.4, logprobs=1),
]


def test_seeds(llm: LLM, plain: list[list[int]]) -> None:
    together = run(llm, PROMPTS, SAMPLED)
    alone = [run(llm, prompt, params)[0] for prompt, params in zip(PROMPTS, SAMPLED, strict=True)]
    assert together == alone
    assert all(a != b for a, b in zip(together, plain, strict=True))
    others = run(llm, PROMPTS, [replace(params, seed=params.seed + 100) for params in SAMPLED])
    assert all(a != b for a, b in zip(together, others, strict=True))
    with make_llm(disable_overlap_scheduler=True) as no_overlap:
        assert run(no_overlap, PROMPTS, SAMPLED) == together
    with make_llm(kv_tokens=80) as tight:
        crowd = run(tight, PROMPTS * 3, SAMPLED * 3)
        assert tight.get_stats()["preemptions"] > 0
        assert crowd == together * 3


def test_without_a_seed_requests_differ(llm: LLM) -> None:
    outputs = run(llm, [PROMPTS[0]] * 4, replace(GREEDY, temperature=1.5))
    assert len({tuple(output) for output in outputs}) == 4


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.5, "seed": 3}, {"top_k": 1}, {"temperature": 1e-40}],
    ids=str,
)
def test_what_is_greedy(llm: LLM, plain: list[list[int]], params: dict[str, Any]) -> None:
    assert run(llm, PROMPTS, replace(GREEDY, **params)) == plain


def test_extreme_temperatures_stay_in_the_vocabulary(llm: LLM) -> None:
    for temperature in (1e-35, 1e30, 1e38, 1e300):
        for tokens in run(llm, PROMPTS, replace(GREEDY, temperature=temperature, seed=1)):
            assert len(tokens) == LENGTH and max(tokens) < VOCAB


def test_everything_at_once_leaves_greedy_rows_alone(llm: LLM, plain: list[list[int]]) -> None:
    mixed = [
        *SAMPLED,
        replace(GREEDY, logprobs=20, prompt_logprobs=20),
        replace(GREEDY, repetition_penalty=1.4, presence_penalty=0.3),
        replace(GREEDY, bad=["e", "th a"], logit_bias={30: 2.0}),
        replace(GREEDY, stop=["e", "a"], min_tokens=2),
        replace(GREEDY, n=3, temperature=1.0, seed=9),
        replace(GREEDY, stop_token_ids=list(range(60, 90)), min_tokens=3),
    ]
    inputs, params, places = [], [], []
    for i, special in enumerate(mixed):
        inputs += [PROMPTS[i % 5], PROMPTS[(i + 1) % 5]]
        params += [GREEDY, special]
        places.append(i % 5)
    outputs = llm.generate(inputs, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs[::2]] == [plain[i] for i in places]
    alone = [llm.generate(p, s, use_tqdm=False) for p, s in zip(inputs[1::2], mixed, strict=True)]
    assert tokens_of(outputs[1::2]) == tokens_of(alone)
