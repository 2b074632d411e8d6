"""Runs scheduled steps on the devices: owns the stages, the sampler's programs and the slots' state.

Every program is compiled ahead of time and called with arrays only. Steps are launched one after the other by a single
thread; the devices run them in that order, which is what makes it safe to reuse a page or a slot in the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxllm.engine.balancer import Balancer
from jaxllm.engine.batch import PackedStep, Packer
from jaxllm.engine.buckets import Bucket, Picker
from jaxllm.engine.clock import HostClock
from jaxllm.engine.pipeline import ReturnedTokens, Stage
from jaxllm.engine.request import Sequence
from jaxllm.engine.slots import SlotTable, Variant
from jaxllm.engine.step import Chunk, LaneSteps, Step
from jaxllm.kernels.all_reduce.api import Group
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

_REPEATED = (None, Variant.PLAIN)
"""What repeated steps can sample with; None: the likeliest tokens."""
_MASKS = 16  # masks that cross to the device together


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of prompt tokens [start, start + count), still on the device, one SampleOutput for each tile of rows."""

    seq: Sequence
    start: int
    count: int
    parts: list[SampleOutput]


@dataclass(slots=True)
class InFlight:
    """A launched step. `read` waits for it. token_R has a leading axis where the step is repeated."""

    step: Step | LaneSteps
    packed: PackedStep
    token_R: jax.Array
    sampled: SampleOutput | None
    prompt_logprobs: list[PromptLogprobs]
    groups: list[Group]

    @property
    def arrived(self) -> bool:
        """Whether the devices are done, so that `read` waits for next to nothing."""
        ready: bool = self.token_R.is_ready()  # type: ignore[attr-defined]
        return ready

    def read(self) -> list[list[int]]:
        """Sampled token of each result row of the step, for each of its repeats. Blocks until the devices are done.

        Raises PeerError if one of them gave up on another.
        """
        tokens = np.asarray(self.token_R)
        for group in self.groups:
            group.raise_if_failed()
        return np.atleast_2d(tokens)[:, self.packed.rows].tolist()


class Runner:
    """See the module. `compile` must be called before the first `launch`."""

    def __init__(
        self,
        stages: list[Stage],
        *,
        buckets: list[Bucket],
        tile: int,
        page_size: int,
        max_batch_size: int,
        max_seq_len: int,
        slots: SlotTable,
        micro_batches: int = 1,
        repeats: int = 1,
    ):
        self.stages = stages
        # Of those stages whose experts move.
        self.balancers: list[Balancer] = []
        self._groups = [stage.functions.group for stage in stages if stage.functions.group is not None]
        # Decode steps of a dispatch, where it may have several.
        self.repeats = repeats
        # Everything that follows the last layer is on the last stage's devices.
        self.functions = functions = stages[-1].functions
        self.mesh = mesh = functions.mesh
        cfg, layout = functions.cfg, functions.layout
        self.slots = slots
        self.tile = tile
        self.max_seq_len = max_seq_len
        self.vocab_size = cfg.vocab_size
        self.buckets = buckets
        self.packer = Packer(
            tile=tile,
            width=-(-max_seq_len // layout.mapping.page_span(page_size)),
            max_batch_size=max_batch_size,
            layout=layout,
            page_size=page_size,
        )
        self._picker = Picker(buckets, tile)
        self._replicated = layout.sharding(mesh)
        # On a CPU the result is in host memory already, and asking for a copy costs half a millisecond.
        self._copies_to_host = mesh.devices.flat[0].platform != "cpu"
        assert stages[-1].head is not None
        self._head = stages[-1].head
        self._last_token = jax.device_put(np.zeros(max_batch_size + 1, np.int32), self._replicated)
        # For measurements: told when each stage was launched, and its output.
        self.watch: Callable[[list[float], list[jax.Array], ReturnedTokens], None] | None = None
        self._returned = None
        if len(stages) > 1:
            first = layout.sharding(stages[0].mesh)
            self._returned = ReturnedTokens(max_batch_size + 1, first, keep=micro_batches + 1)
        self._penalties: PenaltyState = jax.device_put(
            init_penalties(max_batch_size + 1, functions.padded_vocab), self._replicated
        )
        self._masks = jax.device_put(init_masks(max_batch_size + 1, functions.padded_vocab), self._replicated)
        self._programs: dict[Any, Any] = {}
        self._last_bias: dict[Any, tuple[tuple[tuple[int, int, float], ...], tuple[jax.Array, ...]]] = {}
        self.clock = HostClock("schedule", "pack", "dispatch", "wait", "update")

    # ---- programs -------------------------------------------------------------------------------------------------

    def _jobs(self) -> dict[Any, Callable[[], Callable[..., Any]]]:
        """Every program by its key, and how to compile it; the largest first, because they take longest."""
        jobs: dict[Any, Callable[[], Callable[..., Any]]] = {
            (stage, bucket): partial(stage.compile_step, self.packer.shape(bucket), self.packer.spare_slot + 1)
            for bucket in sorted(self.buckets, reverse=True)
            for stage in self.stages
        }
        lanes = self.functions.layout.size("requests")
        for rows in sorted({lanes * bucket.rows for bucket in self.buckets}, reverse=True):
            for variant in Variant:
                jobs[rows, variant] = partial(self._compile_sampler, rows, variant)
        for bucket in self._repeated_buckets():
            for choice in _REPEATED:
                jobs["repeated", bucket, choice] = partial(self._compile_repeated, bucket, choice)
        for tokens in sorted({b.tokens(self.tile) for b in self.buckets if b.tiles}):
            jobs["hidden_of", tokens] = partial(self._compile_hidden_of, tokens)
        for number, balancer in enumerate(self.balancers):
            jobs["balance", number] = balancer.compile
        return jobs | {
            "reset": self._compile_reset,
            "masks": self._compile_masks,
            "prompt_logprobs": self._compile_prompt_logprobs,
        }

    @property
    def num_programs(self) -> int:
        """Programs that `compile` makes."""
        return len(self._jobs())

    def compile(self, workers: int, on_done: Callable[[str], None] = lambda name: None) -> None:
        """Compiles every program, `workers` at a time; `on_done` is told the name of each."""

        def run(job: tuple[Any, Callable[[], Callable[..., Any]]]) -> tuple[Any, Callable[..., Any]]:
            program = job[1]()
            on_done(str(job[0]))
            return job[0], program

        with ThreadPoolExecutor(workers, "compile") as pool:
            programs = dict(pool.map(run, self._jobs().items()))
        for stage in self.stages:
            stage.programs = {bucket: programs.pop((stage, bucket)) for bucket in self.buckets}
        self._programs = programs

    def scratch_bytes(self) -> int:
        """Device memory that the hungriest program needs besides its arguments and the outputs that alias them."""
        programs = [*self._programs.values(), *(p for stage in self.stages for p in stage.programs.values())]
        sizes = [program.memory_analysis() for program in programs]
        return max(s.temp_size_in_bytes + max(0, s.output_size_in_bytes - s.alias_size_in_bytes) for s in sizes)

    def warm_up(self) -> None:
        """Runs every step program once on padding rows: first calls allocate and, on a GPU, load kernels."""
        nothing = LaneSteps([Step()] * self.functions.layout.size("requests"))
        for bucket in self.buckets:
            self._forward(self.packer.pack(nothing, bucket))
        for bucket in self._repeated_buckets():
            for choice in _REPEATED:
                self._forward_repeated(self.packer.pack(nothing, bucket), choice)
        jax.block_until_ready(self._last_token)
        for group in self._groups:
            group.raise_if_failed()

    def _abstract(self, value: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value)

    def _repeated_buckets(self) -> list[Bucket]:
        """The buckets that there is a program of several steps for."""
        return [bucket for bucket in self.buckets if not bucket.tiles] if self.repeats > 1 else []

    def _compile_repeated(self, bucket: Bucket, variant: Variant | None) -> Callable[..., Any]:
        (stage,) = self.stages
        shape, num_slots = self.packer.shape(bucket), self.packer.spare_slot + 1
        if variant is None:
            return stage.compile_repeated(shape, num_slots, self.repeats, None)
        rows = self.functions.layout.size("requests") * bucket.rows
        batch = self._abstract_sampling(rows, variant)
        return stage.compile_repeated(shape, num_slots, self.repeats, self._sampler(variant), batch)

    def _sampler(self, variant: Variant) -> Callable[..., tuple[SampleOutput, jax.Array, PenaltyState | None]]:
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
                self.vocab_size,
                penalties=full,
                num_logprobs=MAX_LOGPROBS if full else 0,
                masks_WU=masks_WU,
            )
            return output, last_token.at[batch.slot].set(output.token_R), state

        return run

    def _abstract_sampling(self, rows: int, variant: Variant) -> SamplingBatch:
        """Shapes of what the sampler is told about each row."""
        batch = self._sampling_batch(np.full(rows, self.slots.spare), np.zeros(rows, np.int32), [], variant)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), batch)

    def _compile_sampler(self, rows: int, variant: Variant) -> Callable[..., Any]:
        logits = jax.ShapeDtypeStruct(
            (rows, self.functions.padded_vocab),
            np.float32,
            sharding=self.functions.layout.sharding(self.mesh, None, "vocab"),
        )
        full = variant is not Variant.PLAIN
        state = self._abstract(self._penalties) if full else None
        masks = self._abstract(self._masks) if full else None
        args = (logits, self._abstract(self._last_token), state, self._abstract_sampling(rows, variant), masks)
        jitted = jax.jit(self._sampler(variant), donate_argnums=(1, 2), out_shardings=self._replicated)
        return jitted.lower(*args).compile()

    def _compile_reset(self) -> Callable[..., Any]:
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=self._replicated)  # noqa: E731
        jitted = jax.jit(reset_slots, donate_argnums=0, out_shardings=self._replicated)
        return jitted.lower(self._abstract(self._penalties), ints(1), ints(1, self.max_seq_len), ints(1)).compile()

    def _compile_masks(self) -> Callable[..., Any]:
        words = self.mask_words
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=self._replicated)  # noqa: E731
        jitted = jax.jit(set_masks, donate_argnums=0, out_shardings=self._replicated)
        return jitted.lower(self._abstract(self._masks), ints(_MASKS), ints(_MASKS, words)).compile()

    def _compile_hidden_of(self, tokens: int) -> Callable[..., Any]:
        """The hidden states of a tile's worth of a step's tokens, of which each rank has `tokens`."""
        hidden = self.stages[-1].hidden(tokens)
        index = jax.ShapeDtypeStruct((self.tile,), np.int32, sharding=self._replicated)
        jitted = jax.jit(lambda hidden_TD, index: hidden_TD[index], out_shardings=self._replicated)
        return jitted.lower(hidden, index).compile()

    def _compile_prompt_logprobs(self) -> Callable[..., Any]:
        hidden = jax.ShapeDtypeStruct(
            (self.tile, self.functions.cfg.hidden_size), self.functions.layout.dtype, sharding=self._replicated
        )
        tokens = jax.ShapeDtypeStruct((self.tile,), np.int32, sharding=self._replicated)
        jitted = jax.jit(self.functions.token_logprobs(MAX_LOGPROBS), out_shardings=self._replicated)
        return jitted.lower(self._abstract(self._head), hidden, tokens).compile()

    def expert_stats(self) -> dict[str, float]:
        """Of moving experts: busiest device relative to the mean, when last read, and layers moved so far."""
        if not self.balancers:
            return {}
        uneven = [balancer.imbalance for balancer in self.balancers]
        moved = sum(balancer.moved for balancer in self.balancers)
        return {"expert_imbalance": sum(uneven) / len(uneven), "expert_layers_moved": moved}

    def release(self) -> None:
        """Gives the device memory of weights and pages back; nothing can be launched afterwards."""
        self.balancers = []
        for stage in self.stages:
            stage.release()
        self._programs = {}
        del self._head, self._penalties, self._masks, self._last_token, self._returned

    # ---- a step ---------------------------------------------------------------------------------------------------

    def launch(self, step: Step | LaneSteps) -> InFlight:
        """Launches a step and returns at once; nothing here waits for the device."""
        started = self.clock.now()
        packed = self.packer.pack(step, self._picker.pick(*self.packer.needs(step)))
        packed_at = self.clock.add("pack", started)
        variant, sampled = self._variant(step), None
        if step.repeats > 1:
            token_R, hidden_TD = self._forward_repeated(packed, variant), None
        else:
            token_R, logits_RV, hidden_TD = self._forward(packed)
            if variant is not None:
                sampled = self._sample(packed, variant, logits_RV)
                token_R = sampled.token_R
        if self._returned is not None:
            self._returned.after(packed.sampled()[0], self._last_token, self.packer.spare_slot)
        prompt_logprobs = [
            self._prompt_logprobs(chunk, packed, start, hidden_TD)
            for chunk, start in zip(step.prefills, packed.starts, strict=True)
            if _wants_prompt_logprobs(chunk)
        ]
        if self._copies_to_host:
            token_R.copy_to_host_async()
        for balancer in self.balancers:
            balancer.after_step()
        self.clock.add("dispatch", packed_at)
        return InFlight(step, packed, token_R, sampled, prompt_logprobs, self._groups)

    def _variant(self, step: Step | LaneSteps) -> Variant | None:
        """Of the sampler that the rows of a step need; None where all are plain greedy."""
        if self.slots.all_greedy:
            return None
        return self.slots.variant([seq.slot for seq in step.decodes] + [c.seq.slot for c in step.prefills if c.samples])

    def can_repeat(self, step: Step | LaneSteps) -> bool:
        """Whether there is a program that does this step of decodes several times.

        Penalties, logprobs, and what changes logits (bias, bad words, min_tokens) want to hear of every token.
        """
        return self.repeats > 1 and not step.prefills and self._variant(step) in _REPEATED

    def reset_penalties(self, seq: Sequence) -> None:
        """Starts the token counts of a sequence's slot with the tokens it holds so far."""
        tokens = np.full((1, self.max_seq_len), -1, np.int32)
        tokens[0, : len(seq.tokens)] = seq.tokens
        slot, prompt = np.array([seq.slot], np.int32), np.array([seq.num_prompt], np.int32)
        self._penalties = self._programs["reset"](self._penalties, slot, tokens, prompt)

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
            self._masks = self._programs["masks"](self._masks, slot, part)

    def _forward(self, packed: PackedStep) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if self._returned is not None:
            return self._forward_stages(packed, self._returned)
        (stage,) = self.stages
        token_R, logits_RV, hidden_TD, self._last_token, stage.kv = stage.programs[packed.shape.bucket](
            stage.weights, stage.kv, self._last_token, packed.data
        )
        return token_R, logits_RV, hidden_TD

    def _forward_repeated(self, packed: PackedStep, variant: Variant | None) -> jax.Array:
        """Launches several decode steps at once; the tokens of each."""
        (stage,) = self.stages
        sampling: list[SamplingBatch] = []
        if variant is not None:
            slots_R, positions_R = packed.sampled()
            sampling = [self._sampling_batch(slots_R, positions_R + 1, [], variant)]
        token_LR, self._last_token, stage.kv = self._programs["repeated", packed.shape.bucket, variant](
            stage.weights, stage.kv, self._last_token, packed.data, *sampling
        )
        return token_LR

    def _forward_stages(
        self, packed: PackedStep, returned: ReturnedTokens
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Launches the step on every stage, one after the other; each waits on its devices for the one before."""
        bucket, (first, *between, last) = packed.shape.bucket, self.stages
        decoded = packed.shape.unpack(packed.data).slots_R[:, 0, : bucket.decodes]
        times = [time.perf_counter()]
        x_TD, first.kv = first.programs[bucket](first.weights, first.kv, returned.before(decoded), packed.data)
        outputs = [x_TD]
        for stage in between:
            times.append(time.perf_counter())
            x_TD = jax.device_put(x_TD, stage.inputs[bucket])
            x_TD, stage.kv = stage.programs[bucket](stage.weights, stage.kv, None, packed.data, x_TD)
            outputs.append(x_TD)
        times.append(time.perf_counter())
        x_TD = jax.device_put(x_TD, last.inputs[bucket])
        token_R, logits_RV, hidden_TD, self._last_token, last.kv = last.programs[bucket](
            last.weights, last.kv, self._last_token, packed.data, x_TD
        )
        if self.watch is not None:
            self.watch(times, [*outputs, token_R], returned)
        return token_R, logits_RV, hidden_TD

    def _sample(self, packed: PackedStep, variant: Variant, logits_RV: jax.Array) -> SampleOutput:
        slots_R, positions_R = packed.sampled()
        bias: list[tuple[int, int, float]] = []
        if variant is Variant.FULL:
            for row, slot in enumerate(slots_R.tolist()):
                entry = self.slots.slots[slot]
                if entry is not None:
                    num_outputs = int(positions_R[row]) + 1 - entry.seq.num_prompt
                    bias += [(row, token, value) for token, value in entry.step_bias(num_outputs)]
        batch = self._sampling_batch(slots_R, positions_R + 1, bias, variant)
        state, masks = (None, None) if variant is Variant.PLAIN else (self._penalties, self._masks)
        program = self._programs[len(slots_R), variant]
        output, self._last_token, state = program(logits_RV, self._last_token, state, batch, masks)
        if state is not None:
            self._penalties = state
        return output

    def _sampling_batch(
        self, slots_R: np.ndarray, positions_R: np.ndarray, bias: list[tuple[int, int, float]], variant: Variant
    ) -> SamplingBatch:
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

    def _prompt_logprobs(
        self, chunk: Chunk, packed: PackedStep, first: int, hidden_TD: jax.Array | None
    ) -> PromptLogprobs:
        """Hidden state i of a prompt says what token i + 1 should be."""
        seq = chunk.seq
        index_T = self.packer.token_index(packed, chunk, first)
        stop = min(chunk.stop, seq.num_prompt - 1)
        assert hidden_TD is not None  # there is a chunk
        take = self._programs["hidden_of", packed.shape.bucket.tokens(self.tile)]
        parts = []
        for start in range(chunk.start, chunk.stop, self.tile):
            index, targets = np.zeros((2, self.tile), np.int32)
            here = index_T[start - chunk.start :][: self.tile]
            index[: len(here)] = here
            following = seq.tokens[start + 1 : min(start + self.tile, stop) + 1]
            targets[: len(following)] = following
            parts.append(self._programs["prompt_logprobs"](self._head, take(hidden_TD, index), targets))
        return PromptLogprobs(seq, chunk.start + 1, stop - chunk.start, parts)


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    seq = chunk.seq
    wanted = getattr(seq.request.params, "prompt_logprobs", None) is not None and seq.index == 0
    return wanted and chunk.start < seq.num_prompt - 1
