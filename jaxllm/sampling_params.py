"""SamplingParams: what a caller asks of one request, checked when it is made. No jax here.

Names follow TensorRT-LLM's `SamplingParams`. Where its behaviour surprises (32 tokens by default, silently ignored
values) this one differs and says so.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from jaxllm.structured import StructuredOutputs, StructuredOutputsError

MAX_LOGPROBS = 20
MAX_SEQUENCES = 16_384
"""Completions of one prompt."""
_SEED_LIMIT = 1 << 64

# Fields of TensorRT-LLM that jaxllm knows and does not have: field -> what to do instead.
_UNSUPPORTED = {
    "use_beam_search": "beam search is not supported; sample with n or best_of instead",
    "beam_width_array": "beam search is not supported; sample with n or best_of instead",
    "beam_search_diversity_rate": "beam search is not supported; sample with n or best_of instead",
    "length_penalty": "it belongs to beam search, which is not supported; leave it out",
    "early_stopping": "it belongs to beam search, which is not supported; leave it out",
    "top_p_min": "top-p decay is not supported; use a constant top_p",
    "top_p_decay": "top-p decay is not supported; use a constant top_p",
    "top_p_reset_ids": "top-p decay is not supported; use a constant top_p",
    "no_repeat_ngram_size": "it is not supported; use repetition_penalty or frequency_penalty",
    "embedding_bias": "it is not supported; use logit_bias={token_id: bias}",
    "logits_processor": "it is not supported; use logit_bias, bad or the penalties",
    "apply_batched_logits_processor": "it is not supported; use logit_bias, bad or the penalties",
    "lookahead_config": "it is not supported; leave it out",
    "return_context_logits": "it is not supported; use prompt_logprobs",
    "return_generation_logits": "it is not supported; use logprobs",
    "return_encoder_output": "it is not supported; leave it out",
    "return_perf_metrics": "it is not supported; leave it out",
    "additional_model_outputs": "it is not supported; leave it out",
}
# Names other libraries use, where spelling alone would not find ours.
_ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "bad_words": "bad",
    "stop_words": "stop",
    "stop_strings": "stop",
    "eos_token_id": "end_id",
    "pad_token_id": "pad_id",
    "top_logprobs": "logprobs",
    "allowed_token_ids": "logit_bias",
}


class SamplingParamsError(ValueError):
    """A sampling parameter is unknown, unsupported or out of range. The message names value, rule and way out."""


@dataclass(kw_only=True)
class SamplingParams:
    """How to generate for one request. Every value is checked on construction, and again by `validate()`.

    Greedy when `temperature`, `top_k`, `top_p` and `min_p` are all None, or when `temperature` is 0. Filters apply in
    the order temperature, top_k, top_p (on what top_k left), min_p.

    Attributes:
      max_tokens: most tokens to generate; None = until the end of the context (TensorRT-LLM: 32).
      n: completions to return, at most MAX_SEQUENCES. best_of: completions to generate, the best `n` by cumulative
        logprob are returned.
      temperature: >= 0; None = 1 when another sampling field is set.
      top_k: keep the k likeliest tokens; None or 0 = all.
      top_p: in (0, 1], keep the smallest set of likeliest tokens with at least this probability.
      min_p: in [0, 1], keep tokens at least this fraction as likely as the likeliest.
      seed: in [0, 2**64); the same seed gives the same tokens whatever else runs. None = the engine picks one.
      min_tokens: no end or stop token before this many tokens.
      repetition_penalty: > 0, over prompt and output; 1 = none. presence_penalty, frequency_penalty: over the
        output, 0 = none.
      stop: string or strings that end the text. stop_token_ids: tokens that end it.
      bad: string or strings that must not be generated. bad_token_ids: tokens that must not.
      logit_bias: token id -> value added to its logit; -inf bans it.
      include_stop_str_in_output: leave the stop string or stop token that ended a text in it.
      ignore_eos: go on after the model's end token.
      end_id: replaces the model's end-of-sequence token. pad_id: accepted for compatibility; batches hold no padding.
      detokenize: make text; False leaves it empty. skip_special_tokens: leave special tokens out of it.
        spaces_between_special_tokens: accepted for compatibility, without effect.
      add_special_tokens: put the tokenizer's special tokens around a prompt that is text.
      exclude_input_from_output: False puts the prompt in front of every output, tokens and text.
      truncate_prompt_tokens: keep only the last so many prompt tokens.
      logprobs, prompt_logprobs: None = none, k in 0..20 = the token's own and the k likeliest, of the model's
        distribution before temperature, penalties, bias, filters and structured outputs.
      structured_outputs: the form that the text must have, as StructuredOutputs or a dict of its fields; it wins over
        min_tokens. guided_decoding: TensorRT-LLM's name for it.

    Raises:
      SamplingParamsError (a ValueError): any value that is out of range, or an unknown or unsupported keyword.
    """

    max_tokens: int | None = None
    n: int = 1
    best_of: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad: str | Sequence[str] | None = None
    bad_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    end_id: int | None = None
    pad_id: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    exclude_input_from_output: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    guided_decoding: StructuredOutputs | Mapping[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        # Runs before the generated __init__, so that an unknown keyword gets a useful message instead of a TypeError.
        known = [field.name for field in fields(cls)]
        for name in kwargs:
            if name in known:
                continue
            if name in _UNSUPPORTED:
                raise SamplingParamsError(f"sampling parameter {name!r}: {_UNSUPPORTED[name]}")
            near = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)
            way_out = f"did you mean {near!r}?" if near else f"the parameters are {', '.join(known)}"
            raise SamplingParamsError(f"unknown sampling parameter {name!r}: {way_out}")
        if args:
            raise SamplingParamsError(
                f"SamplingParams takes keywords only, got {args[0]!r} by position: write e.g. SamplingParams(n=2)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field; call it again after changing one. Raises SamplingParamsError."""
        _integer("max_tokens", self.max_tokens, 1, optional="leave it None to generate to the end of the context")
        _integer("n", self.n, 1, MAX_SEQUENCES, none_allowed=False)
        _integer("best_of", self.best_of, 1, MAX_SEQUENCES)
        if self.best_of is not None and self.best_of < self.n:
            raise SamplingParamsError(f"best_of={self.best_of} is less than n={self.n}: raise best_of or lower n")
        _number("temperature", self.temperature, lambda x: x >= 0, "a finite number >= 0 (0 = greedy)")
        _integer("top_k", self.top_k, 0, optional="use 0 or None to keep every token")
        _number("top_p", self.top_p, lambda x: 0 < x <= 1, "in (0, 1] (1 or None keeps every token, 0 keeps none)")
        _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "in [0, 1] (0 or None keeps every token)")
        _integer("seed", self.seed, 0, _SEED_LIMIT - 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: raise max_tokens or lower it"
            )
        _number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a finite number > 0 (1 = none)")
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), lambda x: True, "a finite number (0 = none)")
        for name in ("stop", "bad"):
            _strings(name, getattr(self, name))
        for name in ("stop_token_ids", "bad_token_ids"):
            _token_ids(name, getattr(self, name))
        _bias(self.logit_bias)
        for name in ("end_id", "pad_id"):
            _integer(name, getattr(self, name), 0)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "add_special_tokens",
            "exclude_input_from_output",
        ):
            if not isinstance(getattr(self, name), bool):
                raise SamplingParamsError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.stop_strings and not self.detokenize:
            raise SamplingParamsError(
                "stop strings need detokenize=True: set it, or use stop_token_ids, which work on tokens"
            )
        _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        for name in ("logprobs", "prompt_logprobs"):
            _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_structured()

    def _check_structured(self) -> None:
        given = self.structured_outputs
        if self.guided_decoding is not None:
            if given is not None:
                raise SamplingParamsError("structured_outputs and guided_decoding are the same: give one of them")
            given, self.guided_decoding = self.guided_decoding, None
        try:
            self.structured_outputs = None if given is None else StructuredOutputs.of(given)
        except StructuredOutputsError as error:
            raise SamplingParamsError(str(error)) from None

    # What the engine reads; the fields above stay as the caller wrote them.

    @property
    def greedy(self) -> bool:
        """True when every step takes the likeliest token."""
        sampling = (self.temperature, self.top_k, self.top_p, self.min_p)
        return self.temperature == 0 or self.top_k == 1 or all(value is None for value in sampling)

    @property
    def device_temperature(self) -> float:
        """Temperature as `SamplingBatch` wants it: 0 when greedy, 1 when only a filter was given."""
        if self.greedy:
            return 0.0
        return 1.0 if self.temperature is None else float(self.temperature)

    @property
    def num_sequences(self) -> int:
        """Sequences to generate: best_of where given, else n."""
        return self.best_of or self.n

    @property
    def has_penalties(self) -> bool:
        """True when any penalty differs from its neutral value."""
        return self.repetition_penalty not in (None, 1) or bool(self.presence_penalty) or bool(self.frequency_penalty)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return _as_tuple(self.stop)

    @property
    def bad_strings(self) -> tuple[str, ...]:
        """`bad` as a tuple."""
        return _as_tuple(self.bad)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise SamplingParamsError when a token id named in the parameters is not below `vocab_size`."""
        named = {
            "stop_token_ids": self.stop_token_ids or (),
            "bad_token_ids": self.bad_token_ids or (),
            "logit_bias": self.logit_bias or (),
            "end_id": () if self.end_id is None else (self.end_id,),
        }
        for name, ids in named.items():
            for token in ids:
                if token >= vocab_size:
                    raise SamplingParamsError(
                        f"{name} names token {token}, but the vocabulary has {vocab_size} tokens: "
                        f"use ids in 0..{vocab_size - 1}"
                    )

    def bad_sequences(self, encode: Callable[[str], Iterable[int]] | None) -> list[tuple[int, ...]]:
        """Token sequences that must not appear: `bad_token_ids`, and every `bad` string through the tokenizer.

        A string is encoded as it is and with a leading space, because it has other tokens inside a text than at its
        start. `encode` maps text to ids without special tokens; None (no tokenizer) is an error if `bad` is set.
        """
        sequences: list[tuple[int, ...]] = [(int(token),) for token in self.bad_token_ids or ()]
        for text in self.bad_strings:
            if encode is None:
                raise SamplingParamsError("bad words need a tokenizer, and this engine has none: use bad_token_ids")
            sequences.append(tuple(encode(text)))
            sequences.append(tuple(encode(" " + text.lstrip())))
        return [sequence for sequence in dict.fromkeys(sequences) if sequence]


def sequence_seed(seed: int, index: int) -> int:
    """The 32-bit seed of sequence `index` of a request with `seed` in [0, 2**64): splitmix64 of both."""
    mask = _SEED_LIMIT - 1
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 32


def _as_tuple(value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integer(
    name: str, value: Any, low: int, high: int | None = None, *, optional: str = "", none_allowed: bool = True
) -> None:
    if value is None and none_allowed:
        return
    if not _is_integer(value) or value < low or (high is not None and value > high):
        rule = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
        raise SamplingParamsError(f"{name}={value!r} must be {rule}" + (f"; {optional}" if optional else ""))


def _number(name: str, value: Any, ok: Callable[[float], bool], rule: str) -> None:
    if value is None:
        return
    if not _is_finite(value) or not ok(float(value)):
        raise SamplingParamsError(f"{name}={value!r} must be {rule}")


def _is_finite(value: Any) -> bool:
    """Whether this is a number that a float can be: 10**400 is none."""
    largest: Any = sys.float_info.max  # numbers.Real does not say what it compares with
    return isinstance(value, Real) and not isinstance(value, bool) and -largest <= value <= largest


def _strings(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str | list | tuple):
        raise SamplingParamsError(f"{name}={value!r} must be a string or a list of strings")
    for text in _as_tuple(value):
        if not isinstance(text, str) or not text:
            raise SamplingParamsError(f"{name} holds {text!r}: every entry must be a non-empty string")


def _token_ids(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple | set | frozenset | range):
        raise SamplingParamsError(f"{name}={value!r} must be a list of token ids")
    for token in value:
        if not _is_integer(token) or token < 0:
            raise SamplingParamsError(f"{name} holds {token!r}: every entry must be a token id >= 0")


def _bias(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise SamplingParamsError(f"logit_bias={value!r} must be a dict of token id -> bias")
    for token, bias in value.items():
        if not _is_integer(token) or token < 0:
            raise SamplingParamsError(f"logit_bias holds the key {token!r}: keys must be token ids >= 0")
        if not _is_finite(bias) and bias != -math.inf:
            raise SamplingParamsError(f"logit_bias[{token}]={bias!r} must be a finite number, or -inf to ban the token")
