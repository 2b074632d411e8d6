"""Products of up to 128 tokens with a large matrix of bfloat16 on a Hopper GPU, by `cuda/narrow_gemm.cu`: on wgmma, the
weight as the left operand; with act(gate) * up of the halves of the result, and the addition of a residual.
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
from jaxllm.kernels.linear.cuda import ACTIVATIONS, CLUSTERS
from jaxllm.kernels.linear.reference import Norm

KERNEL = "narrow_gemm"
COLUMNS = (8, 16, 32, 64, 128)
"""Tokens that a product is made for."""

AHEAD = 10 << 20
"""Bytes of the weight that is read next, for the second-level cache to fetch between two kernels."""

MEGABYTES: dict[str, tuple[tuple[int, int, int], ...]] = {"plain": ((2, 64, 240),), "gated": ((2, 64, 240),)}
"""Where the kernel is used: for so many tokens and more, up to so many, weights of up to so many megabytes. "gated":
products that save a kernel for an activation.

Measured on an H200 (jax 0.11.2) in the engine with Llama-3.1-8B's shapes: 8 requests decode in 4.26 ms and 32 in 4.52,
where XLA's products take 4.32 and 4.76. At 64 tokens the products of a layer and its norms take 131.7 us, and XLA's
143.2; at 128 tokens 147.7, and 142.2 where XLA's are beside `wide_cuda`."""
ASKED = ((2, COLUMNS[-1], 240),)
"""As above, where the kernel is asked for by name (`call.asked_for`)."""


def is_used() -> bool:
    """Whether any product may use it."""
    return any(MEGABYTES.values()) or call.asked_for(KERNEL)


Operands = tuple[jax.Array, jax.Array, jax.Array | None]
"""x, weight and the residual."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the work is split; see the kernel."""

    rows: int
    cluster: int
    panels: int
    fetch: int = 256
    stagger: bool = False

    def tiles(self, features: int) -> int:
        return -(-features // self.rows)

    def clusters(self, features: int) -> int:
        """As few as need no more rounds than all would, so that each has the same work."""
        tiles = self.tiles(features)
        return -(-tiles // -(-tiles // CLUSTERS[self.cluster]))

    def stages(self, columns: int, features: int) -> int:
        """As many as fit in shared memory."""
        buffers = 0 if self.cluster == 1 else 1 + (self.tiles(features) > self.clusters(features))
        room = call.MAX_SHARED - 1024 - buffers * self.rows * columns * 4
        return max(0, room // (self.panels * (self.rows + columns) * 128))

    def nanoseconds(self, columns: int, features: int, inputs: int) -> float:
        """An estimate, to compare splits by."""
        rounds = -(-self.tiles(features) // self.clusters(features))
        part = -(-inputs // (self.cluster * self.panels * 64)) * self.panels * 128
        weights = rounds * self.rows * part
        # A block reads the weight at up to 45 bytes per nanosecond, all together at 4,560; tokens take a third of the
        # time of the weight's bytes, and sums are waited for at the end.
        blocks = self.clusters(features) * self.cluster
        alone = (weights + rounds * columns * part / 3) / 45
        together = (weights + rounds * columns * part / 3) * blocks / 4560
        sums = 0 if self.cluster == 1 else 700 + 150 * self.cluster + self.rows * columns * 4 / 40
        return max(alone, together) + sums + 1000


def columns_for(tokens: int) -> int:
    return next(columns for columns in COLUMNS if columns >= tokens)


def splitting(tokens: int, features: int, inputs: int) -> Split:
    """A good split. Raises NotImplementedError where nothing fits."""
    columns = columns_for(tokens)
    splits = []
    for rows, cluster in itertools.product((64, 128, 192, 256), (1, 2)):
        for panels in (4, 2, 1):  # the longer the lines that are read at once, the better
            split = Split(rows, cluster, panels)
            enough = inputs % (panels * 64) == 0 and inputs // (panels * 64) >= 2 * cluster
            if enough and panels * rows <= 256 and split.stages(columns, features) >= (4 if panels > 1 else 3):
                splits.append(split)
                break
    if not splits:
        raise NotImplementedError("it does not fit in shared memory")
    return min(splits, key=lambda split: split.nanoseconds(columns, features, inputs))


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    weight_FD: jax.Array | jax.ShapeDtypeStruct,
    *,
    activation: str | None = None,
    residual: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ahead: jax.Array | jax.ShapeDtypeStruct | None = None,
    fetched: int = AHEAD,
    split: Split | None = None,
) -> Callable[..., jax.Array]:
    """The kernel for these shapes, as a function of (x, weight, residual_TF, ahead), in a program for an H100 or H200.

    It computes what `api.linear` does, [T, F] (half of F with an activation). Operands are bfloat16; a residual that
    there is not is None. Sums are float32, and rounded once, to out_dtype (bfloat16 or float32). A token's result does
    not depend on the others. ahead: the weight [F, D] that is read next, of which the second-level cache fetches about
    `fetched` bytes that the product, by this kernel too, begins with.

    Raises NotImplementedError where there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    (T, D), F = x_TD.shape, weight_FD.shape[0]
    if x_TD.dtype != jnp.bfloat16 or weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{weight_FD.dtype} weights and {x_TD.dtype} activations")
    if activation not in ACTIVATIONS or F % (16 if activation else 8):
        raise NotImplementedError(f"activation {activation} of {F} features")
    if not 0 < T <= COLUMNS[-1] or D % 64 or not F:
        raise NotImplementedError(f"{T} tokens of {D} inputs")
    split = splitting(T, F, D) if split is None else split
    columns = columns_for(T)
    shared = call.MAX_SHARED
    macros = {
        "TOKENS": T, "COLUMNS": columns, "FEATURES": F, "INPUTS": D,
        "ROWS": split.rows, "PANELS": split.panels, "STAGES": split.stages(columns, F),
        "CLUSTER": split.cluster, "CLUSTERS": split.clusters(F), "FETCH": split.fetch, "STAGGER": int(split.stagger),
        "GATED": ACTIVATIONS[activation], "RESIDUAL": int(residual), "OUT_FLOAT": int(out_dtype == jnp.float32),
        "SHARED": shared, **ahead_of(T, ahead, fetched),
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((T, F // 2 if activation else F), out_dtype)
    grid, threads = split.clusters(F) * split.cluster, 128 + 2 * split.rows

    def run(
        x: jax.Array, weight: jax.Array, residual_TF: jax.Array | None = None, following: jax.Array | None = None
    ) -> jax.Array:
        # What the kernel does not read must still be a pointer.
        arguments = [x, weight, x if residual_TF is None else residual_TF, x if following is None else following]
        return call.launch(KERNEL, ptx, arguments, [result], grid=(grid,), threads=threads, shared=shared)[0]

    return run


def ahead_of(tokens: int, ahead: jax.Array | jax.ShapeDtypeStruct | None, fetched: int) -> dict[str, int]:
    """Macros for the weight that is read next: about so many bytes of it, evenly from what its blocks read first."""
    if ahead is None:
        return {"AHEAD": 0, "AHEAD_ROWS": 0, "AHEAD_ROW": 0, "AHEAD_PARTS": 1}
    F, D = ahead.shape
    row, parts = D * ahead.dtype.itemsize, splitting(tokens, F, D).cluster
    piece = min(row // parts, max(128, fetched // (F * parts) // 128 * 128))
    return {"AHEAD": piece, "AHEAD_ROWS": F, "AHEAD_ROW": row, "AHEAD_PARTS": parts}


def choose(x: jax.Array, weight_FD: jax.Array, *, gated: bool) -> None:
    """Raises NotImplementedError where the kernel cannot be used here, or was not found to be faster than others."""
    call.require(KERNEL)
    if x.dtype != jnp.bfloat16 or weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError("only bfloat16")
    tokens, size = math.prod(x.shape[:-1]), weight_FD.size * weight_FD.dtype.itemsize / 1e6
    limits = ASKED if call.asked_for(KERNEL) else MEGABYTES["gated" if gated else "plain"]
    if not any(least <= tokens <= most and size <= limit for least, most, limit in limits):
        raise NotImplementedError(f"others do {tokens} tokens and {size:.0f} MB")


def matmul(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """See `api.matmul`. Raises NotImplementedError where another must do it."""
    choose(x, weight_FD, gated=False)
    x_TD = x.reshape(-1, x.shape[-1])
    run = implementation(x_TD, weight_FD, out_dtype=jnp.float32)
    out_TF = lax.platform_dependent(x_TD, weight_FD, cuda=lambda x, weight: run(x, weight), default=reference.matmul)
    return out_TF.reshape(*x.shape[:-1], -1)


def linear(
    x_TD: jax.Array,
    weight_FD: jax.Array,
    *,
    norm: Norm | None,
    activation: str | None,
    residual_TF: jax.Array | None,
) -> jax.Array:
    """See `api.linear`; the norm is XLA's. Raises NotImplementedError where it must be composed of others."""
    choose(x_TD, weight_FD, gated=activation is not None)
    if residual_TF is not None and residual_TF.dtype != x_TD.dtype:
        raise NotImplementedError("a residual of another dtype")
    run = implementation(x_TD, weight_FD, activation=activation, residual=residual_TF is not None)

    def kernel(operands: Operands) -> jax.Array:
        return run(*operands)

    def composed(operands: Operands) -> jax.Array:
        x, weight, residual = operands
        return reference.linear(x, weight, activation=activation, residual=residual)

    x_TD = x_TD if norm is None else reference.rms_norm(x_TD, norm)
    return lax.platform_dependent((x_TD, weight_FD, residual_TF), cuda=kernel, default=composed)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D, activation, split in (
        (8, 256, 1024, None, Split(64, 2, 4)),
        (61, 512, 2048, "silu", Split(128, 4, 2)),
    ):
        width = F // 2 if activation else F
        x, weight, residual = (
            jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D), (T, width))
        )
        run = implementation(x, weight, activation=activation, residual=True, split=split)
        out = jax.jit(run)(x, weight, residual)
        wanted = reference.linear(x, weight, activation=activation, residual=residual)
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")
