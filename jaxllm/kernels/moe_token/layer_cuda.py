"""A whole layer with grouped-query attention and experts for one token, by `cuda/moe_layer.cu`, in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.kernels.moe_token import cuda
from jaxllm.kernels.paged_attention import reference as attention
from jaxllm.kernels.rope_write import reference as rope
from jaxllm.kernels.router.cuda import Choice

KERNEL = "moe_layer"
HEAD_DIM = 128
MOST_GROUP = 8
"""Query heads of a KV head: half of the rows of a product."""
UNIT = 16
"""Tokens that a warp attends to at once."""
ALONE = 4
"""Units for each warp of a block up to which a KV head's context is not shared: to merge takes as long as two."""

PHASES = (
    "norm", "qkv", "wait for queries", "attention", "merge", "wait for heads", "output", "wait for stream",
    "second norm", "scores", "wait for scores", "choice", "gate and up", "wait for hidden", "down",
)  # fmt: skip
"""Of the kernel, in their order; a timeline has the clock before the first and after each."""
DEPTH = 2
"""Stages of a warp on their way while it multiplies: more delay what others read, 4 of them a layer by 1.5 us."""
MARKS = 20
"""Of a warp's timeline: see `cuda/timeline.cuh`."""


class Operands(NamedTuple):
    """What the kernel reads.

    x [1, D] is the residual stream; norm float32 [D]; qkv [(N + 2 * K) * H, D]; q_norm and k_norm float32 [H], or None;
    cos and sin float32 [1, 1, H / 2]; page and slot int32 [1], of the token; pages_RW int32 [1, W]; position int32 [1],
    -1 for no token; kv_PYKOH the pool, which is written in place; then as `cuda.Operands`. upcoming: qkv of the layer
    that comes next, or None.
    """

    x: jax.Array
    norm: jax.Array
    qkv: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    page: jax.Array
    slot: jax.Array
    pages_RW: jax.Array
    position: jax.Array
    kv_PYKOH: jax.Array
    output: jax.Array
    mlp_norm: jax.Array
    router: jax.Array
    bias: jax.Array | None
    gate_up: jax.Array
    down: jax.Array
    upcoming: jax.Array | None = None


def second_half(o: Operands, attended: jax.Array) -> cuda.Operands:
    """What `cuda` reads of them, after the heads found `attended`."""
    return cuda.Operands(o.x, attended, o.output, o.mlp_norm, o.router, o.bias, o.gate_up, o.down)


Kernel = Callable[[Operands], tuple[jax.Array, jax.Array]]
"""The residual stream after the layer, [1, D], and the pool."""


def choose(operands: Operands, choice: Choice, *, activation: str, scale: float) -> Kernel:
    """The kernel, compiled. Raises NotImplementedError where others must do the work."""
    cuda.require(KERNEL)
    return implementation(operands, choice, activation=activation, scale=scale)


def implementation(
    operands: Operands,
    choice: Choice,
    *,
    activation: str,
    scale: float,
    slots: int | None = None,
    alone: int = ALONE,
) -> Kernel:
    """The kernel for arrays of these shapes, in a program for an H100 or H200 with `call.SMS` multiprocessors.

    scale: on q.k. slots: of a warp's ring; None for as many as fit. alone: see ALONE.
    Raises NotImplementedError where there is none.
    """
    run = launcher(operands, choice, activation=activation, scale=scale, slots=slots, alone=alone)
    return lambda operands: run(operands)[:2]


def launcher(
    operands: Operands,
    choice: Choice,
    *,
    activation: str,
    scale: float,
    slots: int | None = None,
    alone: int = ALONE,
    timeline: bool = False,
) -> Callable[[Operands], tuple[jax.Array, jax.Array, jax.Array]]:
    """As `implementation`; the third result is for `phases`, where a timeline is wanted."""
    _, _, K, O, H = operands.kv_PYKOH.shape
    D, A = operands.output.shape
    N, (rows, _) = A // H, operands.qkv.shape
    if any(a.dtype != jnp.bfloat16 for a in (operands.qkv, operands.kv_PYKOH)) or rows != (N + 2 * K) * H:
        raise NotImplementedError(f"{operands.kv_PYKOH.dtype} pages and {operands.qkv.dtype} weights of {rows} rows")
    if H != HEAD_DIM or N % K or N // K > MOST_GROUP or O % UNIT or K > call.SMS:
        raise NotImplementedError(f"{N} query and {K} KV heads of {H}, pages of {O} tokens")
    if (operands.q_norm is None) != (operands.k_norm is None):
        raise NotImplementedError("a norm of only queries or keys")
    if operands.bias is not None and not choice.sigmoid:
        raise NotImplementedError("a choice by probabilities and a bias")
    half = second_half(operands, operands.x)
    group = N // K
    # Where the next layer is alike, the second-level cache fetches its first rows.
    upcoming = None if operands.upcoming is None else operands.upcoming.shape
    ahead = rows if upcoming == (rows, D) else 0
    own = (2 + 4 * cuda.WARPS) * group * (H + 8) + 8 * cuda.WARPS * group + 4 * H + 16
    macros, shared = cuda.macros_of(half, A, choice, activation=activation, slots=slots, beside=own)
    macros |= {
        "HEADS": N, "KV": K, "O": O, "NORM_HEADS": int(operands.q_norm is not None),
        "AHEAD": ahead, "DEPTH": DEPTH, "SCALE_QK": repr(float(scale)), "ALONE": alone, "TIMELINE": int(timeline),
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    E, F, X = *operands.down.shape[::2], choice.chosen
    # What blocks tell one another, and the words of their barrier.
    told = -(-call.SMS // 4) * 4 + rows + A + D + X * F + 2 * E
    results = [
        jax.ShapeDtypeStruct((1, D), jnp.bfloat16),
        jax.ShapeDtypeStruct(operands.kv_PYKOH.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((call.SMS, group, H), jnp.float32),
        jax.ShapeDtypeStruct((call.SMS, group, 2), jnp.float32),
        jax.ShapeDtypeStruct((told,), jnp.int32),
        jax.ShapeDtypeStruct((call.SMS, cuda.WARPS, MARKS) if timeline else (1,), jnp.uint32),
    ]

    def run(operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
        # What the kernel does not read must still be a pointer.
        arguments = [operands.x if operand is None else operand for operand in operands]
        arguments.append(jnp.zeros(told, jnp.int32))
        out, kv, *_, times = call.launch(
            KERNEL,
            ptx,
            arguments,
            results,
            grid=(call.SMS,),
            threads=cuda.WARPS * 32,
            shared=shared,
            aliases={Operands._fields.index("kv_PYKOH"): 1, len(arguments) - 1: len(results) - 2},
        )
        return out, kv, times

    return run


def phases(times: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Of each phase the shortest, the median and the longest time of a warp; how late blocks begin; all of a launch.

    times: uint32 [L, blocks, warps, MARKS], the third results of L launches. In us, by the clocks of multiprocessors,
    which are compared with the GPU's for that.
    """
    marks = times.reshape(len(times), -1, MARKS)
    cycles = (marks[:, :, 1 : len(PHASES) + 1] - marks[:, :, : len(PHASES)]).astype(np.float64)
    nanoseconds = (marks[:, :, -1] - marks[:, :, -2]).astype(np.float64)
    each = 1e-3 * nanoseconds.mean() / cycles.sum(2).mean()
    found = {
        name: (float(us.min()), float(np.median(us)), float(us.max()))
        for name, us in zip(PHASES, np.moveaxis(each * cycles, 2, 0), strict=True)
    }
    first = marks[:, :, -2].min(1)
    late = 1e-3 * (marks[:, :, -2] - first[:, None])
    whole = 1e-3 * (marks[:, :, -1] - first[:, None]).max(1)
    found["begins late"] = (float(late.min()), float(np.median(late)), float(late.max()))
    found["all"] = (float(whole.min()), float(np.median(whole)), float(whole.max()))
    return found


def plain(operands: Operands, choice: Choice, *, activation: str, scale: float) -> tuple[jax.Array, jax.Array]:
    """The same step by step, the stream in float32; what goes into a product is rounded as the kernel does."""
    o = operands
    y = rms_norm(o.x, (o.norm, choice.eps)).astype(jnp.float32)
    qkv = Product.of((y @ o.qkv.astype(jnp.float32).T).astype(o.x.dtype))
    norms = (o.q_norm, o.k_norm)
    q_TNH, kv = rope.rope_write(qkv, o.cos, o.sin, o.kv_PYKOH, o.page, o.slot, *norms, eps=choice.eps)
    wide = (q_TNH[None].astype(jnp.float32), kv.astype(jnp.float32))
    found, _ = attention.attend(*wide, o.pages_RW, o.position[None], scale=scale)
    attended = found.reshape(1, -1).astype(o.x.dtype)
    return cuda.plain(second_half(o, attended), choice, activation=activation), kv


def random_operands(
    D: int, heads: tuple[int, int], E: int, F: int, tokens: int, *, page: int = 32, norms: bool = True, seed: int = 0
) -> Operands:
    """Operands with `tokens` tokens in the context, this one too. heads: of queries, and of keys and values."""
    (N, K), H = heads, HEAD_DIM
    half = cuda.random_operands(N * H, D, E, F, seed=seed)
    assert half.output is not None
    keys = iter(jax.random.split(jax.random.key(seed + 1), 6))
    W = max(1, -(-tokens // page))
    pages = np.random.default_rng(seed).permutation(W + 2)[:W].astype(np.int32) + 1
    last = max(tokens - 1, 0)
    angle = jax.random.uniform(next(keys), (1, 1, H // 2), jnp.float32, 0.0, 6.0)
    q_norm, k_norm = (jax.random.uniform(next(keys), (H,), jnp.float32, 0.5, 1.5) for _ in range(2))
    return Operands(
        half.x,
        jax.random.uniform(next(keys), (D,), jnp.float32, 0.5, 1.5),
        jax.random.normal(next(keys), ((N + 2 * K) * H, D), jnp.bfloat16) * D**-0.5,
        q_norm if norms else None,
        k_norm if norms else None,
        jnp.cos(angle),
        jnp.sin(angle),
        jnp.asarray([pages[last // page] if tokens else 0], jnp.int32),
        jnp.asarray([last % page], jnp.int32),
        jnp.asarray(pages[None]),
        jnp.asarray([tokens - 1], jnp.int32),
        jax.random.normal(next(keys), (W + 3, 2, K, page, H), jnp.bfloat16),
        half.output,
        half.norm,
        half.router,
        half.bias,
        half.gate_up,
        half.down,
    )


def difference(operands: Operands, found: tuple[jax.Array, jax.Array], choice: Choice, scale: float) -> float:
    """Between a result and `plain`: of the stream, as a share of what the layer adds, or of the pool."""
    wanted = jax.jit(lambda operands: plain(operands, choice, activation="silu", scale=scale))(operands)
    (a, pool), (b, wanted_pool) = ([np.asarray(array, np.float32) for array in pair] for pair in (found, wanted))
    start = np.asarray(operands.x, np.float32)
    of_pool = np.abs(pool - wanted_pool).max() / np.abs(wanted_pool).max()
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b - start)), float(of_pool))


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    choice = Choice(4, 1e-6)
    for tokens in (70, 1500):
        operands = random_operands(512, (16, 2), 16, 256, tokens)
        run = implementation(operands, choice, activation="silu", scale=HEAD_DIM**-0.5)
        error = difference(operands, jax.jit(run)(operands), choice, HEAD_DIM**-0.5)
        if not error < 0.02:
            raise ArithmeticError(f"wrong by {error:.1e} with {tokens} tokens")
