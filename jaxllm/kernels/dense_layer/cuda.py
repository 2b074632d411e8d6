"""Layers with grouped-query attention and a gated feed-forward for one token, by `cuda/dense_layer.cu`, in one launch.

Its blocks wait for one another, so each must have a multiprocessor: the kernel is used where the GPU has as many as it
has blocks, and no two of its launches run side by side, for each one's token comes from the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.kernels.cuda import call
from jaxllm.kernels.cuda.timeline import MARKS
from jaxllm.kernels.dense_layer.reference import Layer, Operands, difference, random_operands
from jaxllm.kernels.grouped_matmul.cuda import ACTIVATIONS

KERNEL = "dense_layer"
MEASURED = True
"""Whether it is used; if not, only with `JAXLLM_CUDA=+dense_layer`.

On an H200 a decode step of Llama-3.1-8B at batch 1 takes 3.96 ms by this kernel, and took 4.10 by a layer's parts."""
MOST_TOKENS = 8192
"""Of the longest context that an engine may have, for the kernel to be used unasked. At 131,072 tokens a layer takes
280 us by this kernel, and 246 by its parts: equal parts of a long context wait for the slowest multiprocessor."""
LEAST_BYTES = 400_000_000
"""Of a layer's weights, for the kernel to be used unasked: what it was measured with has 436 MB, and blocks wait for
one another as long for less."""
WARPS = 8
PIECE = 256
"""Inputs that a warp multiplies at once."""
SLOT = 4096
"""Bytes of a stage of a warp's ring."""
MOST_SLOTS = 6
QUEUE = 8
"""Items of a warp's queue."""
DEPTH = 4
"""Stages of a warp on their way while it multiplies: more delay what others read."""
PAUSE = 40
"""Nanoseconds between the looks of who waits: the GPU's power goes to what is multiplied."""
OWNED = 90
"""Percent of a product's rows that have a warp from the start; the others go to who is fast."""
HEAD_DIMS = (64, 128)
MOST_GROUP = 8
"""Query heads of a KV head: half of the rows of a product."""
UNIT = 16
"""Tokens that a warp attends to at once."""
MOST_LAYERS = 40
"""Of a launch: a kernel's parameters have 4 KB."""
ALONE = 4
"""Units for each warp of a block up to which a KV head's context is not shared: to merge takes as long as two."""

PHASES = (
    "norm", "qkv", "wait for queries", "attention", "merge", "wait for heads", "output", "wait for stream and norm",
    "gate and up", "wait for hidden", "down",
)  # fmt: skip
"""Of a layer, in their order; a timeline has the clock before the first and after each, of a launch's last layer."""
Kernel = Callable[[Operands], tuple[jax.Array, tuple[jax.Array, ...]]]
"""The residual stream after the layers, [1, D], and their pools."""


def is_used() -> bool:
    """Whether it is to be used where it can be."""
    return MEASURED or call.asked_for(KERNEL)


def require() -> None:
    """As `call.require`, for this kernel."""
    call.require(KERNEL)
    if not is_used():
        raise NotImplementedError("not measured")
    if jax.default_backend() == "gpu":
        processors = getattr(jax.local_devices()[0], "core_count", call.SMS)
        if processors < call.SMS:
            raise NotImplementedError(f"{processors} multiprocessors, and each block wants one of {call.SMS}")


def choose(operands: Operands, *, activation: str, scale: float, eps: float) -> Kernel:
    """The kernel, compiled. Raises NotImplementedError where others must do the work."""
    require()
    layer = operands.layers[0]
    tokens, weights = operands.pages_RW.shape[1] * layer.kv_PYKOH.shape[3], sum(2 * a.size for a in layer[:4])
    if (tokens > MOST_TOKENS or weights < LEAST_BYTES) and not call.asked_for(KERNEL):
        raise NotImplementedError(f"contexts of up to {tokens} tokens, layers of {weights} bytes")
    return implementation(operands, activation=activation, scale=scale, eps=eps)


def implementation(operands: Operands, *, activation: str, scale: float, eps: float, **how: Any) -> Kernel:
    """The kernel for arrays of these shapes, in a program for an H100 or H200 with `call.SMS` multiprocessors.

    scale: on q.k; eps: of all norms; how: see `launcher`.
    Raises NotImplementedError where there is none.
    """
    count = len(operands.layers)
    each = -(-count // -(-count // MOST_LAYERS))
    starts = range(0, count, each)
    runs = {
        size: launcher(
            operands._replace(layers=operands.layers[:size]), activation=activation, scale=scale, eps=eps, **how
        )
        for size in {min(each, count - start) for start in starts}
    }

    def run(operands: Operands) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        x = operands.x
        pools: list[jax.Array] = []
        for start in starts:
            layers = operands.layers[start : start + each]
            x, written, _ = runs[len(layers)](operands._replace(x=x, layers=layers))
            pools += written
        return x, tuple(pools)

    return run


def launcher(
    operands: Operands,
    *,
    activation: str,
    scale: float,
    eps: float,
    slots: int | None = None,
    depth: int = DEPTH,
    alone: int = ALONE,
    owned: int = OWNED,
    pause: int = PAUSE,
    timeline: bool = False,
) -> Callable[[Operands], tuple[jax.Array, tuple[jax.Array, ...], jax.Array]]:
    """As `implementation`; the third result is for `timeline.phases`, where a timeline is wanted.

    slots: of a warp's ring; None for as many as fit. The others: see DEPTH, OWNED and so on.
    """
    layers, layer = operands.layers, operands.layers[0]
    (T, D), (_, _, K, O, H), (_, F) = operands.x.shape, layer.kv_PYKOH.shape, layer.down.shape
    N, rows = layer.output.shape[1] // H, layer.qkv.shape[0]
    group = N // K
    signatures = [[None if a is None else (a.dtype, a.shape) for a in other[:-1]] for other in layers]
    if any(signature != signatures[0] for signature in signatures):
        raise NotImplementedError("layers that are not alike")
    used = (operands.x, *layer[:4], *(layer.kv_PYKOH for layer in layers))
    if any(a.dtype != jnp.bfloat16 for a in used) or ACTIVATIONS.get(activation, 0) == 0:
        raise NotImplementedError(f"{activation} of other dtypes than bfloat16")
    if T != 1 or any(size % PIECE for size in (D, F, N * H)) or rows != (N + 2 * K) * H:
        raise NotImplementedError(f"{T} tokens, widths of {D}, {F} and {N * H}, {rows} rows")
    if operands.cos.shape != (1, 1, H // 2):
        raise NotImplementedError(f"rotation of {2 * operands.cos.shape[-1]} of {H} numbers")
    if H not in HEAD_DIMS or N % K or group > MOST_GROUP or O % UNIT or K > call.SMS:
        raise NotImplementedError(f"{N} query and {K} KV heads of {H}, pages of {O} tokens")
    if (layer.q_norm is None) != (layer.k_norm is None):
        raise NotImplementedError("a norm of only queries or keys")
    if layer.bias is not None and layer.bias.dtype != jnp.bfloat16:
        raise NotImplementedError(f"a bias of {layer.bias.dtype}")
    pointers = len(Layer._fields) * len(layers)
    # As dense_layer.cuh has them.
    wide = H + 8
    rest = max(2 * max(N * H, D, F), WARPS * group * wide * 4) + group * wide * 2 + WARPS * group * 8 + 4 * H
    rest += WARPS * 4 + WARPS * QUEUE * 4 + 8 + 8 * pointers
    slots = min(MOST_SLOTS, (call.MAX_SHARED - rest) // (WARPS * SLOT)) if slots is None else slots
    if slots < 3:
        raise NotImplementedError(f"inputs of {max(N * H, D, F)} numbers")
    macros = {
        "LAYERS": len(layers), "WIDTH": D, "FFN": F, "HEADS": N, "KV": K, "HEAD_DIM": H, "O": O,
        "NORM_HEADS": int(layer.q_norm is not None), "QKV_BIAS": int(layer.bias is not None), "EPS": f"{eps!r}f",
        "GATED": ACTIVATIONS[activation], "SCALE_QK": repr(float(scale)), "ALONE": alone, "BLOCKS": call.SMS,
        "WARPS": WARPS, "SLOTS": slots, "DEPTH": min(depth, slots - 1), "OWNED": owned,
        "PAUSE": pause, "TIMELINE": int(timeline),
        "LAYER_PARAMETERS": ", ".join(f"const void* p{i}" for i in range(pointers)),
        "EACH_POINTER": " ".join(f"P({i})" for i in range(pointers)),
        "POOL_PARAMETERS": ", ".join("u16*" for _ in layers),
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    # What blocks tell one another, and the words of their barriers.
    told = len(layers) * (-(-call.SMS // 4) * 4 + 4 + rows + N * H + D // 2 + F // 2 + D // 2)
    results = [
        jax.ShapeDtypeStruct((1, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((call.SMS, group, H), jnp.float32),
        jax.ShapeDtypeStruct((call.SMS, group, 2), jnp.float32),
        jax.ShapeDtypeStruct((told,), jnp.int32),
        jax.ShapeDtypeStruct((call.SMS, WARPS, MARKS) if timeline else (1,), jnp.uint32),
        *(jax.ShapeDtypeStruct(layer.kv_PYKOH.shape, jnp.bfloat16) for layer in layers),
    ]
    shared = WARPS * slots * SLOT + rest
    before, each, of_pool = len(Operands._fields) - 1, len(Layer._fields), Layer._fields.index("kv_PYKOH")
    aliases = {before + i * each + of_pool: 5 + i for i in range(len(layers))} | {before + pointers: 3}

    def run(operands: Operands) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        # What the kernel does not read must still be a pointer.
        of_layers = [operands.x if array is None else array for layer in operands.layers for array in layer]
        arguments = [*operands[:-1], *of_layers, jnp.zeros(told, jnp.int32)]
        out, _, _, _, times, *pools = call.launch(
            KERNEL, ptx, arguments, results, grid=(call.SMS,), threads=WARPS * 32, shared=shared, aliases=aliases
        )
        return out, tuple(pools), times

    return run


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    how = {"scale": 0.1, "eps": 1e-6}
    for tokens, H, more in ((70, 128, False), (1500, 64, True)):
        operands = random_operands(512, (16, 2), 768, tokens, layers=2, H=H, norms=more, bias=more)
        error = difference(operands, jax.jit(implementation(operands, activation="silu", **how))(operands), **how)
        if not error < 0.02:
            raise ArithmeticError(f"wrong by {error:.1e} with {tokens} tokens")
