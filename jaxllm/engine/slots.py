"""What each slot's sequence asks of the sampler, kept as arrays so that a step only has to pick its rows.

A step whose rows are all plain greedy needs none of this: the forward step has chosen the tokens already. Otherwise the
sampler runs on the step's logits, in one of two compiled variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from jaxllm.engine.request import Sequence
from jaxllm.sampling_params import SamplingParams, SamplingParamsError, sequence_seed

MAX_BIASED_TOKENS = 1024
"""Tokens whose logits one request may change in a step (logit_bias, bad words, end tokens held back by min_tokens)."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Beyond these a temperature, a penalty or its inverse is not a float32 number; the token is the same as at the bound,
where it would be none with infinities: an infinite penalty on a token that was not said is not a number."""


class Variant(Enum):
    """The compiled forms of the sampler."""

    PLAIN = "plain"
    """Temperature, top-k, top-p, min-p."""
    FULL = "full"
    """Also penalties, logprobs, masks of structured outputs, and up to MAX_BIASED_TOKENS changed logits per row."""

    def bias_capacity(self, rows: int) -> int:
        return MAX_BIASED_TOKENS * rows if self is Variant.FULL else 0


@dataclass(slots=True)
class SlotSampling:
    """The sampling needs of one sequence while it holds a slot."""

    seq: Sequence
    variant: Variant | None
    bias: list[tuple[int, float]]
    min_tokens: int
    banned_ends: tuple[int, ...]
    bad_sequences: list[tuple[int, ...]]
    num_logprobs: int | None

    def step_bias(self, num_outputs: int) -> list[tuple[int, float]]:
        """Changes of the logits of the token that follows `num_outputs` generated ones."""
        bias = self.bias
        if num_outputs < self.min_tokens:
            bias = bias + [(token, -np.inf) for token in self.banned_ends]
        if self.bad_sequences:
            tokens = self.seq.tokens
            ends = [s[-1] for s in self.bad_sequences if tuple(tokens[len(tokens) - len(s) + 1 :]) == s[:-1]]
            bias = bias + [(token, -np.inf) for token in ends]
        return bias


_FIELDS: dict[str, type] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.uint32,
    "repetition": np.float32,
    "presence": np.float32,
    "frequency": np.float32,
}
_NEUTRAL = {"top_p": 1.0, "repetition": 1.0}


class SlotTable:
    """Sampling parameters by slot; the last slot is spare and stays neutral.

    encode: text to token ids without special tokens, for bad words; None without a tokenizer.
    num_ends: end tokens of the model, which min_tokens holds back.
    """

    def __init__(
        self, max_batch_size: int, seed: int, encode: Callable[[str], Iterable[int]] | None, num_ends: int = 1
    ):
        self.spare = max_batch_size
        self._seed = seed
        self._encode = encode
        self._num_ends = max(1, num_ends)
        self._values: dict[str, np.ndarray] = {
            name: np.full(max_batch_size + 1, _NEUTRAL.get(name, 0), dtype) for name, dtype in _FIELDS.items()
        }
        self.slots: list[SlotSampling | None] = [None] * (max_batch_size + 1)
        self._not_greedy: set[int] = set()

    def validate(self, params: SamplingParams, vocab_size: int) -> list[tuple[int, ...]]:
        """The bad sequences of a request. Raises SamplingParamsError when its parameters cannot be served."""
        params.check_token_ids(vocab_size)
        bad = params.bad_sequences(self._encode)
        count = len(params.logit_bias or {}) + len(bad) + len(params.stop_token_ids or ()) + self._num_ends
        if count > MAX_BIASED_TOKENS:
            raise SamplingParamsError(
                f"logit_bias, bad words and stop tokens name {count} tokens, but a request may change the logits of "
                f"{MAX_BIASED_TOKENS}: name fewer"
            )
        return bad

    def start(self, seq: Sequence, bad: list[tuple[int, ...]]) -> SlotSampling:
        """Takes over the parameters of a sequence that just got its slot."""
        params: SamplingParams = seq.request.params  # type: ignore[assignment]
        slot, v = seq.slot, self._values
        seed = params.seed if params.seed is not None else self._seed + 0x9E3779B9 * (seq.request.request_id + 1)
        temperature = params.device_temperature
        repetition = 1.0 if params.repetition_penalty is None else params.repetition_penalty
        v["temperature"][slot] = min(max(temperature, SMALLEST), LARGEST) if temperature else 0.0
        v["top_k"][slot] = min(params.top_k or 0, np.iinfo(np.int32).max)
        v["top_p"][slot] = 1.0 if params.top_p is None else params.top_p
        v["min_p"][slot] = params.min_p or 0.0
        v["seed"][slot] = sequence_seed(seed % 2**64, seq.index)
        v["repetition"][slot] = min(max(repetition, SMALLEST), LARGEST)
        v["presence"][slot] = _bounded(params.presence_penalty or 0.0)
        v["frequency"][slot] = _bounded(params.frequency_penalty or 0.0)

        bias = [(int(token), _bounded(value)) for token, value in (params.logit_bias or {}).items()]
        bias += [(sequence[0], -np.inf) for sequence in bad if len(sequence) == 1]
        long_bad = [sequence for sequence in bad if len(sequence) > 1]
        min_tokens = params.min_tokens or 0
        constrained = params.structured_outputs is not None
        # A form that has reached its end allows nothing but the end tokens.
        ends = tuple(seq.stop_ids) if min_tokens and not constrained else ()
        full = bool(bias or long_bad or ends or params.has_penalties or params.logprobs is not None or constrained)
        variant = Variant.FULL if full else None if params.greedy else Variant.PLAIN
        entry = SlotSampling(seq, variant, bias, min_tokens, ends, long_bad, params.logprobs)
        self.slots[slot] = entry
        (self._not_greedy.discard if variant is None else self._not_greedy.add)(slot)
        return entry

    @property
    def all_greedy(self) -> bool:
        """Whether nobody who has a slot, or had it last, asks for more than greedy tokens."""
        return not self._not_greedy

    def variant(self, slots: Iterable[int]) -> Variant | None:
        """The variant that covers all of these slots; None when all are plain greedy."""
        entries = [self.slots[slot] for slot in self._not_greedy.intersection(slots)]
        found = {entry.variant for entry in entries if entry is not None}
        return Variant.FULL if Variant.FULL in found else Variant.PLAIN if found else None

    def rows(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters of each row, by its slot."""
        return {name: values[slots] for name, values in self._values.items()}


def _bounded(value: float) -> float:
    """A penalty or a bias as a float32 number; what bans a token stays infinite."""
    return float(value) if value == -np.inf else float(min(max(value, -LARGEST), LARGEST))
