"""Products of few tokens with a large matrix, and what stands around them, in one kernel: `cuda/skinny_gemm.cu`.

RMSNorm of the inputs, act(gate) * up of the two halves of the result and the addition of a residual need no kernels of
their own: at batch 1 a decode step is as much waiting for small kernels to start as it is reading weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import reference
from jaxllm.kernels.linear.reference import Norm

KERNEL = "skinny_gemm"
MAX_TOKENS = 32
"""More do not fit in the registers."""
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
WEIGHTS = {"bfloat16": 0, "float8_e4m3fn": 1, "int8": 2}

CLUSTERS = {1: call.SMS, 2: call.SMS // 2, 4: 32, 8: 16}
"""Clusters of so many blocks that are on the chip at once: one of 4 or 8 must be in one of 8 groups of processors."""
BARRIERS = {1: 0, 2: 450, 4: 1200, 8: 2000}
"""Nanoseconds that clusters cost, about, beyond the barriers of their tiles."""
SMALL = 64 << 20
"""Bytes of a weight up to which short tiles are better at few tokens."""
AHEAD = 64 * 1024
"""Bytes of the weight that is read next, for each block to bring to the second-level cache."""

MEGABYTES: dict[str, tuple[tuple[int, int], ...]] = {"plain": ((1, 240),), "fused": ((1, 240),)}
"""Where the kernel is used: for up to so many tokens, weights of up to so many megabytes. "fused": products that save
kernels for a norm or an activation.

Measured on an H200 (jax 0.11.2), the products of a layer of Llama-3.1-8B with what is around them: at 1 token 116 us,
where XLA takes 122; at 8 tokens 131 and 122."""

Operands = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""x, weight, the norm's weight and the residual."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is split; see the kernel."""

    rows: int
    cluster: int
    warps: int
    stages: int

    def turns(self, row_bytes: int) -> int:
        """Lines of 128 bytes of each row that a warp reads."""
        return -(-row_bytes // (128 * self.cluster * self.warps))

    def shared(self, tokens: int, row_bytes: int, itemsize: int) -> int:
        """Bytes of shared memory, for weights of `itemsize` bytes."""
        ring = self.warps * self.stages * self.rows * 128
        x = tokens * (self.turns(row_bytes) * self.warps * 256 // itemsize + 16)
        of_warps = self.warps * tokens * (self.rows + 4) * 4
        sums = 2 * of_warps if self.cluster == 1 else of_warps + 2 * tokens * self.rows * 4
        return ring + x + sums + tokens * self.cluster * self.warps * 4

    def grid(self, features: int) -> int:
        """Blocks: as few as need no more rounds than all would, so that each has the same work."""
        tiles, clusters = -(-features // self.rows), CLUSTERS[self.cluster]
        return self.cluster * -(-tiles // -(-tiles // clusters))

    def nanoseconds(self, tokens: int, features: int, row_bytes: int, itemsize: int) -> float:
        """An estimate, to compare splits by: weights at the speed that a block can get them at, or its work on them."""
        rounds = math.ceil(-(-features // self.rows) * self.cluster / self.grid(features))
        part = self.turns(row_bytes) * self.warps * 128
        under_way = self.warps * (self.stages - 1) * 128 * self.rows
        weights = self.rows * part / 34.5 * max(1.0, 49152 / under_way) ** 0.5
        # A warp's own work on a line: what depends on one another, or all that share a tensor core; and on a tile.
        products = self.rows // 16 * 8 // itemsize * -(-tokens // 8)
        line = 200 + max(160 / itemsize, 10 * products * max(1, self.warps // 4))
        of_tile = self.turns(row_bytes) * line + (1500 if self.cluster > 1 else 900)
        x = tokens * part * 2 / itemsize
        return rounds * max(weights, of_tile, 0.9 * weights + 0.3 * of_tile) + x / 120 + BARRIERS[self.cluster]


def tiling(tokens: int, features: int, row_bytes: int, itemsize: int) -> Tiling:
    """A good split: all blocks busy to the end, enough weights under way, and not too many blocks that read x.

    Raises NotImplementedError where nothing fits.
    """
    splits = []
    # Measured at 1 token: of 50 MB, tiles of 32 rows or 16 warps take 18.4 to 20 us, where tiles of 16 rows take 15; of
    # 117 and 235 MB, tiles of 32 rows take 29.8 and 58.6 us, those of 16 rows 37 and 62.
    tiles = (16,) if tokens <= 8 and features * row_bytes <= SMALL else (16, 32)
    for cluster, rows, warps in itertools.product(CLUSTERS, tiles, (8, 4)):
        for stages in range(131072 // (warps * rows * 128), 2, -1):
            split = Tiling(rows, cluster, warps, stages)
            if split.shared(tokens, row_bytes, itemsize) <= call.MAX_SHARED and row_bytes // 128 >= cluster * cluster:
                splits.append(split)
                break
    if not splits:
        raise NotImplementedError("it does not fit in shared memory")
    return min(splits, key=lambda split: split.nanoseconds(tokens, features, row_bytes, itemsize))


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    weight_FD: jax.Array | jax.ShapeDtypeStruct,
    *,
    eps: float | None = None,
    activation: str | None = None,
    residual: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ahead: jax.Array | jax.ShapeDtypeStruct | None = None,
    split: Tiling | None = None,
) -> Callable[..., jax.Array]:
    """The kernel for these shapes, as a function of (x, weight, scale_F, norm_D, residual_TF, ahead).

    It computes what `api.linear` does, [T, F] (half of F with an activation), in a program for an H100 or H200. x and
    residual are bfloat16; the weight bfloat16, or float8_e4m3fn or int8 with a float32 scale of each row; the norm's
    weight float32. Operands that there are not are None. Sums are float32, and rounded once, to out_dtype (bfloat16 or
    float32). A token's result does not depend on the others.

    Args:
      eps: of the norm of x; None for none.
      residual: whether there is one.
      ahead: a weight that is read next, whose beginning the second-level cache fetches while this product ends.
      split: None for a good one.

    Raises:
      NotImplementedError: there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    (T, D), F, kind = x_TD.shape, weight_FD.shape[0], WEIGHTS.get(str(weight_FD.dtype))
    if x_TD.dtype != jnp.bfloat16 or kind is None:
        raise NotImplementedError(f"{weight_FD.dtype} weights and {x_TD.dtype} activations")
    if activation not in ACTIVATIONS or (activation is not None and F % 2):
        raise NotImplementedError(f"activation {activation} of {F} features")
    if not 0 < T <= MAX_TOKENS or D % (64 if kind else 32) or not F:
        raise NotImplementedError(f"{T} tokens of {D} inputs")
    itemsize = jnp.dtype(weight_FD.dtype).itemsize
    split = tiling(T, F, D * itemsize, itemsize) if split is None else split
    shared = split.shared(T, D * itemsize, itemsize)
    grid, threads = split.grid(F), split.warps * 32
    fetched = 0 if ahead is None else min(AHEAD, ahead.size * ahead.dtype.itemsize // grid // 512 * 512)
    macros = {
        "TOKENS": T, "FEATURES": F, "INPUTS": D,
        "ROWS": split.rows, "CLUSTER": split.cluster, "WARPS": split.warps, "STAGES": split.stages,
        "WEIGHT": kind, "NORM": int(eps is not None), "EPS": f"{float(eps or 0.0)!r}f",
        "GATED": ACTIVATIONS[activation], "RESIDUAL": int(residual),
        "OUT_FLOAT": int(out_dtype == jnp.float32), "AHEAD": fetched, "SHARED": shared,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((T, F // 2 if activation else F), out_dtype)

    def run(x: jax.Array, weight: jax.Array, *others: jax.Array | None) -> jax.Array:
        given = [*others, *[None] * (4 - len(others))]
        # What the kernel does not read must still be a pointer.
        arguments = [x, weight, *(x if other is None else other for other in given)]
        return call.launch(KERNEL, ptx, arguments, [result], grid=(grid,), threads=threads, shared=shared)[0]

    return run


def choose(x: jax.Array, weight_FD: jax.Array, *, fused: bool) -> None:
    """Raises NotImplementedError where the kernel cannot be used here, or was not found to be faster than XLA."""
    call.require(KERNEL)
    if x.dtype != jnp.bfloat16 or weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError("only bfloat16")
    tokens, size = math.prod(x.shape[:-1]), weight_FD.size * weight_FD.dtype.itemsize / 1e6
    if not any(tokens <= most and size <= limit for most, limit in MEGABYTES["fused" if fused else "plain"]):
        raise NotImplementedError(f"XLA does {tokens} tokens and {size:.0f} MB")


def matmul(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """See `api.matmul`. Raises NotImplementedError where another must do it."""
    choose(x, weight_FD, fused=False)
    x_TD = x.reshape(-1, x.shape[-1])
    run = implementation(x_TD, weight_FD, out_dtype=jnp.float32)

    def kernel(x: jax.Array, weight: jax.Array) -> jax.Array:
        return run(x, weight)

    return lax.platform_dependent(x_TD, weight_FD, cuda=kernel, default=reference.matmul).reshape(*x.shape[:-1], -1)


def linear(
    x_TD: jax.Array,
    weight_FD: jax.Array,
    *,
    norm: Norm | None,
    activation: str | None,
    residual_TF: jax.Array | None,
) -> jax.Array:
    """See `api.linear`. Raises NotImplementedError where it must be composed of others."""
    choose(x_TD, weight_FD, fused=norm is not None or activation is not None)
    if residual_TF is not None and residual_TF.dtype != x_TD.dtype:
        raise NotImplementedError("a residual of another dtype")
    norm_D, eps = (None, None) if norm is None else norm
    run = implementation(x_TD, weight_FD, eps=eps, activation=activation, residual=residual_TF is not None)

    def kernel(operands: Operands) -> jax.Array:
        x, weight, norm_D, residual = operands
        return run(x, weight, None, norm_D, residual)

    def composed(operands: Operands) -> jax.Array:
        x, weight, norm_D, residual = operands
        norm = None if norm_D is None or eps is None else (norm_D, eps)
        return reference.linear(x, weight, norm=norm, activation=activation, residual=residual)

    operands: Operands = (x_TD, weight_FD, norm_D, residual_TF)
    return lax.platform_dependent(operands, cuda=kernel, default=composed)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D, fused in ((1, 64, 576, False), (7, 128, 1024, True)):
        x, weight, residual = (
            jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D), (T, F // 2))
        )
        norm_D = jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.float32)
        norm, activation, added = ((norm_D, 1e-5), "silu", residual) if fused else (None, None, None)
        run = implementation(x, weight, eps=1e-5 if fused else None, activation=activation, residual=fused)
        out = jax.jit(run)(x, weight, None, norm_D if fused else None, added)
        wanted = reference.linear(x, weight, norm=norm, activation=activation, residual=added)
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")
