"""Products of few tokens with a large matrix, and what stands around them, in one kernel: `cuda/skinny_gemm.cu`.

RMSNorm of the inputs, act(gate) * up of the two halves of the result and the addition of a residual need no kernels of
their own: at batch 1 a decode step is as much waiting for small kernels to start as it is reading weights.
"""

from __future__ import annotations

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

MEGABYTES: dict[str, tuple[tuple[int, int], ...]] = {"plain": (), "fused": ()}
"""Where the kernel is used: for up to so many tokens, weights of up to so many megabytes. "fused": products that save
kernels for a norm or an activation.

Nowhere as it is split today. Measured on an H200 (jax 0.11.2), the products of a layer of Llama-3.1-8B: 198 us at 1
token and 365 at 16, where XLA takes 127 and 126. The copies limit it: one takes about 72 ns on a multiprocessor whether
it brings 512 bytes or 1,024, which 4 KiB and more would hide."""


Operands = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""x, weight, the norm's weight and the residual."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is split; see the kernel. stages: as many as fit in shared memory, where it is None."""

    rows: int
    cluster: int
    warps: int
    groups: int
    stages: int | None = None

    def shared(self, tokens: int, stages: int) -> int:
        """Bytes of shared memory."""
        stride, ring = tokens * (self.rows + 4) * 4, stages * self.rows * (self.groups * 64 + 64)
        sums = self.warps * (stride + tokens * 4) + (2 * stride + tokens * 4 if self.cluster > 1 else 0)
        return -(-(ring + sums) // 8) * 8 + 16 * stages

    def depth(self, tokens: int) -> int:
        """Stages of the ring."""
        if self.stages is not None:
            return self.stages
        return next((s for s in range(12, 0, -1) if self.shared(tokens, s) <= call.MAX_SHARED), 0)

    def grid(self, features: int) -> int:
        """Blocks: as few as need no more rounds than all would, so that each has the same work."""
        tiles, clusters = -(-features // self.rows), call.SMS // self.cluster
        return self.cluster * -(-tiles // -(-tiles // clusters))


def tiling(tokens: int, features: int) -> Tiling:
    """A good split: all blocks busy to the end, and few of them that read the same tokens.

    With more tokens two blocks share their rows where they can, which halves what each reads of the tokens.
    """
    few = tokens <= 4
    used = {}
    for cluster in (1, 2):
        clusters = call.SMS // cluster
        for rows in range(16, (112 if tokens <= 16 else 64) + 1, 16):
            rounds = -(-features // (rows * clusters))
            used[cluster, rows] = features / (rounds * clusters * rows)
    least = max(used.values()) - 0.03
    full = [key for key, share in used.items() if share > least]
    cluster, rows = max(full, key=lambda key: ((key[0] == 1) == few, key[1]))
    options = [Tiling(rows, cluster, warps, groups) for warps, groups in ((8, 16), (8, 8), (4, 8), (4, 4))]
    return next((option for option in options if option.depth(tokens) >= 3), options[-1])


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    weight_FD: jax.Array | jax.ShapeDtypeStruct,
    *,
    eps: float | None = None,
    activation: str | None = None,
    residual: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    split: Tiling | None = None,
) -> Callable[..., jax.Array]:
    """The kernel for these shapes, as a function of (x, weight, scale_F, norm_D, residual_TF).

    It computes what `api.linear` does, [T, F] (half of F with an activation), in a program for an H100 or H200. x and
    residual are bfloat16; the weight bfloat16, or float8_e4m3fn or int8 with a float32 scale of each row; the norm's
    weight float32. Operands that there are not are None. Sums are float32, and rounded once, to out_dtype (bfloat16 or
    float32). A token's result does not depend on the others.

    Args:
      eps: of the norm of x; None for none.
      residual: whether there is one.
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
    split = tiling(T, F) if split is None else split
    grid, threads, stages = split.grid(F), split.warps * 32, split.depth(T)
    shared = split.shared(T, stages)
    if stages < 1 or shared > call.MAX_SHARED:
        raise NotImplementedError("it does not fit in shared memory")
    macros = {
        "TOKENS": T, "FEATURES": F, "INPUTS": D,
        "ROWS": split.rows, "CLUSTER": split.cluster, "WARPS": split.warps, "GROUPS": split.groups, "STAGES": stages,
        "WEIGHT": kind, "NORM": int(eps is not None), "EPS": f"{float(eps or 0.0)!r}f",
        "GATED": ACTIVATIONS[activation], "RESIDUAL": int(residual),
        "OUT_FLOAT": int(out_dtype == jnp.float32), "SHARED": shared,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((T, F // 2 if activation else F), out_dtype)

    def run(x: jax.Array, weight: jax.Array, *others: jax.Array | None) -> jax.Array:
        # What the kernel does not read must still be a pointer.
        arguments = [x, weight, *(x if other is None else other for other in others)]
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
        return run(x, weight, None, None, None)

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
