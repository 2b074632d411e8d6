"""The sampler of a runner: its programs, and what the last stage's devices keep of each slot for them.

That is how often a sequence has said each token, for penalties, and which tokens it may choose from, for structured
outputs. What a sequence asks for is in the `SlotTable` on the host; how a token is sampled, in `layers/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxllm.engine.batch import PackedStep
from jaxllm.engine.forward import StepFunctions, shapes_of
from jaxllm.engine.request import Sequence
from jaxllm.engine.slots import SlotTable, Variant
from jaxllm.engine.step import LaneSteps, Step
from jaxllm.layers.sampling import (
    PenaltyState,
    SampleOutput,
    SamplingBatch,
    init_masks,
    init_penalties,
    reset_slots,
    sample,
    set_masks,
)
from jaxllm.sampling_params import MAX_LOGPROBS

_MASKS = 16  # masks that cross to the device together


class Sampler:
    """See the module.

    functions: those of the last stage. num_slots: with the spare one. programs: those that `jobs` names, by the same
    keys, once somebody has compiled them.
    """

    def __init__(self, functions: StepFunctions, slots: SlotTable, *, num_slots: int, max_seq_len: int):
        self.functions = functions
        self.slots = slots
        self.max_seq_len = max_seq_len
        self.programs: dict[Any, Any] = {}
        self._replicated = functions.layout.sharding(functions.mesh)
        on_devices = partial(jax.device_put, device=self._replicated)
        self._last_token = jax.ShapeDtypeStruct((num_slots,), np.int32, sharding=self._replicated)
        self._penalties: PenaltyState = on_devices(init_penalties(num_slots, functions.padded_vocab))
        self._masks: jax.Array = on_devices(init_masks(num_slots, functions.padded_vocab))
        self._last_bias: dict[Any, tuple[tuple[tuple[int, int, float], ...], tuple[jax.Array, ...]]] = {}

    # ---- programs -------------------------------------------------------------------------------------------------

    def jobs(self, row_counts: Iterable[int]) -> dict[Any, Callable[[], Callable[..., Any]]]:
        """Every program by its key, and how to compile it, for steps of these numbers of rows."""
        jobs: dict[Any, Callable[[], Callable[..., Any]]] = {
            (rows, variant): partial(self._compile_sampler, rows, variant) for rows in row_counts for variant in Variant
        }
        return jobs | {"reset": self._compile_reset, "masks": self._compile_masks}

    def function(self, variant: Variant) -> Callable[..., tuple[SampleOutput, jax.Array, PenaltyState | None]]:
        """The sampler as a function of (logits_RV, last_token, state, batch, masks_WU)."""
        full = variant is not Variant.PLAIN

        def run(
            logits_RV: jax.Array,
            last_token: jax.Array,
            state: PenaltyState | None,
            batch: SamplingBatch,
            masks_WU: jax.Array | None = None,
        ) -> tuple[SampleOutput, jax.Array, PenaltyState | None]:
            logits_RV = jax.lax.with_sharding_constraint(logits_RV, self._replicated)
            output, state = sample(
                logits_RV,
                batch,
                state,
                self.functions.cfg.vocab_size,
                penalties=full,
                num_logprobs=MAX_LOGPROBS if full else 0,
                masks_WU=masks_WU,
            )
            return output, last_token.at[batch.slot].set(output.token_R), state

        return run

    def abstract_batch(self, rows: int, variant: Variant) -> SamplingBatch:
        """Shapes of what the sampler is told about each row."""
        batch = self.batch(np.full(rows, self.slots.spare), np.zeros(rows, np.int32), [], variant)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), batch)

    def _compile_sampler(self, rows: int, variant: Variant) -> Callable[..., Any]:
        functions = self.functions
        vocab = functions.layout.sharding(functions.mesh, None, "vocab")
        logits = jax.ShapeDtypeStruct((rows, functions.padded_vocab), np.float32, sharding=vocab)
        full = variant is not Variant.PLAIN
        state = shapes_of(self._penalties) if full else None
        masks = shapes_of(self._masks) if full else None
        args = (logits, self._last_token, state, self.abstract_batch(rows, variant), masks)
        jitted = jax.jit(self.function(variant), donate_argnums=(1, 2), out_shardings=self._replicated)
        return jitted.lower(*args).compile()

    def _compile_reset(self) -> Callable[..., Any]:
        jitted = jax.jit(reset_slots, donate_argnums=0, out_shardings=self._replicated)
        tokens = self._ints(1, self.max_seq_len)
        return jitted.lower(shapes_of(self._penalties), self._ints(1), tokens, self._ints(1)).compile()

    def _compile_masks(self) -> Callable[..., Any]:
        jitted = jax.jit(set_masks, donate_argnums=0, out_shardings=self._replicated)
        return jitted.lower(shapes_of(self._masks), self._ints(_MASKS), self._ints(_MASKS, self.mask_words)).compile()

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._replicated)

    def release(self) -> None:
        """Gives the device memory back; nothing can be sampled afterwards."""
        self.programs = {}
        del self._penalties, self._masks

    # ---- slots ----------------------------------------------------------------------------------------------------

    def reset_penalties(self, seq: Sequence) -> None:
        """Starts the token counts of a sequence's slot with the tokens it holds so far."""
        tokens = np.full((1, self.max_seq_len), -1, np.int32)
        tokens[0, : len(seq.tokens)] = seq.tokens
        slot, prompt = np.array([seq.slot], np.int32), np.array([seq.num_prompt], np.int32)
        self._penalties = self.programs["reset"](self._penalties, slot, tokens, prompt)

    @property
    def mask_words(self) -> int:
        """Words of 32 bits in the mask of a slot."""
        words: int = self._masks.shape[1]
        return words

    def set_masks(self, slots: list[int], words: np.ndarray) -> None:
        """What the next step that samples for these slots may choose from: int32 [slots, mask_words], bit 1 = allowed.

        It stays until it is set again. Only these rows cross to the device.
        """
        for start in range(0, len(slots), _MASKS):
            slot = np.full(_MASKS, self.slots.spare + 1, np.int32)  # nobody's
            part = np.zeros((_MASKS, words.shape[1]), np.int32)
            count = min(_MASKS, len(slots) - start)
            slot[:count], part[:count] = slots[start : start + count], words[start : start + count]
            self._masks = self.programs["masks"](self._masks, slot, part)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def variant(self, step: Step | LaneSteps) -> Variant | None:
        """What the rows of a step need; None where all are plain greedy."""
        if self.slots.all_greedy:
            return None
        return self.slots.variant([seq.slot for seq in step.decodes] + [c.seq.slot for c in step.prefills if c.samples])

    def sample(
        self, packed: PackedStep, variant: Variant, logits_RV: jax.Array, last_token: jax.Array
    ) -> tuple[SampleOutput, jax.Array]:
        """Launches the sampler on a step's logits; last_token is donated, and comes back with the tokens written."""
        slots_R, positions_R = packed.sampled()
        bias: list[tuple[int, int, float]] = []
        if variant is Variant.FULL:
            for row, slot in enumerate(slots_R.tolist()):
                entry = self.slots.slots[slot]
                if entry is not None:
                    num_outputs = int(positions_R[row]) + 1 - entry.seq.num_prompt
                    bias += [(row, token, value) for token, value in entry.step_bias(num_outputs)]
        batch = self.batch(slots_R, positions_R + 1, bias, variant)
        state, masks = (None, None) if variant is Variant.PLAIN else (self._penalties, self._masks)
        program = self.programs[len(slots_R), variant]
        output, last_token, state = program(logits_RV, last_token, state, batch, masks)
        if state is not None:
            self._penalties = state
        return output, last_token

    def batch(
        self, slots_R: np.ndarray, positions_R: np.ndarray, bias: list[tuple[int, int, float]], variant: Variant
    ) -> SamplingBatch:
        """What each row asks for. bias: row, token and value of each changed logit."""
        bias_row, bias_token, bias_value = self._bias(len(slots_R), tuple(bias), variant)
        fields: dict[str, Any] = dict(
            position=positions_R.astype(np.int32),
            slot=slots_R.astype(np.int32),
            bias_row=bias_row,
            bias_token=bias_token,
            bias_value=bias_value,
            **self.slots.rows(slots_R),
        )
        return SamplingBatch(**fields)

    def _bias(self, rows: int, bias: tuple[tuple[int, int, float], ...], variant: Variant) -> tuple[jax.Array, ...]:
        """Row, token and value of the changed logits, on the devices; most steps have those of the step before."""
        key = (rows, variant)
        cached = self._last_bias.get(key)
        if cached is None or cached[0] != bias:
            capacity = variant.bias_capacity(rows)
            columns = [np.full(capacity, rows, np.int32), np.zeros(capacity, np.int32), np.zeros(capacity, np.float32)]
            for column, values in zip(columns, zip(*bias, strict=True), strict=False):
                column[: len(bias)] = values
            cached = self._last_bias[key] = (bias, tuple(jax.device_put(columns, self._replicated)))
        return cached[1]
