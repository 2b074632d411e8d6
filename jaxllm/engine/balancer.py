"""Evens out the load of experts between steps, without a new program: experts move to other slots on the devices.

    count   each step adds the tokens of each expert to an array on the devices (`StepFunctions.loads`)
    read    every `every` steps the array is put aside for an empty one, and read when it is there: nobody waits
    choose  a placement for each layer (`jaxllm.placement`), if it evens out enough
    move    a few layers after each step: weights from slot to slot, then the table that finds them. Both are arguments
            of the step's programs, and the next step gets the new ones.

As the online load balancer of TensorRT-LLM's wide expert parallelism, whose `layer_updates_per_iter` this takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import placement
from jaxllm.engine.forward import shapes_of
from jaxllm.engine.pipeline import Stage
from jaxllm.parallel.collectives import all_reduce, rank
from jaxllm.parallel.expert import EP
from jaxllm.parallel.mesh import partition
from jaxllm.parallel.pace import paced

PAIRS = 2
"""Slots that one program fills at a time, from as many others."""
WORTH = 0.95
"""A layer is moved if its busiest rank would then have at most this share of the tokens that it has."""


@dataclass(slots=True)
class _Layer:
    """One mixture of a stage: the slots' experts, and where its weights and its table are among the stage's weights."""

    slots: placement.Slots
    weights: list[int]
    table: int


class Balancer:
    """Of one pipeline stage. Attributes: moved, layers that were; imbalance: mean over layers when last read."""

    def __init__(self, stage: Stage, *, layers_per_step: int, every: int):
        functions = stage.functions
        layout, cfg = functions.layout, functions.cfg
        assert layout.placement is not None and cfg.experts is not None
        self.num_experts = cfg.experts.count
        self.moved, self.imbalance = 0, 1.0
        self._stage, self._every, self._layers_per_step = stage, every, layers_per_step
        self._ranks = layout.mapping.ep
        self._layers = []
        for number in functions.mixtures:
            prefix = f"layers.{number - functions.layers.start}.mlp."
            stacks = [path for path, spec in functions.specs.items() if path.startswith(prefix) and spec.stacked]
            self._layers.append(
                _Layer(
                    layout.placement.of(number, self.num_experts),
                    [functions.weight_index(path) for path in stacks],
                    functions.weight_index(prefix + "slots"),
                )
            )
        self._axes = [partition(functions.specs[path].axes) for path in stacks]
        self._everywhere = layout.sharding(stage.mesh)
        self._steps = 0
        self._reading: Any = None  # a jax.Array; its type has no is_ready()
        self._waiting: deque[tuple[_Layer, placement.Slots]] = deque()
        self._move: Callable[..., list[jax.Array]] | None = None

    def compile(self) -> Callable[..., list[jax.Array]]:
        """The program that fills slots from others; all layers share it."""
        run = jax.shard_map(
            _move,
            mesh=self._stage.mesh,
            in_specs=(self._axes, partition(()), partition(())),
            out_specs=self._axes,
            check_vma=False,
        )
        slots = jax.ShapeDtypeStruct((PAIRS,), np.int32, sharding=self._everywhere)
        weights = shapes_of([self._stage.weights[index] for index in self._layers[0].weights])
        program = jax.jit(run, donate_argnums=0).lower(weights, slots, slots).compile()
        self._move = paced(program, self._stage.mesh)
        return self._move

    def after_step(self) -> None:
        """What there is to do between two steps; to be called by the thread that launches them."""
        self._steps += 1
        if self._reading is not None:
            if self._reading.is_ready():
                self._choose(np.asarray(self._reading).sum(axis=0))
                self._reading = None
        elif self._steps % self._every == 0 and not self._waiting:
            self._reading = self._stage.take_loads()
            self._reading.copy_to_host_async()
        for _ in range(min(self._layers_per_step, len(self._waiting))):
            self._put(*self._waiting.popleft())

    def _choose(self, load_LE: np.ndarray) -> None:
        found = []
        for layer, load in zip(self._layers, load_LE, strict=True):
            before = placement.imbalance(load, layer.slots, self._ranks)
            found.append(before)
            wanted = placement.choose(load, layer.slots, self._ranks)
            if placement.imbalance(load, wanted, self._ranks) <= WORTH * before:
                self._waiting.append((layer, wanted))
        self.imbalance = float(np.mean(found))

    def _put(self, layer: _Layer, wanted: placement.Slots) -> None:
        assert self._move is not None
        weights = self._stage.weights
        for pairs in placement.moves(layer.slots, wanted):
            source, to = (
                np.array(ends, np.int32) for ends in zip(*pairs, *[(0, -1)] * (PAIRS - len(pairs)), strict=True)
            )
            moved = self._move([weights[index] for index in layer.weights], source, to)
            for index, array in zip(layer.weights, moved, strict=True):
                weights[index] = array
        weights[layer.table] = jax.device_put(placement.table(wanted, self.num_experts), self._everywhere)
        layer.slots = wanted
        self.moved += 1


def _move(weights: list[jax.Array], source_M: jax.Array, to_M: jax.Array) -> list[jax.Array]:
    """The stacks of one rank's slots, of which those in `to` (-1: none) hold what `source` held, on whatever rank."""
    return [_fill(stack, source_M, to_M) for stack in weights]


def _fill(stack: jax.Array, source_M: jax.Array, to_M: jax.Array) -> jax.Array:
    local = stack.shape[0]
    first = rank(EP) * local
    here = (source_M >= first) & (source_M < first + local)
    rows = stack[jnp.where(here, source_M - first, 0)]
    # Bytes, not numbers: what is added to zeros is to stay what it is, whatever the dtype.
    rows = lax.bitcast_convert_type(rows, jnp.uint8)
    rows = all_reduce(jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0), EP)
    mine = (to_M >= first) & (to_M < first + local)
    rows = lax.bitcast_convert_type(rows, stack.dtype)
    return stack.at[jnp.where(mine, to_M - first, local)].set(rows, mode="drop")
