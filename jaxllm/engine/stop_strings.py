"""Stop strings: found in the text of a sequence as it grows, also where one begins in one token and ends in another."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.engine.tokenizer import IncrementalDecoder


@dataclass(slots=True)
class StopWatch:
    """Looks for stop strings in the text of one sequence as it grows."""

    decoder: IncrementalDecoder
    stops: tuple[str, ...]
    keep_stop: bool
    min_tokens: int
    text: str = ""

    def find(self, token: int, num_outputs: int) -> str | None:
        """The stop string that this token completes; `text` is then cut at it."""
        searched = max(0, len(self.text) - max(map(len, self.stops)) + 1)
        self.text += self.decoder.decode([token])
        if num_outputs < self.min_tokens:
            return None
        found = [(at, stop) for stop in self.stops if (at := self.text.find(stop, searched)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if self.keep_stop else at]
        return stop

    def safe_text(self) -> str:
        """The text without an end that may turn out to be the beginning of a stop string, and be cut."""
        if self.keep_stop:
            return self.text
        for at in range(max(0, len(self.text) - max(map(len, self.stops)) + 1), len(self.text)):
            if any(stop.startswith(self.text[at:]) for stop in self.stops):
                return self.text[:at]
        return self.text
