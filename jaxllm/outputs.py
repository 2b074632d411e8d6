"""RequestOutput: the result of a prompt with its text. The future and iterator it is, is in jaxllm/result.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxllm.result import CompletionOutput, GenerationResult, RequestTiming

if TYPE_CHECKING:
    from jaxllm.engine.tokenizer import IncrementalDecoder

__all__ = ["CompletionOutput", "GenerationResult", "RequestOutput", "RequestTiming"]


class RequestOutput(GenerationResult):
    """A GenerationResult with the prompt's text and the text of its outputs.

    Args:
        prompt: the prompt as text, None when it was given as token ids.
        make_decoder: makes a fresh incremental decoder for each output; None = no text is made.
        strip_stop_token: leave the stop token that ended a sequence out of its text.
        echo: outputs begin with the prompt (`exclude_input_from_output=False`).
        keep: with `best_of`, how many of the outputs to keep, best cumulative log-probability first.
        keep_logprobs: False when logprobs were only computed to rank the outputs.
    """

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        num_outputs: int = 1,
        *,
        streaming: bool = False,
        abort: Callable[[int], None] | None = None,
        make_decoder: Callable[[], IncrementalDecoder] | None = None,
        strip_stop_token: bool = True,
        echo: bool = False,
        keep: int | None = None,
        keep_logprobs: bool = True,
    ) -> None:
        super().__init__(request_id, prompt_token_ids, num_outputs, streaming=streaming, abort=abort)
        self.prompt = prompt
        self._decoders = [make_decoder() for _ in self.outputs] if make_decoder is not None else []
        self._strip_stop_token = strip_stop_token
        self._keep = keep
        self._keep_logprobs = keep_logprobs
        self._echo = echo
        self._echoed_text = 0

    @classmethod
    def failed(
        cls, request_id: int, prompt: str | None, prompt_token_ids: list[int], error: Exception
    ) -> RequestOutput:
        """The output of a request that was refused: no tokens, finish_reason "error", and `error` set."""
        output = cls(request_id, prompt, prompt_token_ids)
        output._fail(error)
        output._closed = True
        return output

    def _begin(self) -> None:
        if self._echo:
            for output in self.outputs:
                output.token_ids.extend(self.prompt_token_ids)
            for output, decoder in zip(self.outputs, self._decoders, strict=False):
                output.text = decoder.decode(self.prompt_token_ids)
                self._echoed_text = len(output.text)

    def _make_text(self, output: CompletionOutput, new_tokens: list[int], text: str | None, ended: bool) -> None:
        if not self._decoders:
            return
        if text is not None:
            output.text = output.text[: self._echoed_text] + text
            return
        decoder = self._decoders[output.index]
        if ended and self._strip_stop_token and new_tokens and new_tokens[-1] == output.stop_reason:
            new_tokens = new_tokens[:-1]
        output.text += decoder.decode(new_tokens)
        if ended:
            output.text += decoder.flush()

    def _finish(self) -> None:
        if self._keep is not None and self.error is None:
            ranked = sorted(self.outputs, key=lambda output: -(output.cumulative_logprob or 0.0))
            self.outputs = ranked[: self._keep]
            for index, output in enumerate(self.outputs):
                output.index = index
                if not self._keep_logprobs:
                    output.logprobs = None

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids}, outputs={self.outputs}, finished={self.finished}"
            + (f", error={self.error!r})" if self.error is not None else ")")
        )
