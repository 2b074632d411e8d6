"""act(gate) * up of products of 33 to 256 tokens with a large matrix of bfloat16 on a Hopper GPU, by
`cuda/wide_gemm.cu`: on wgmma, a tile of all tokens for each block; activations come as they lie in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import reference
from jaxllm.kernels.linear.product import BlockedTokens, ScaledTokens

KERNEL = "wide_gemm"
COLUMNS = 224
"""Rows of the weight of a tile, half of the gate and half of up: what the registers of a block hold for 256 tokens."""
MOST = 256
FULL = 0.9
"""Of the multiprocessors must have a tile; no more than there are can have one."""
CLUSTER = 2
ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}
FACTORS = (64, 128)
"""Tokens whose factors 128 threads make."""

TOKENS: tuple[tuple[int, int], ...] = ((33, MOST),)
"""Where the kernel is used: tokens, from and to.

Measured on an H200 (jax 0.11.2) with Llama-3.1-8B's shapes: 59.5 us at 64 tokens, 62.0 at 128 and 82.9 at 256; cuBLAS
and the kernel for silu take 61.1, 66.7 and 92.4, and `narrow_cuda` 62.9 at 64. Those are short runs: a
layer's kernels one after another take 193.5 us at 256 tokens, not 196.4, and 142.2 at 128, not 147.7. Steps of the
engine, with `narrow_cuda` up to 64 tokens, before and after, perhaps on two GPUs: 64 requests 5.25 and 5.05 ms,
128 6.34 and 6.27, 256 9.51 and 9.57, which is within what GPUs differ by."""
ASKED = ((33, MOST),)
"""As above, where the kernel is asked for by name (`call.asked_for`)."""


def is_used() -> bool:
    """Whether any product may use it."""
    return bool(TOKENS) or asked()


def rows_for(tokens: int) -> int:
    """Rows of the `BlockedTokens` that the kernel takes."""
    return -(-tokens // 64) * 64


def groups(tokens: int) -> tuple[int, int]:
    """Warpgroups of a block, and how often 64 tokens each has; four warpgroups would not have the registers."""
    tiles = -(-tokens // 64)
    return (tiles, 1) if tiles < 4 else (2, 2)


def stages(tokens: int, factors: int = 0) -> tuple[int, int]:
    """Stages of 64 inputs that shared memory has room for, beside so many factors: of tokens, and of the weight."""
    spare = factors * 4 + 2048 if factors else 0
    room, x, weight = call.MAX_SHARED - 1024 - spare, rows_for(tokens) * 128, COLUMNS * 128
    both = room // (x + weight)
    return both, (room - both * x) // weight


def implementation(
    tokens: int,
    weight_FD: jax.Array | jax.ShapeDtypeStruct,
    activation: str,
    squares: tuple[int, int] = (0, 0),
    eps: float = 0.0,
) -> Callable[..., jax.Array]:
    """The kernel for these shapes, as a function of (x, weight, squares_PC), in a program for an H100 or H200.

    It computes what `api.gated` does, [T, F / 2]. Sums are float32, and rounded once. A token's result does not
    depend on the others. squares: P and C of `ScaledTokens`, whose eps is given too; (0, 0): x are `BlockedTokens`.

    Raises NotImplementedError where there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    F, D = weight_FD.shape
    if weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{weight_FD.dtype} weights")
    if activation not in ACTIVATIONS or F % (CLUSTER * COLUMNS):
        raise NotImplementedError(f"activation {activation} of {F} features")
    of_tokens, of_weight = stages(tokens, squares[1])
    if squares[0] and (tokens > squares[1] or squares[1] not in FACTORS):
        raise NotImplementedError(f"{squares[1]} sums of squares")
    if not 0 < tokens <= MOST or D % 64 or max(of_tokens, of_weight) >= D // 64:
        raise NotImplementedError(f"{tokens} tokens of {D} inputs")
    of_block, of_group = groups(tokens)
    macros = {
        "TOKENS": tokens, "PADDED": rows_for(tokens), "OUT_FEATURES": F // 2, "INPUTS": D, "COLUMNS": COLUMNS,
        "GROUPS": of_block, "BLOCKS_OF_GROUP": of_group, "CLUSTER": CLUSTER, "X_STAGES": of_tokens,
        "W_STAGES": of_weight, "GATED": ACTIVATIONS[activation], "SHARED": call.MAX_SHARED,
        "PARTS": squares[0], "FACTORS": squares[1], "EPS": repr(float(eps)),
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    grid, shared = (F // COLUMNS,), call.MAX_SHARED
    result = [jax.ShapeDtypeStruct((tokens, F // 2), jnp.bfloat16)]

    def run(x: BlockedTokens, weight_FD: jax.Array, squares_PC: jax.Array | None = None) -> jax.Array:
        # What the kernel does not read must still be a pointer.
        arguments = [x.values, weight_FD, x.values if squares_PC is None else squares_PC]
        return call.launch(KERNEL, ptx, arguments, result, grid=grid, threads=of_block * 128, shared=shared)[0]

    return run


def choose(x_TD: jax.Array | jax.ShapeDtypeStruct | BlockedTokens, weight_FD: jax.Array, activation: str) -> None:
    """Raises NotImplementedError where the kernel cannot be used here, or was not found to be faster than others.

    x_TD: also activations that could be blocked.
    """
    call.require(KERNEL)
    T, F = x_TD.shape[0], weight_FD.shape[0]
    ranges = ASKED if asked() else TOKENS
    if x_TD.dtype != jnp.bfloat16 or not any(low <= T <= high for low, high in ranges):
        raise NotImplementedError(f"others do {T} tokens in {x_TD.dtype}")
    if F % (CLUSTER * COLUMNS) or not FULL * call.SMS <= F // COLUMNS <= call.SMS:
        raise NotImplementedError(f"{F} features do not fill the chip once")
    implementation(T, weight_FD, activation)


def asked() -> bool:
    return call.asked_for(KERNEL)


def gated(x: BlockedTokens | ScaledTokens, weight_FD: jax.Array, activation: str) -> jax.Array:
    """See `api.gated`. Raises NotImplementedError where others must do it."""
    blocks = x.values if isinstance(x, ScaledTokens) else x
    assert isinstance(blocks, BlockedTokens)
    choose(blocks, weight_FD, activation)
    if blocks.values.shape[1] != rows_for(blocks.tokens):
        raise NotImplementedError(f"blocks of {blocks.values.shape[1]} rows")
    if isinstance(x, ScaledTokens):
        parts, columns = x.squares.shape
        run = implementation(blocks.tokens, weight_FD, activation, (parts, columns), x.eps)
    else:
        run = implementation(blocks.tokens, weight_FD, activation)

    def kernel(x: BlockedTokens | ScaledTokens, weight_FD: jax.Array) -> jax.Array:
        return run(x.values, weight_FD, x.squares) if isinstance(x, ScaledTokens) else run(x, weight_FD)

    def composed(x: BlockedTokens | ScaledTokens, weight_FD: jax.Array) -> jax.Array:
        return reference.linear(x.plain(), weight_FD, activation=activation)

    return lax.platform_dependent(x, weight_FD, cuda=kernel, default=composed)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D, squares in ((100, 2 * COLUMNS, 1024, (3, 128)), (253, 4 * COLUMNS, 1536, (0, 0))):
        x, weight = (jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D)))
        run = implementation(T, weight, "silu", squares, 1e-5)
        scaled = ScaledTokens.of(x, jnp.ones(D, jnp.float32), 1e-5, squares if squares[0] else (1, T), rows_for(T))
        out = jax.jit(run)(scaled.values, weight, scaled.squares)
        wanted = reference.linear(scaled.plain() if squares[0] else x, weight, activation="silu")
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")
