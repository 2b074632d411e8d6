"""The stages of a pipeline: each has some of the layers, on devices of its own, and runs every step's program in order.

Hidden states pass from one stage's devices to the next one's, sampled tokens from the last stage back to the first.
Both are copies that the devices make when their source is ready; the host never waits. One stage alone is the whole
model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxllm.engine.batch import BatchShape
from jaxllm.engine.forward import KV_AXES, StepFunctions, shapes_of
from jaxllm.engine.repeat import Sample, repeated


class Stage:
    """One stage: its functions and the weights, KV pages and programs on its mesh.

    num_pages: of each of the layout's pools, which is only described until `allocate`: compilers try products out in
    the memory that it will take.
    """

    def __init__(
        self,
        functions: StepFunctions,
        weights: dict[str, jax.Array],
        *,
        num_pages: int,
        page_size: int,
        kv_dtype: np.dtype,
    ):
        self.functions = functions
        self.mesh: Mesh = functions.mesh
        self.weights = functions.flatten(weights)
        self.head = functions.head(weights) if functions.last else None
        # A page of the pool is one, or with star attention several, on every rank that pages are spread over.
        each = num_pages * functions.layout.mapping.stripe(page_size) // page_size
        shape = (each * functions.layout.size("pages"), *functions.kv_shape(page_size))
        pages = jax.ShapeDtypeStruct(shape, kv_dtype, sharding=functions.layout.sharding(self.mesh, *KV_AXES))
        self.kv: list[Any] = [pages] * functions.num_layers
        if functions.loads is not None:
            counts, place = functions.loads
            self.kv.append(jax.ShapeDtypeStruct(counts, np.int32, sharding=NamedSharding(self.mesh, place)))
            self._no_loads = _zeros(self.kv[-1])
        self.programs: dict[Any, Any] = {}
        self.inputs: dict[Any, NamedSharding] = {}

    def allocate(self) -> None:
        """Takes the memory of the KV pages, which are zeros."""
        pool = _zeros(self.kv[0])
        self.kv[: self.functions.num_layers] = [pool() for _ in range(self.functions.num_layers)]
        if self.functions.loads is not None:
            self.kv[-1] = self._no_loads()

    def take_loads(self) -> jax.Array:
        """The tokens of each expert so far, see `StepFunctions.loads`; they are counted anew from here on."""
        taken = self.kv[-1]
        self.kv[-1] = self._no_loads()
        return taken

    def hidden(self, tokens: int) -> jax.ShapeDtypeStruct:
        """x_TD of a step with `tokens` tokens on each rank."""
        layout, width = self.functions.layout, self.functions.cfg.hidden_size
        sharding = NamedSharding(self.mesh, layout.stream(tokens, width))
        return jax.ShapeDtypeStruct((layout.size("tokens") * tokens, width), layout.dtype, sharding=sharding)

    def compile_step(self, shape: BatchShape, num_slots: int) -> Callable[..., Any]:
        """The program of this stage for one bucket; `num_slots` is the length of last_token."""
        functions = self.functions
        # Where the first stage is not the last, last_token is kept for the first stage to read.
        donated = (1, 2) if functions.first and functions.last else (1,)
        lowered = jax.jit(functions.forward(shape), donate_argnums=donated).lower(*self.arguments(shape, num_slots))
        return lowered.compile(self.functions.compiler_options(shape))

    def compile_repeated(
        self, shape: BatchShape, num_slots: int, steps: int, sampler: Sample | None, *sampling: Any
    ) -> Callable[..., Any]:
        """The program that does the step of a bucket `steps` times; the stage is the whole model. See `repeated`."""
        run = repeated(self.functions.forward(shape), shape, steps, sampler)
        lowered = jax.jit(run, donate_argnums=(1, 2)).lower(*self.arguments(shape, num_slots), *sampling)
        return lowered.compile(self.functions.compiler_options(shape))

    def arguments(self, shape: BatchShape, num_slots: int) -> list[Any]:
        """What the step of a bucket takes, as shapes."""
        functions, layout, mesh = self.functions, self.functions.layout, self.mesh
        last_token = jax.ShapeDtypeStruct((num_slots,), np.int32, sharding=layout.sharding(mesh))
        args = [
            *shapes_of((self.weights, self.kv)),
            last_token if functions.first or functions.last else None,
            jax.ShapeDtypeStruct(shape.shape, np.int32, sharding=layout.sharding(mesh, "requests")),
        ]
        if not functions.first:
            hidden = self.hidden(shape.bucket.tokens(shape.tile))
            args.append(hidden)
            self.inputs[shape.bucket] = hidden.sharding
        return args

    def release(self) -> None:
        """Gives the device memory back."""
        self.weights, self.kv, self.programs, self.head = [], [], {}, None
        if self.functions.group is not None:
            self.functions.group.close()


def _zeros(like: jax.ShapeDtypeStruct) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)


class ReturnedTokens:
    """The last token of each slot, on its way from the last stage to the first.

    The last stage's array of a step holds the tokens of that step and all before it. The first stage gets the array of
    the earliest step that has every token it needs, and never one of a later step: it would wait for that step to
    leave the pipeline, and so would the stages after it.

    keep: steps whose arrays are kept at most; a token that was sampled earlier comes with the oldest one.
    number: steps so far. step_here: which of them, from 1 on, the first stage's array is from; 0 for none.
    """

    def __init__(self, num_slots: int, first: NamedSharding, keep: int):
        self._first = first
        self._here = jax.device_put(np.zeros(num_slots, np.int32), first)
        self._step_of = np.zeros(num_slots, np.int64)  # number of the step that sampled each slot's last token
        self.step_here = 0
        self.number = 0
        self._arrays: deque[tuple[int, jax.Array]] = deque(maxlen=keep)

    def before(self, slots: np.ndarray) -> jax.Array:
        """The array for the first stage of a step that decodes these slots (the spare slot may be among them)."""
        needed = int(self._step_of[slots].max(initial=0))
        if needed > self.step_here:
            while self._arrays[0][0] < needed:
                self._arrays.popleft()
            self.step_here, array = self._arrays.popleft()
            self._here = jax.device_put(array, self._first)
        return self._here

    def after(self, slots: np.ndarray, array: jax.Array, spare: int) -> None:
        """Takes note of the last stage's array after a step that wrote these slots; nobody reads the spare one."""
        self.number += 1
        self._step_of[slots] = self.number
        self._step_of[spare] = 0
        self._arrays.append((self.number, array))
