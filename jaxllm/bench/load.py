"""What a benchmark asks for: random prompts of given lengths and how many tokens each shall get."""

from __future__ import annotations

import random
from dataclasses import dataclass

from jaxllm.config import ConfigError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens drawn evenly from low..high, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, name: str) -> Lengths:
        """`"64"` or `"8:256"`. Raises ConfigError naming the option `name`."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            lengths = cls(0, 0)
        if not 1 <= lengths.low <= lengths.high:
            raise ConfigError(f"{name} = {text!r} must be a number above 0, or two as LOW:HIGH, for example 8:256")
        return lengths

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts as token ids, and the number of tokens to generate for each, end tokens ignored."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))


def random_load(count: int, input_len: Lengths, output_len: Lengths, vocab_size: int, seed: int, run: int) -> Load:
    """The load of one repetition. Prompts differ between repetitions, so that no prefix cache can help; the lengths
    are the same in all of them, so that repetitions can be compared."""
    lengths = random.Random(f"{seed} lengths")
    tokens = random.Random(f"{seed} tokens {run}")
    # Special tokens sit at the two ends of a vocabulary.
    low, high = min(256, vocab_size // 2), min(vocab_size, 100_000)
    prompts = []
    output_lens = []
    for _ in range(count):
        prompts.append([tokens.randrange(low, high) for _ in range(lengths.randint(input_len.low, input_len.high))])
        output_lens.append(lengths.randint(output_len.low, output_len.high))
    return Load(prompts, output_lens)
