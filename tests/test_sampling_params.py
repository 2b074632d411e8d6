"""SamplingParams: what is accepted, what is refused, and that every refusal names value, rule and way out."""

import copy
import dataclasses
import math
import subprocess
import sys

import pytest

from jaxllm.sampling_params import SamplingParams, SamplingParamsError, sequence_seed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, ["max_tokens=0", ">= 1", "None"]),
        ({"max_tokens": -5}, ["max_tokens=-5"]),
        ({"max_tokens": 3.0}, ["max_tokens=3.0", "integer"]),
        ({"max_tokens": True}, ["max_tokens=True"]),
        ({"n": 0}, ["n=0", "1..16384"]),
        ({"n": None}, ["n=None"]),
        ({"n": 10**9}, ["n=1000000000", "1..16384"]),
        ({"best_of": 10**9}, ["best_of=1000000000", "1..16384"]),
        ({"n": 3, "best_of": 2}, ["best_of=2", "n=3"]),
        ({"temperature": math.nan}, ["temperature=nan", "finite"]),
        ({"temperature": math.inf}, ["temperature=inf"]),
        ({"temperature": 10**400}, ["temperature=1000", "finite"]),
        ({"temperature": -0.1}, ["temperature=-0.1", ">= 0"]),
        ({"temperature": "hot"}, ["temperature='hot'"]),
        ({"top_k": -1}, ["top_k=-1", "0 or None"]),
        ({"top_p": 0}, ["top_p=0", "(0, 1]"]),
        ({"top_p": 1.01}, ["top_p=1.01"]),
        ({"top_p": math.nan}, ["top_p=nan"]),
        ({"min_p": -0.5}, ["min_p=-0.5", "[0, 1]"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 1 << 64}, ["seed="]),
        ({"min_tokens": -1}, ["min_tokens=-1"]),
        ({"min_tokens": 9, "max_tokens": 8}, ["min_tokens=9", "max_tokens=8"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0", "> 0"]),
        ({"presence_penalty": math.inf}, ["presence_penalty=inf"]),
        ({"frequency_penalty": math.nan}, ["frequency_penalty=nan"]),
        ({"stop": ""}, ["stop", "non-empty"]),
        ({"stop": ["a", 3]}, ["stop", "3"]),
        ({"stop": 5}, ["stop=5"]),
        ({"stop": "x", "detokenize": False}, ["detokenize", "stop_token_ids"]),
        ({"stop_token_ids": 5}, ["stop_token_ids=5"]),
        ({"stop_token_ids": [1, -2]}, ["stop_token_ids", "-2"]),
        ({"bad": [""]}, ["bad"]),
        ({"bad_token_ids": ["a"]}, ["bad_token_ids", "'a'"]),
        ({"logit_bias": [1]}, ["logit_bias=[1]", "dict"]),
        ({"logit_bias": {"7": 1.0}}, ["'7'"]),
        ({"logit_bias": {7: math.nan}}, ["logit_bias[7]=nan"]),
        ({"logit_bias": {7: math.inf}}, ["logit_bias[7]=inf", "-inf"]),
        ({"logit_bias": {7: -(10**400)}}, ["logit_bias[7]=-1000", "finite"]),
        ({"logit_bias": {7: "1"}}, ["logit_bias[7]='1'", "finite"]),
        ({"end_id": -1}, ["end_id=-1"]),
        ({"ignore_eos": 1}, ["ignore_eos=1", "True or False"]),
        ({"truncate_prompt_tokens": 0}, ["truncate_prompt_tokens=0"]),
        ({"logprobs": 21}, ["logprobs=21", "0..20"]),
        ({"logprobs": True}, ["logprobs=True"]),
        ({"prompt_logprobs": -1}, ["prompt_logprobs=-1"]),
        ({"temprature": 1.0}, ["temprature", "did you mean 'temperature'"]),
        ({"max_new_tokens": 4}, ["max_new_tokens", "'max_tokens'"]),
        ({"zzzzzzzz": 4}, ["zzzzzzzz", "the parameters are"]),
        ({"use_beam_search": True}, ["use_beam_search", "not supported", "best_of"]),
        ({"embedding_bias": None}, ["embedding_bias", "logit_bias"]),
    ],
    ids=str,
)
def test_bad_values_are_refused_with_value_rule_and_way_out(values, words):
    with pytest.raises(SamplingParamsError) as error:
        SamplingParams(**values)
    message = str(error.value)
    assert isinstance(error.value, ValueError) and "\n" not in message
    for word in words:
        assert word in message


def test_positional_arguments_are_refused():
    with pytest.raises(SamplingParamsError, match="keywords only"):
        SamplingParams(5)


def test_accepts_the_full_range():
    params = SamplingParams(
        max_tokens=1,
        n=2,
        best_of=3,
        temperature=0.5,
        top_k=0,
        top_p=1,
        min_p=0,
        seed=(1 << 64) - 1,
        min_tokens=1,
        stop=("a", "b"),
        stop_token_ids=[0],
        logit_bias={1: -math.inf},
        logprobs=0,
        prompt_logprobs=20,
    )
    assert params.num_sequences == 3 and params.stop_strings == ("a", "b")


def test_changed_values_are_found_by_validate():
    params = SamplingParams()
    params.top_p = 0
    with pytest.raises(SamplingParamsError, match="top_p"):
        params.validate()


def test_copies_and_replace_work():
    params = SamplingParams(temperature=0.3, stop=["x"])
    assert copy.copy(params) == copy.deepcopy(params) == params
    assert dataclasses.replace(params, n=2).n == 2
    with pytest.raises(SamplingParamsError):
        dataclasses.replace(params, n=0)


@pytest.mark.parametrize(
    ("values", "greedy", "temperature"),
    [
        ({}, True, 0.0),
        ({"temperature": 0}, True, 0.0),
        ({"temperature": 0, "top_p": 0.5}, True, 0.0),
        ({"top_k": 1, "temperature": 2.0}, True, 0.0),
        ({"top_p": 0.5}, False, 1.0),
        ({"min_p": 0.1}, False, 1.0),
        ({"temperature": 0.7}, False, 0.7),
        ({"repetition_penalty": 1.2, "seed": 4}, True, 0.0),
    ],
)
def test_greedy_and_temperature(values, greedy, temperature):
    params = SamplingParams(**values)
    assert params.greedy is greedy and params.device_temperature == temperature


def test_has_penalties():
    assert not SamplingParams(repetition_penalty=1.0, presence_penalty=0.0).has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 0.5}).has_penalties


def test_token_ids_are_checked_against_the_vocabulary():
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}).check_token_ids(10)
    for values in ({"stop_token_ids": [10]}, {"bad_token_ids": [10]}, {"logit_bias": {10: 1.0}}, {"end_id": 10}):
        with pytest.raises(SamplingParamsError, match="names token 10"):
            SamplingParams(**values).check_token_ids(10)


def test_bad_sequences_cover_the_word_at_the_start_and_inside_a_text():
    params = SamplingParams(bad=["cat", " dog"], bad_token_ids=[4, 4])
    assert params.bad_sequences(lambda text: [ord(c) for c in text]) == [
        (4,),
        tuple(map(ord, "cat")),
        tuple(map(ord, " cat")),
        tuple(map(ord, " dog")),
    ]
    with pytest.raises(SamplingParamsError, match="bad_token_ids"):
        params.bad_sequences(None)


def test_sequence_seeds_differ_and_fit_32_bits():
    seeds = {sequence_seed(seed, index) for seed in range(200) for index in range(20)}
    assert len(seeds) == 4000 and all(0 <= seed < 1 << 32 for seed in seeds)
    assert sequence_seed(7, 0) == sequence_seed(7, 0)


def test_importing_needs_no_jax():
    code = "import sys, jaxllm.sampling_params; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
