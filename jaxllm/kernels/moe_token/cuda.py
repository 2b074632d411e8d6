"""One token from attention's result to the end of a layer with experts, by `cuda/moe_token.cu`, in one launch.

Its blocks wait for one another, so each must have a multiprocessor: the kernel is used where the GPU has as many as it
has blocks, and no two of its launches run side by side, for each one's token comes from the one before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import reference
from jaxllm.kernels.grouped_matmul.cuda import ACTIVATIONS
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.kernels.router.cuda import Choice

KERNEL = "moe_token"
WARPS = 8
PIECE = 256
"""Inputs that a warp multiplies at once."""
SLOT = 4096
"""Bytes of a stage of a warp's ring."""
MOST_SLOTS = 6
MEASURED = {"moe_token": False, "moe_layer": True}
"""Which kernels are used; the others only with `JAXLLM_CUDA=+moe_token`.

On an H200 a decode step of Qwen3-30B-A3B at batch 1 takes 2.46 ms by `moe_layer`, and 3.03 by a layer's parts.
`moe_token` took 41 us, as long as what it replaces."""


class Operands(NamedTuple):
    """What the kernel reads. attended and output: of the product before, or None; bias: of the choice, or None.

    x [1, D] is the residual stream; attended [1, A], output [D, A]; norm float32 [D]; router [E, D], bias float32 [E];
    gate_up [E, 2 * F, D], down [E, D, F].
    """

    x: jax.Array
    attended: jax.Array | None
    output: jax.Array | None
    norm: jax.Array
    router: jax.Array
    bias: jax.Array | None
    gate_up: jax.Array
    down: jax.Array


Kernel = Callable[[Operands], jax.Array]
"""The residual stream after the layer, [1, D]."""


def wanted(kernel: str) -> bool:
    """Whether a kernel of this folder is to be used where it can be."""
    return MEASURED[kernel] or f"+{kernel}" in os.environ.get("JAXLLM_CUDA", "").split(",")


def require(kernel: str) -> None:
    """As `call.require`, for kernels of this folder."""
    call.require(kernel)
    if not wanted(kernel):
        raise NotImplementedError("not measured")
    if jax.default_backend() == "gpu":
        processors = getattr(jax.local_devices()[0], "core_count", call.SMS)
        if processors < call.SMS:
            raise NotImplementedError(f"{processors} multiprocessors, and each block wants one of {call.SMS}")


def choose(operands: Operands, choice: Choice, *, activation: str) -> Kernel:
    """The kernel, compiled. Raises NotImplementedError where others must do the work."""
    require(KERNEL)
    return implementation(operands, choice, activation=activation)


def implementation(operands: Operands, choice: Choice, *, activation: str, slots: int | None = None) -> Kernel:
    """The kernel for arrays of these shapes, in a program for an H100 or H200 with `call.SMS` multiprocessors.

    slots: of a warp's ring; None for as many as fit.
    Raises NotImplementedError where there is none.
    """
    A = 0 if operands.attended is None else operands.attended.shape[1]
    macros, shared = macros_of(operands, A, choice, activation=activation, slots=slots)
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    (E, D, F), X = operands.down.shape, choice.chosen
    results = [
        jax.ShapeDtypeStruct((1, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((E,), jnp.float32),
        jax.ShapeDtypeStruct((X, F), jnp.bfloat16),
        jax.ShapeDtypeStruct((call.SMS,), jnp.int32),
    ]

    def run(operands: Operands) -> jax.Array:
        # What the kernel does not read must still be a pointer.
        arguments = [operands.x if operand is None else operand for operand in operands]
        arguments.append(jnp.zeros(call.SMS, jnp.int32))
        return call.launch(
            KERNEL,
            ptx,
            arguments,
            results,
            grid=(call.SMS,),
            threads=WARPS * 32,
            shared=shared,
            aliases={len(arguments) - 1: len(results) - 1},
        )[0]

    return run


def macros_of(
    operands: Operands, A: int, choice: Choice, *, activation: str, slots: int | None, beside: int = 0
) -> tuple[dict[str, object], int]:
    """Macros of `cuda/moe_token.cuh`, and bytes of shared memory, of which `beside` are for something else.

    A: inputs of the output product. Raises NotImplementedError for what the kernel cannot do.
    """
    x, _, output, _, router, bias, gate_up, down = operands
    (T, D), (E, _, F), X = x.shape, down.shape, choice.chosen
    used = [a for a in (x, output, router, gate_up, down) if a is not None]
    if any(a.dtype != jnp.bfloat16 for a in used) or ACTIVATIONS.get(activation, 0) == 0:
        raise NotImplementedError(f"{activation} of other dtypes than bfloat16")
    if T != 1 or any(size % PIECE for size in (D, F, A)) or router.shape[0] != E:
        raise NotImplementedError(f"{T} tokens, widths of {D}, {F} and {A}, {E} of {router.shape[0]} experts")
    rest = 2 * max(A, D, X * F) + WARPS * X * 8 + WARPS * 4 + beside
    slots = min(MOST_SLOTS, (call.MAX_SHARED - rest) // (WARPS * SLOT)) if slots is None else slots
    if slots < 3:
        raise NotImplementedError(f"inputs of {max(A, D, X * F)} numbers")
    macros = choice.macros(E, bias is not None) | {
        "WIDTH": D, "FFN": F, "ATTENDED": A, "EPS": f"{choice.eps!r}f", "GATED": ACTIVATIONS[activation],
        "BLOCKS": call.SMS, "WARPS": WARPS, "SLOTS": slots,
    }  # fmt: skip
    return macros, WARPS * slots * SLOT + rest


def plain(operands: Operands, choice: Choice, *, activation: str) -> jax.Array:
    """The same step by step in float32, [1, D]; what goes into a product is rounded as the kernel does."""
    x, attended, output, norm, router, bias, gate_up, down = operands
    dtype = x.dtype

    def wide(array: jax.Array) -> jax.Array:
        return array.astype(jnp.float32)

    if attended is not None and output is not None:
        x = (wide(x) + wide(attended) @ wide(output).T).astype(dtype)
    y = wide(rms_norm(x, (norm, choice.eps)))
    logits_TE = y @ wide(router).T
    score_TE = jax.nn.sigmoid(logits_TE) if choice.sigmoid else jax.nn.softmax(logits_TE)
    _, chosen_TX = jax.lax.top_k(score_TE if bias is None else score_TE + bias, choice.chosen)
    weights_TX = jnp.take_along_axis(score_TE, chosen_TX, axis=1)
    weights_TX = weights_TX / weights_TX.sum(axis=1, keepdims=True) if choice.normalise else weights_TX
    arguments = y, chosen_TX, weights_TX * choice.scale, wide(gate_up), wide(down)
    return wide(x) + reference.experts(*arguments, activation=activation, of=router.shape[0])


def random_operands(A: int, D: int, E: int, F: int, *, bias: bool = False, seed: int = 0) -> Operands:
    """Operands of a size that keeps what is added near what is there."""

    @jax.jit
    def make(key: jax.Array) -> Operands:
        keys = iter(jax.random.split(key, 8))

        def bf16(*shape: int, scale: float = 1.0) -> jax.Array:
            return jax.random.normal(next(keys), shape, jnp.bfloat16) * scale

        return Operands(
            bf16(1, D),
            bf16(1, A) if A else None,
            bf16(D, A, scale=A**-0.5) if A else None,
            jax.random.uniform(next(keys), (D,), jnp.float32, 0.5, 1.5),
            bf16(E, D, scale=4 * D**-0.5),
            jax.random.uniform(next(keys), (E,), jnp.float32) if bias else None,
            bf16(E, 2 * F, D, scale=D**-0.5),
            bf16(E, D, F, scale=2 * F**-0.5),
        )

    return make(jax.random.key(seed))


def difference(operands: Operands, found: jax.Array, choice: Choice) -> float:
    """Between a result and `plain`, as a share of what the layer adds to the stream."""
    wanted = jax.jit(lambda operands: plain(operands, choice, activation="silu"))(operands)
    a, b, start = (np.asarray(array, np.float32) for array in (found, wanted, operands.x))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - start))


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    for sizes, choice in (((512, 512, 16, 256), Choice(4, 1e-6)), ((0, 256, 40, 512), Choice(6, 1e-5, sigmoid=True))):
        operands = random_operands(*sizes, bias=choice.sigmoid)
        found = jax.jit(implementation(operands, choice, activation="silu"))(operands)
        error = difference(operands, found, choice)
        if not error < 0.02:
            raise ArithmeticError(f"wrong by {error:.1e} at A, D, E, F = {sizes}")
