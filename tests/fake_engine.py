"""An engine without a model: it "generates" the next letters after the prompt's last token, in a thread of its own.

Stands in for jaxllm.engine.engine.Engine in tests of the API and the command line. Token ids are bytes, 0 is the end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from jaxllm.engine.request import FinishReason, Logprob, Request, Update

VOCAB_SIZE = 256
MAX_SEQ_LEN = 200


class FakeTokenizer:
    """One token per byte; 0 is the (special) end token."""

    vocab_size = VOCAB_SIZE
    eos_token_id = 0
    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(
        self, ids: list[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        return bytes(i for i in ids if i or not skip_special_tokens).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


class FakeDecoder:
    """Stands in for jaxllm.engine.tokenizer.IncrementalDecoder; holds back an unfinished UTF-8 character."""

    made_in: list[int] = []  # noqa: RUF012 - threads that decoded, for a test

    def __init__(self, tokenizer: FakeTokenizer, **kwargs: Any) -> None:
        self.pending = b""

    def decode(self, ids: list[int]) -> str:
        FakeDecoder.made_in.append(threading.get_ident())
        self.pending += bytes(i for i in ids if i)
        for cut in range(len(self.pending), max(len(self.pending) - 4, -1), -1):
            try:
                text = self.pending[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.pending = self.pending[cut:]
            return text
        return ""

    def flush(self) -> str:
        text, self.pending = self.pending.decode(errors="replace"), b""
        return text


class FakeEngine:
    """Answers every request with consecutive bytes; knobs: `hold` pauses it, `die` kills it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.tokenizer = None if config.skip_tokenizer_init else FakeTokenizer()
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE)
        self.start_report = {"load": 0.1, "compile": 0.2}
        self.inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.aborted: set[int] = set()
        self.go = threading.Event()
        self.go.set()
        self.death: Exception | None = None
        self.steps = 0
        self.stopped = False
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        if self.death is not None:
            raise self.death
        if len(request.prompt_token_ids) >= MAX_SEQ_LEN:
            raise ValueError(f"the prompt has {len(request.prompt_token_ids)} tokens, at most {MAX_SEQ_LEN - 1} fit")
        self.inbox.put(request)

    def abort(self, request_id: int) -> None:
        self.aborted.add(request_id)

    def stats(self) -> dict[str, Any]:
        phases = {"schedule": 0.1, "pack": 0.2, "dispatch": 0.3, "update": 0.4}
        return {"host_ms": {**phases, "steps": self.steps}, "host_cpu_ms": phases}

    def shutdown(self) -> None:
        self.stopped = True
        self.inbox.put(None)
        self.thread.join(5)

    def _loop(self) -> None:
        """Every step gives each running sequence one token, as continuous batching does."""
        running: list[Iterator[None]] = []
        while not self.stopped:
            self.go.wait(5)
            while not running or not self.inbox.empty():
                request = self.inbox.get()
                if request is None:
                    return
                running += [self._run(request, index) for index in range(request.params.n)]
            time.sleep(0.0003)
            self.steps += 1
            running = [sequence for sequence in running if next(sequence, self) is not self]

    def _run(self, request: Request, index: int) -> Iterator[None]:
        assert request.on_update is not None
        params: Any = request.params
        token = request.prompt_token_ids[-1]
        if token == ord("!"):
            request.on_update(Update(index, [], error=RuntimeError("the engine broke on this request")))
            return
        for count in range(1, (params.max_tokens or 10) + 1):
            if self.death is not None:
                request.on_update(Update(index, [], error=self.death))
                return
            if request.request_id in self.aborted:
                request.on_update(Update(index, [], finish_reason=FinishReason.CANCELLED))
                return
            token = (token + 1) % VOCAB_SIZE
            reason = stop = None
            if token in (params.stop_token_ids or ()):
                reason, stop = FinishReason.STOP, token
            elif count == (params.max_tokens or 10):
                reason = FinishReason.LENGTH
            logprobs = None
            if params.logprobs is not None:
                logprobs = [{token: Logprob(-1.0 / (index + 1), 1)}]
            request.on_update(Update(index, [token], logprobs, finish_reason=reason, stop_reason=stop))
            if reason:
                return
            yield
