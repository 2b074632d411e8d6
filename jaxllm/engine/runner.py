"""Runs scheduled steps on the devices: owns the stages, the sampler, and the programs of all.

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
from jaxllm.engine.prompt_logprobs import PromptLogprobs, PromptScorer
from jaxllm.engine.sampler import Sampler
from jaxllm.engine.slots import SlotTable, Variant
from jaxllm.engine.step import LaneSteps, Step
from jaxllm.kernels.all_reduce.api import Group
from jaxllm.layers.sampling import SampleOutput, SamplingBatch
from jaxllm.parallel.pace import paced

_REPEATED = (None, Variant.PLAIN)
"""What repeated steps can sample with; None: the likeliest tokens."""


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
        layout = functions.layout
        self.tile = tile
        self.buckets = buckets
        self.packer = Packer(
            tile=tile,
            width=-(-max_seq_len // layout.mapping.page_span(page_size)),
            max_batch_size=max_batch_size,
            layout=layout,
            page_size=page_size,
        )
        self._picker = Picker(buckets, tile)
        # On a CPU the result is in host memory already, and asking for a copy costs half a millisecond.
        self._copies_to_host = mesh.devices.flat[0].platform != "cpu"
        num_slots = max_batch_size + 1
        self._last_token = jax.device_put(np.zeros(num_slots, np.int32), layout.sharding(mesh))
        self.sampler = Sampler(functions, slots, num_slots=num_slots, max_seq_len=max_seq_len)
        self._scorer = PromptScorer(stages[-1], tile)
        # For measurements: told when each stage was launched, and its output.
        self.watch: Callable[[list[float], list[jax.Array], ReturnedTokens], None] | None = None
        self._returned = None
        if len(stages) > 1:
            first = layout.sharding(stages[0].mesh)
            self._returned = ReturnedTokens(num_slots, first, keep=micro_batches + 1)
        self._programs: dict[Any, Any] = {}
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
        jobs |= self.sampler.jobs(sorted({lanes * bucket.rows for bucket in self.buckets}, reverse=True))
        for bucket in self._repeated_buckets():
            for choice in _REPEATED:
                jobs["repeated", bucket, choice] = partial(self._compile_repeated, bucket, choice)
        jobs |= self._scorer.jobs(sorted({b.tokens(self.tile) for b in self.buckets if b.tiles}))
        for number, balancer in enumerate(self.balancers):
            jobs["balance", number] = balancer.compile
        return jobs

    @property
    def num_programs(self) -> int:
        """Programs that `compile` makes."""
        return len(self._jobs())

    def compile(self, workers: int, on_done: Callable[[str], None] = lambda name: None) -> None:
        """Compiles every program, `workers` at a time; `on_done` is told the name of each.

        XLA tries products out on the GPU, with memory of their own. A program for which there was none beside the
        others is compiled again by itself.
        """
        jobs = self._jobs()

        def run(name: Any) -> Callable[..., Any]:
            program = paced(jobs[name](), self.mesh)  # all stages have as many devices
            on_done(str(name))
            return program

        def attempt(name: Any) -> Callable[..., Any] | None:
            try:
                return run(name)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return None

        with ThreadPoolExecutor(workers, "compile") as pool:
            found = dict(zip(jobs, pool.map(attempt, jobs), strict=True))
        programs = {name: run(name) if program is None else program for name, program in found.items()}
        for stage in self.stages:
            stage.programs = {bucket: programs.pop((stage, bucket)) for bucket in self.buckets}
        self._programs = self.sampler.programs = self._scorer.programs = programs

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

    def _repeated_buckets(self) -> list[Bucket]:
        """The buckets that there is a program of several steps for."""
        return [bucket for bucket in self.buckets if not bucket.tiles] if self.repeats > 1 else []

    def _compile_repeated(self, bucket: Bucket, variant: Variant | None) -> Callable[..., Any]:
        (stage,) = self.stages
        shape, num_slots = self.packer.shape(bucket), self.packer.spare_slot + 1
        if variant is None:
            return stage.compile_repeated(shape, num_slots, self.repeats, None)
        rows = self.functions.layout.size("requests") * bucket.rows
        batch = self.sampler.abstract_batch(rows, variant)
        return stage.compile_repeated(shape, num_slots, self.repeats, self.sampler.function(variant), batch)

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
        self.sampler.release()
        self._programs = self._scorer.programs = {}
        del self._last_token, self._returned

    # ---- a step ---------------------------------------------------------------------------------------------------

    def launch(self, step: Step | LaneSteps) -> InFlight:
        """Launches a step and returns at once; nothing here waits for the device."""
        started = self.clock.now()
        packed = self.packer.pack(step, self._picker.pick(*self.packer.needs(step)))
        packed_at = self.clock.add("pack", started)
        variant, sampled = self.sampler.variant(step), None
        if step.repeats > 1:
            token_R, hidden_TD = self._forward_repeated(packed, variant), None
        else:
            token_R, logits_RV, hidden_TD = self._forward(packed)
            if variant is not None:
                sampled, self._last_token = self.sampler.sample(packed, variant, logits_RV, self._last_token)
                token_R = sampled.token_R
        if self._returned is not None:
            self._returned.after(packed.sampled()[0], self._last_token, self.packer.spare_slot)
        prompt_logprobs = []
        for chunk, start in zip(step.prefills, packed.starts, strict=True):
            if self._scorer.wants(chunk):
                assert hidden_TD is not None  # there is a chunk
                index_T, tokens = self.packer.token_index(packed, chunk, start), packed.shape.bucket.tokens(self.tile)
                prompt_logprobs.append(self._scorer.launch(chunk, index_T, hidden_TD, tokens))
        if self._copies_to_host:
            token_R.copy_to_host_async()
        for balancer in self.balancers:
            balancer.after_step()
        self.clock.add("dispatch", packed_at)
        return InFlight(step, packed, token_R, sampled, prompt_logprobs, self._groups)

    def can_repeat(self, step: Step | LaneSteps) -> bool:
        """Whether there is a program that does this step of decodes several times.

        Penalties, logprobs, and what changes logits (bias, bad words, min_tokens) want to hear of every token.
        """
        return self.repeats > 1 and not step.prefills and self.sampler.variant(step) in _REPEATED

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
            sampling = [self.sampler.batch(slots_R, positions_R + 1, [], variant)]
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
