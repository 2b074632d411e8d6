"""Logprobs of prompt tokens, from the hidden states that a step leaves of its prompts' chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxllm.engine.forward import shapes_of
from jaxllm.engine.pipeline import Stage
from jaxllm.engine.request import Sequence
from jaxllm.engine.step import Chunk
from jaxllm.layers.sampling import SampleOutput
from jaxllm.sampling_params import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of prompt tokens [start, start + count), still on the device, one SampleOutput for each tile of rows."""

    seq: Sequence
    start: int
    count: int
    parts: list[SampleOutput]


class PromptScorer:
    """The programs for it, on the last stage's devices.

    programs: those that `jobs` names, by the same keys, once somebody has compiled them.
    """

    def __init__(self, stage: Stage, tile: int):
        self.programs: dict[Any, Any] = {}
        self._stage = stage
        self._tile = tile
        self._replicated = stage.functions.layout.sharding(stage.mesh)

    def jobs(self, token_counts: Iterable[int]) -> dict[Any, Callable[[], Callable[..., Any]]]:
        """Every program by its key, and how to compile it, for steps of these numbers of tokens on each rank."""
        jobs: dict[Any, Callable[[], Callable[..., Any]]] = {
            ("hidden_of", tokens): partial(self._compile_hidden_of, tokens) for tokens in token_counts
        }
        return jobs | {"prompt_logprobs": self._compile_logprobs}

    def _compile_hidden_of(self, tokens: int) -> Callable[..., Any]:
        """The hidden states of a tile's worth of a step's tokens, of which each rank has `tokens`."""
        hidden = self._stage.hidden(tokens)
        index = jax.ShapeDtypeStruct((self._tile,), np.int32, sharding=self._replicated)
        jitted = jax.jit(lambda hidden_TD, index: hidden_TD[index], out_shardings=self._replicated)
        return jitted.lower(hidden, index).compile()

    def _compile_logprobs(self) -> Callable[..., Any]:
        functions = self._stage.functions
        hidden = jax.ShapeDtypeStruct(
            (self._tile, functions.cfg.hidden_size), functions.layout.dtype, sharding=self._replicated
        )
        tokens = jax.ShapeDtypeStruct((self._tile,), np.int32, sharding=self._replicated)
        jitted = jax.jit(functions.token_logprobs(MAX_LOGPROBS), out_shardings=self._replicated)
        return jitted.lower(shapes_of(self._stage.head), hidden, tokens).compile()

    def wants(self, chunk: Chunk) -> bool:
        """Whether somebody asked for the logprobs of this part of a prompt."""
        seq = chunk.seq
        wanted = getattr(seq.request.params, "prompt_logprobs", None) is not None and seq.index == 0
        return wanted and chunk.start < seq.num_prompt - 1

    def launch(self, chunk: Chunk, index_T: np.ndarray, hidden_TD: jax.Array, tokens: int) -> PromptLogprobs:
        """Launches what a chunk needs: hidden state i of a prompt says what token i + 1 should be.

        index_T: where in hidden_TD the chunk's tokens are. tokens: of the step, on each rank.
        """
        seq, tile = chunk.seq, self._tile
        stop = min(chunk.stop, seq.num_prompt - 1)
        take = self.programs["hidden_of", tokens]
        parts = []
        for start in range(chunk.start, chunk.stop, tile):
            index, targets = np.zeros((2, tile), np.int32)
            here = index_T[start - chunk.start :][:tile]
            index[: len(here)] = here
            following = seq.tokens[start + 1 : min(start + tile, stop) + 1]
            targets[: len(following)] = following
            parts.append(self.programs["prompt_logprobs"](self._stage.head, take(hidden_TD, index), targets))
        return PromptLogprobs(seq, chunk.start + 1, stop - chunk.start, parts)
