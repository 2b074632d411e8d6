"""Layers with grouped-query attention and experts for one token, by `cuda/moe_layers.cu`, many of them in one launch.

Its blocks wait for one another, so each must have a multiprocessor: the kernel is used where the GPU has as many as it
has blocks, and no two of its launches run side by side, for each one's token comes from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.cuda.timeline import MARKS
from jaxllm.kernels.grouped_matmul.cuda import ACTIVATIONS
from jaxllm.kernels.moe_token import reference
from jaxllm.kernels.moe_token.reference import Layer, Operands, Token
from jaxllm.kernels.router.cuda import Choice

KERNEL = "moe_layers"
HEAD_DIM = 128
MOST_GROUP = 8
"""Query heads of a KV head: half of the rows of a product."""
UNIT = 16
"""Tokens that a warp attends to at once."""
ALONE = 4
"""Units for each warp of a block up to which a KV head's context is not shared: to merge takes as long as two."""
WARPS = 8
PIECE = 256
"""Inputs that a warp multiplies at once."""
SLOT = 4096
"""Bytes of a stage of a warp's ring."""
MOST_SLOTS = 6
MOST_LAYERS = 24
"""Of a launch: each has 12 parameters, of which a kernel may have 512 everywhere."""
DEPTH = 3
"""Stages of a warp on their way while it multiplies: 2 of them take 0.4 us a layer more."""
PACE = 1
"""Stages of a warp on their way while it waits for what others tell: what is told comes late behind more."""
GUESS = 4
"""Stages of predicted experts that come before the choice."""
LITTLE = 0
"""1: one lane of a warp looks at what is not told yet, until it is there, and not all."""
PAUSE = 20
"""Nanoseconds between a warp's looks at what is not told yet: what it does not find, others read sooner."""
PHASES = (
    "wait for stream", "norm and qkv", "wait for queries", "attention", "merge", "wait for heads", "output", "scores",
    "wait for middle", "second norm", "wait for scores", "choice", "gate and up", "wait for hidden", "down",
)  # fmt: skip
"""Of the kernel, in their order; a timeline has the clock before the first and after each."""

Kernel = Callable[[Operands], tuple[jax.Array, list[jax.Array]]]
"""The residual stream after the layers, [1, D], and the pools."""


def choose(operands: Operands, choice: Choice, *, activation: str, scale: float) -> Kernel:
    """The kernel, compiled. Raises NotImplementedError where others must do the work."""
    call.require(KERNEL)
    if jax.default_backend() == "gpu":
        processors = getattr(jax.local_devices()[0], "core_count", call.SMS)
        if processors < call.SMS:
            raise NotImplementedError(f"{processors} multiprocessors, and each block wants one of {call.SMS}")
    return implementation(operands, choice, activation=activation, scale=scale)


def implementation(
    operands: Operands,
    choice: Choice,
    *,
    activation: str,
    scale: float,
    most: int = MOST_LAYERS,
    **options: Any,
) -> Kernel:
    """The kernel for arrays of these shapes, in a program for an H100 or H200 with `call.SMS` multiprocessors.

    scale: on q.k. most: layers of a launch. options: of `launcher`.
    Raises NotImplementedError where there is none.
    """
    token, layers = operands
    launches = -(-len(layers) // most)
    each = -(-len(layers) // launches)
    parts = [slice(at, at + each) for at in range(0, len(layers), each)]
    how: dict[str, Any] = {"activation": activation, "scale": scale, **options}
    run = {len(layers[part]): launcher(Operands(token, layers[part]), choice, **how) for part in parts}

    def all_of_them(operands: Operands) -> tuple[jax.Array, list[jax.Array]]:
        token, pools = operands.token, []
        for part in parts:
            layers = operands.layers[part]
            x, written, _ = run[len(layers)](Operands(token, layers))
            token = token._replace(x=x)
            pools += written
        return token.x, pools

    return all_of_them


def launcher(
    operands: Operands,
    choice: Choice,
    *,
    activation: str,
    scale: float,
    slots: int | None = None,
    alone: int = ALONE,
    timeline: bool = False,
    macros: dict[str, Any] | None = None,
) -> Callable[[Operands], tuple[jax.Array, list[jax.Array], jax.Array]]:
    """One launch; the third result is for `timeline.phases`, where a timeline is wanted.

    slots: of a warp's ring; None for as many as fit. alone: see ALONE. macros: those that win.
    """
    layers = operands.layers
    first, L = layers[0], len(layers)
    (_, _, K, O, H), (D, A), (E, _, F), X = first.kv_PYKOH.shape, first.output.shape, first.down.shape, choice.chosen
    N, rows = A // H, first.qkv.shape[0]
    _require_sizes(operands, choice, activation)
    group = N // K
    # As in `cuda/moe_token.cuh` and `cuda/moe_layer.cuh`.
    keys = -(-E // 4) * 16
    results = max(4 * WARPS * group * (H + 8), WARPS * -(-E // 32) * 128)
    rest = 4 * D + 2 * max(A, X * F) + WARPS * X * 8 + WARPS * 4 + 32 + WARPS * MOST_SLOTS * 8
    rest += 2 * group * (H + 8) + results + 8 * WARPS * group + 4 * H + 8 * len(Layer._fields) * L
    slots = min(MOST_SLOTS, (call.MAX_SHARED - rest) // (WARPS * SLOT)) if slots is None else slots
    if slots < 3:
        raise NotImplementedError(f"inputs of {max(A, D, X * F)} numbers")
    defined = choice.macros(E, first.bias is not None) | {
        "WIDTH": D, "FFN": F, "ATTENDED": A, "EPS": f"{choice.eps!r}f", "GATED": ACTIVATIONS[activation],
        "BLOCKS": call.SMS, "WARPS": WARPS, "SLOTS": slots, "DEPTH": min(DEPTH, slots - 1), "PACE": PACE,
        "GUESS": min(GUESS, slots - 1), "LITTLE": LITTLE,
        "HEADS": N, "KV": K, "O": O, "NORM_HEADS": int(first.q_norm is not None), "SCALE_QK": repr(float(scale)),
        "IDLE": K if _rounds(first, choice, call.SMS - K) == _rounds(first, choice, call.SMS) else 0, "PAUSE": PAUSE,
        "ALONE": alone, "TIMELINE": int(timeline), **_parameters(L), **(macros or {}),
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, defined)
    # What blocks tell one another, and the words of their barrier; and sums of scores. As in `cuda/moe_layer.cuh`.
    told, scores = -(-call.SMS // 4) * 4 + rows + A + 2 * D + X * F + -(-E // 4) * 4, L * keys * 2
    shapes = [
        jax.ShapeDtypeStruct((1, D), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(layer.kv_PYKOH.shape, jnp.bfloat16) for layer in layers),
        jax.ShapeDtypeStruct((call.SMS, group, H), jnp.float32),
        jax.ShapeDtypeStruct((call.SMS, group, 2), jnp.float32),
        jax.ShapeDtypeStruct((told,), jnp.int32),
        jax.ShapeDtypeStruct((scores,), jnp.int32),
        jax.ShapeDtypeStruct((L, call.SMS, WARPS, MARKS) if timeline else (1,), jnp.uint32),
    ]
    fields, begin = len(Layer._fields), len(Token._fields)
    pool = Layer._fields.index("kv_PYKOH")
    aliases = {begin + layer * fields + pool: 1 + layer for layer in range(L)}
    zeros = begin + L * fields
    aliases |= {zeros: L + 3, zeros + 1: L + 4}

    def run(operands: Operands) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        # What the kernel does not read must still be a pointer.
        x = operands.token.x
        arguments = [*operands.token, *(x if array is None else array for layer in operands.layers for array in layer)]
        arguments += [jnp.zeros(told, jnp.int32), jnp.zeros(scores, jnp.int32)]
        out, *found = call.launch(
            KERNEL, ptx, arguments, shapes, grid=(call.SMS,), threads=WARPS * 32, shared=WARPS * slots * SLOT + rest,
            aliases=aliases,
        )  # fmt: skip
        return out, found[:L], found[-1]

    return run


def _require_sizes(operands: Operands, choice: Choice, activation: str) -> None:
    """Raises NotImplementedError for what the kernel cannot do."""
    token, layers = operands
    first = layers[0]
    if len({tuple(None if a is None else a.shape for a in layer[:-1]) for layer in layers}) > 1:
        raise NotImplementedError("layers of different sizes")
    if len({layer.kv_PYKOH.shape[1:] for layer in layers}) > 1:
        raise NotImplementedError("pages of different sizes")
    weights = [a for layer in layers for a in (layer.qkv, layer.kv_PYKOH, layer.output, layer.router, layer.gate_up)]
    if any(a.dtype != jnp.bfloat16 for a in (token.x, *weights)) or ACTIVATIONS.get(activation, 0) == 0:
        raise NotImplementedError(f"{activation} of other dtypes than bfloat16")
    _, _, K, O, H = first.kv_PYKOH.shape
    (T, D), (_, A), F = token.x.shape, first.output.shape, first.down.shape[2]
    N, E = A // H, first.down.shape[0]
    if T != 1 or any(size % PIECE for size in (D, F, A)) or first.router.shape[0] != E:
        raise NotImplementedError(f"{T} tokens, widths of {D}, {F} and {A}, {E} of {first.router.shape[0]} experts")
    if H != HEAD_DIM or N % K or N // K > MOST_GROUP or O % UNIT or K > call.SMS or len(first.qkv) != (N + 2 * K) * H:
        raise NotImplementedError(f"{N} query and {K} KV heads of {H}, pages of {O} tokens, {len(first.qkv)} rows")
    if (first.q_norm is None) != (first.k_norm is None):
        raise NotImplementedError("a norm of only queries or keys")
    if first.bias is not None and not choice.sigmoid:
        raise NotImplementedError("a choice by probabilities and a bias")


def _rounds(layer: Layer, choice: Choice, blocks: int) -> list[int]:
    """How many items of each product a warp has at most, if so many blocks have them."""
    items = len(layer.qkv) // 2, layer.output.shape[0] // 2, choice.chosen * layer.down.shape[2]
    return [-(-count // max(1, blocks * WARPS)) for count in items]


def _parameters(layers: int) -> dict[str, str]:
    """Macros of `cuda/moe_layers.cu`: the parameters of so many layers, and the statements that keep them in a table.

    Each warp writes the arrays of some layers, by one thread each.
    """
    fields = Layer._fields[:-1]
    arguments = [f"const void* {field}_{layer}" for layer in range(layers) for field in (*fields, "unused")]
    pools = [f"void* pool_{layer}" for layer in range(layers)]
    table = []
    for layer in range(layers):
        values = [f"(decltype(Layer::{f})){f}_{layer}" for f in fields] + [f"(u16*)pool_{layer}"]
        thread = layer % WARPS * 32 + layer // WARPS
        table.append(f"if (threadIdx.x == {thread}) table[{layer}] = Layer{{{', '.join(values)}}};")
    return {
        "LAYERS": str(layers),
        "LAYER_PARAMETERS": ", ".join(arguments),
        "POOL_PARAMETERS": ", ".join(pools),
        "FILL_TABLE": " ".join(table),
    }


def check(sizes: Sequence[int] = (512, 16, 256)) -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU. sizes: D, E, F.

    What a layer rounds grows in those after it, so the first is compared with what is exact, and several in a launch
    with one in each, which give the same numbers.
    """
    choice, (D, E, F) = Choice(4, 1e-6), sizes
    how: dict[str, Any] = {"activation": "silu", "scale": HEAD_DIM**-0.5}
    operands = reference.random_operands(D, (16, 2), E, F, 1500, layers=2)
    together, alone = (implementation(operands, choice, most=most, **how) for most in (2, 1))
    one = implementation(Operands(operands.token, operands.layers[:1]), choice, **how)

    @jax.jit
    def run(operands: Operands) -> tuple[Any, Any, Any]:
        return one(Operands(operands.token, operands.layers[:1])), together(operands), alone(operands)

    for tokens in (70, 1500):  # of the same shapes: to compile takes longest
        found, *both = run(reference.shortened(operands, tokens))
        error = reference.difference(
            reference.shortened(Operands(operands.token, operands.layers[:1]), tokens), found, choice, how["scale"]
        )
        if not error < 0.02:
            raise ArithmeticError(f"wrong by {error:.1e} with {tokens} tokens")
        if not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, both), strict=True)):
            raise ArithmeticError(f"several layers in a launch give other numbers with {tokens} tokens")
