"""What a benchmark asks for: random prompts of given lengths and how many tokens each shall get."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from jaxllm.settings import ConfigError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens from low..high, both included: drawn evenly, or with a median log-normally and cut to that."""

    low: int
    high: int
    median: float | None = None
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str, name: str) -> Lengths:
        """`"64"`, `"8:256"` or `"sharegpt"`. Raises ConfigError naming the option `name`."""
        if text == "sharegpt":
            return SHAREGPT_OUTPUT if "output" in name else SHAREGPT_INPUT
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            lengths = cls(0, 0)
        if not 1 <= lengths.low <= lengths.high:
            raise ConfigError(
                f"{name} = {text!r} must be a number above 0, two as LOW:HIGH, for example 8:256, or sharegpt"
            )
        return lengths

    def draw(self, rng: random.Random) -> int:
        if self.median is None:
            return rng.randint(self.low, self.high)
        return min(max(self.low, round(self.median * math.exp(rng.gauss(0.0, self.sigma)))), self.high)

    def __str__(self) -> str:
        if self.median is not None:
            return f"log-normal, median {self.median:g}, sigma {self.sigma:g}, {self.low}:{self.high}"
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


# As long as in the sample of ShareGPT's conversations that servers are usually measured with: 215 tokens in and 198 out
# in the mean, few of them long.
SHAREGPT_INPUT = Lengths(4, 1024, median=100.0, sigma=1.4)
SHAREGPT_OUTPUT = Lengths(4, 1024, median=118.0, sigma=1.1)


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


def random_load(
    count: int, input_len: Lengths, output_len: Lengths, vocab_size: int, seed: int, run: int, prefix_len: int = 0
) -> Load:
    """The load of one repetition. Prompts differ between repetitions, so that no prefix cache can help; the lengths
    are the same in all of them, so that repetitions can be compared.

    prefix_len: tokens in front of every prompt that all of them share, in all repetitions.
    """
    lengths = random.Random(f"{seed} lengths")
    tokens = random.Random(f"{seed} tokens {run}")
    # Special tokens sit at the two ends of a vocabulary.
    low, high = min(256, vocab_size // 2), min(vocab_size, 100_000)
    shared = random.Random(f"{seed} prefix")
    prefix = [shared.randrange(low, high) for _ in range(prefix_len)]
    prompts = []
    output_lens = []
    for _ in range(count):
        prompts.append(prefix + [tokens.randrange(low, high) for _ in range(input_len.draw(lengths))])
        output_lens.append(output_len.draw(lengths))
    return Load(prompts, output_lens)


def names_of(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]
