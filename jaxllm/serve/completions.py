"""/v1/completions: from a checked body to an answer, whole or as a stream of chunks."""

from __future__ import annotations

from typing import Any

from jaxllm.serve.answers import CompletionLogprobs, Envelope, usage
from jaxllm.serve.errors import bad_request
from jaxllm.serve.generation import Delta
from jaxllm.serve.jobs import Job, check_min_tokens
from jaxllm.serve.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from jaxllm.serve.server import Server


class CompletionJob(Job):
    """A completion of one prompt or many."""

    chunk_kind = "text_completion"

    def __init__(self, server: Server, body: CompletionRequest) -> None:
        super().__init__(server, body)
        self.completion = body
        self.envelope = Envelope("text_completion", "cmpl", server.model)
        self._texts: list[str] = []
        self._logprobs: dict[int, CompletionLogprobs] = {}
        # max_tokens 0 with echo asks for the prompt's logprobs only; the engine always samples one token.
        self._drop = body.max_tokens == 0

    async def start(self) -> None:
        body, server = self.completion, self.server
        if self._drop and not body.echo:
            raise bad_request("max_tokens = 0 makes sense with echo = true only", "max_tokens")
        params = body.engine_params()
        params["max_tokens"] = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        if body.logprobs is not None:
            params["logprobs"] = body.logprobs
            if body.echo:
                params["prompt_logprobs"] = body.logprobs
        check_min_tokens(params, server)
        prompts = []
        for given in body.prompts():
            if isinstance(given, str):
                prompt = await server.encode(given, body.add_special_tokens is not False)
            else:
                prompt = given
            if body.truncate_prompt_tokens is None:
                server.check_length(prompt, body.max_tokens, "prompt")
            prompts.append(prompt)
            self._texts.append(given if isinstance(given, str) else "")
        if body.echo:
            for number, prompt in enumerate(prompts):
                if not self._texts[number] or body.truncate_prompt_tokens is not None:
                    kept = prompt if body.truncate_prompt_tokens is None else prompt[-body.truncate_prompt_tokens :]
                    self._texts[number] = server.tokenizer.decode(kept, body.skip_special_tokens is not False)
        for prompt in prompts:
            self.generations.append(server.submit(body, prompt, params))

    def usage(self) -> dict[str, Any]:
        return usage(self.generations, len(self.generations) * self.n if self._drop else 0)

    def _index(self, number: int, index: int) -> int:
        return number * self.n + index

    def _make_logprobs(self, index: int, tokens: list[int], rows: list[Any] | None) -> dict[str, Any] | None:
        if self.completion.logprobs is None:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(self.server.tokenizer, self.completion.logprobs)
        return self._logprobs[index].make(tokens, rows or [])

    def opening(self, number: int) -> list[dict[str, Any]]:
        if not self.completion.echo:
            return []
        generation = self.generations[number]
        choices = []
        for index in range(self.n):
            where = self._index(number, index)
            rows = generation.prompt_logprobs
            choices.append({
                "index": where,
                "text": self._texts[number],
                "logprobs": None if rows is None else self._make_logprobs(where, generation.prompt, rows),
                "finish_reason": None,
            })  # fmt: skip
        return choices

    def choice(self, number: int, delta: Delta) -> dict[str, Any]:
        where = self._index(number, delta.index)
        tokens, rows = ([], []) if self._drop else (delta.tokens, delta.logprobs)
        choice: dict[str, Any] = {
            "index": where,
            "text": "" if self._drop else delta.text,
            "logprobs": self._make_logprobs(where, tokens, rows) if tokens else None,
            "finish_reason": "length" if self._drop and delta.finish_reason else delta.finish_reason,
        }
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = tokens
        return choice

    async def whole(self) -> dict[str, Any]:
        choices = []
        for number, sequences in enumerate(await self._collect()):
            generation = self.generations[number]
            for index, found in enumerate(sequences):
                tokens, rows, text = found.tokens, list[Any](found.rows), found.text
                if self._drop:
                    tokens, rows, text, found.finish_reason = [], [], "", "length"
                out_tokens = tokens
                if self.completion.echo:
                    text = self._texts[number] + text
                    tokens, rows = generation.prompt + tokens, (generation.prompt_logprobs or []) + rows
                where = self._index(number, index)
                choice = {
                    "index": where,
                    "text": text,
                    "logprobs": self._make_logprobs(where, tokens, rows),
                    "finish_reason": found.finish_reason,
                    "stop_reason": found.stop_reason,
                }
                if self.body.return_token_ids:
                    choice |= {"token_ids": out_tokens, "prompt_token_ids": generation.prompt}
                choices.append(choice)
        return self.envelope.wrap(choices, usage=self.usage())
