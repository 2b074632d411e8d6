"""Which requests a scheduler can never serve, because of its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.engine.chunks import Chunks
from jaxllm.engine.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Nothing here ever changes, so any thread may ask.

    max_seq_len: prompt and output tokens of one sequence. room: tokens that the page pool holds. chunks: None where
    prompts are computed in as many steps as they need, otherwise what fits in one.
    """

    max_seq_len: int
    room: int
    chunks: Chunks | None

    def check(self, request: Request) -> None:
        """ValueError when a request can never run."""
        length = len(request.prompt_token_ids)
        if length > self.max_seq_len - 1:
            if self.max_seq_len == self.room + 1:  # lowered to what the pool holds
                raise ValueError(
                    f"the prompt has {length} tokens, but the KV cache holds {self.room}: "
                    "shorten it or raise kv_cache_config.max_tokens or free_gpu_memory_fraction"
                )
            raise ValueError(
                f"the prompt has {length} tokens, but max_seq_len {self.max_seq_len} leaves room for "
                f"{self.max_seq_len - 1} and one output token: shorten it or raise max_seq_len"
            )
        if self.chunks is not None and not self.chunks.fit_one_step(length):
            limit = min(self.chunks.max_num_tokens, self.chunks.tile * self.chunks.max_tiles)
            raise ValueError(
                f"the prompt has {length} tokens, but one step computes {limit} and chunked prefill is off: "
                "shorten it, raise max_num_tokens or set enable_chunked_prefill"
            )
        if request.params.max_tokens is not None and request.params.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.params.max_tokens}, but it has to be at least 1")
