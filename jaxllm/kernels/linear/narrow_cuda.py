"""Products of up to 128 tokens with a large matrix of bfloat16 on a Hopper GPU, by `cuda/narrow_gemm.cu`: on wgmma, the
weight as the left operand; with act(gate) * up of the halves of the result, the addition of a residual, and the norms
around it, see `ScaledTokens`.
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
from jaxllm.kernels.linear.product import BlockedTokens, ScaledTokens
from jaxllm.kernels.linear.reference import Norm

KERNEL = "narrow_gemm"
COLUMNS = (8, 16, 32, 64, 128)
"""Tokens that a product is made for."""

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


NORMS = "narrow_norm"
"""The name by which the norms between such products are asked for, or turned off."""
SCALED: tuple[tuple[int, int], ...] = ((2, 32),)
"""Tokens, from and to, of which the products make the norms between them: one that adds to the residual what the norm
needs of the sum, and those that follow the rest, so that there is no kernel for it.

Measured on an H200 (jax 0.11.2) in the engine with Llama-3.1-8B's shapes: 8 requests decode in 4.17 ms, not 4.30, and
32 in 4.46, not 4.58; 64 take 5.05 both ways."""
ASKED_SCALED = ((2, 128),)
"""As above, where they are asked for by name."""

Operands = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""x, weight, the residual and the sums of squares."""


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

    def stages(self, columns: int, features: int, *, factors: bool = False, scaled: bool = False) -> int:
        """As many as fit in shared memory. factors, scaled: whether there is a norm before the product, after it."""
        buffers = 0 if self.cluster == 1 else 1 + (self.tiles(features) > self.clusters(features))
        norms = factors * (columns * 4 + 2048) + scaled * (self.rows // 16 // self.cluster * columns * 4)
        room = call.MAX_SHARED - 512 - buffers * self.rows * columns * 4 - norms
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
    split: Split | None = None,
    parts: int = 0,
    eps: float = 0.0,
    scaled: bool = False,
    blocked: int = 0,
) -> Callable[..., list[jax.Array]]:
    """The kernel for these shapes, as a function of (x, weight, residual_TF, squares_PC, norm_F) that returns a
    list of one, or with `scaled` of three, in a program for an H100 or H200.

    It computes what `api.linear` does, [T, F] (half of F with an activation). Operands are bfloat16; a residual that
    there is not is None. Sums are float32, and rounded once, to out_dtype (bfloat16 or float32). A token's result does
    not depend on the others. parts: of the sums of squares of x where that is
    `ScaledTokens.values`, with the norm's eps. scaled: also the values and sums of squares for a norm of the result;
    blocked: these values are blocked, in so many rows.

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
    if scaled and (activation is not None or out_dtype != jnp.bfloat16 or (blocked and F % 64)):
        raise NotImplementedError("a norm after an activation, or of float32, or of incomplete blocks")
    norms = {"factors": parts > 0, "scaled": scaled}
    shared = call.MAX_SHARED
    macros = {
        "TOKENS": T, "COLUMNS": columns, "FEATURES": F, "INPUTS": D,
        "ROWS": split.rows, "PANELS": split.panels, "STAGES": split.stages(columns, F, **norms),
        "CLUSTER": split.cluster, "CLUSTERS": split.clusters(F), "FETCH": split.fetch, "STAGGER": int(split.stagger),
        "GATED": ACTIVATIONS[activation], "RESIDUAL": int(residual), "OUT_FLOAT": int(out_dtype == jnp.float32),
        "SHARED": shared, "PARTS": parts, "EPS": repr(float(eps)), "SCALED": int(scaled),
        "BLOCKED": blocked,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    grid, threads = split.clusters(F) * split.cluster, 128 + 2 * split.rows
    # What the kernel neither reads nor writes must still be a pointer.
    results = [
        jax.ShapeDtypeStruct((T, F // 2 if activation else F), out_dtype),
        jax.ShapeDtypeStruct(((F // 64, blocked, 64) if blocked else (T, F)) if scaled else (8,), jnp.bfloat16),
        jax.ShapeDtypeStruct((grid, columns) if scaled else (4,), jnp.float32),
    ]

    def run(
        x: jax.Array,
        weight: jax.Array,
        residual_TF: jax.Array | None = None,
        squares_PC: jax.Array | None = None,
        norm_F: jax.Array | None = None,
    ) -> list[jax.Array]:
        others = [x if other is None else other for other in (residual_TF, squares_PC, norm_F)]
        made = call.launch(KERNEL, ptx, [x, weight, *others], results, grid=(grid,), threads=threads, shared=shared)
        return made if scaled else made[:1]

    return run


Shaped = jax.Array | jax.ShapeDtypeStruct


def choose(x: Shaped, weight_FD: Shaped, *, gated: bool) -> None:
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
    out_TF = lax.platform_dependent(x_TD, weight_FD, cuda=lambda x, weight: run(x, weight)[0], default=reference.matmul)
    return out_TF.reshape(*x.shape[:-1], -1)


def linear(
    x_TD: jax.Array | ScaledTokens,
    weight_FD: jax.Array,
    *,
    norm: Norm | None,
    activation: str | None,
    residual_TF: jax.Array | None,
) -> jax.Array:
    """See `api.linear`; a norm is XLA's. Raises NotImplementedError where it must be composed of others."""
    values: jax.Array
    squares: jax.Array | None
    if isinstance(x_TD, ScaledTokens):
        if isinstance(x_TD.values, BlockedTokens):
            raise NotImplementedError("blocked values")
        values, squares, eps = x_TD.values, x_TD.squares, x_TD.eps
    else:
        values, squares, eps = x_TD, None, 0.0
    choose(values, weight_FD, gated=activation is not None)
    if residual_TF is not None and residual_TF.dtype != x_TD.dtype:
        raise NotImplementedError("a residual of another dtype")
    if squares is not None and (norm is not None or squares.shape[1] != columns_for(values.shape[0])):
        raise NotImplementedError("another norm, or other sums of squares")
    parts = 0 if squares is None else squares.shape[0]
    run = implementation(
        values, weight_FD, activation=activation, residual=residual_TF is not None, parts=parts, eps=eps
    )

    def kernel(operands: Operands) -> jax.Array:
        x, weight, residual, squares = operands
        return run(x, weight, residual, squares)[0]

    def composed(operands: Operands) -> jax.Array:
        x, weight, residual, squares = operands
        x = x if squares is None else ScaledTokens(x, squares, eps).plain()
        return reference.linear(x, weight, activation=activation, residual=residual)

    values = values if norm is None else reference.rms_norm(values, norm)
    return lax.platform_dependent((values, weight_FD, residual_TF, squares), cuda=kernel, default=composed)


def makes_norms() -> bool:
    """Whether any product may make the norms around it."""
    return bool(SCALED) or call.asked_for(NORMS)


def norms_of(tokens: int) -> bool:
    """Whether products of so many tokens make the norms between them, where they can."""
    ranges = ASKED_SCALED if call.asked_for(NORMS) else SCALED
    return any(least <= tokens <= most for least, most in ranges) and call.usable(NORMS)


def scales(x: Shaped, weight_FD: Shaped, *, gated: bool) -> bool:
    """Whether products with such activations are of those that make the norms between them."""
    if not norms_of(x.shape[0]):
        return False
    try:
        choose(x, weight_FD, gated=gated)
        implementation(x, weight_FD)
    except NotImplementedError:
        return False
    return True


def add_scaled(
    x_TD: jax.Array, weight_FD: jax.Array, residual_TF: jax.Array, norm: Norm, blocked: int = 0
) -> tuple[jax.Array, ScaledTokens]:
    """The residual plus the product, and what a norm makes of that sum; where `scales` says so.

    blocked: the second has values in blocks of so many rows; 0: it has not.
    """
    norm_F, eps = norm
    split, columns = splitting(*x_TD.shape[:1], *weight_FD.shape), columns_for(x_TD.shape[0])
    run = implementation(x_TD, weight_FD, residual=True, scaled=True, blocked=blocked)
    parts = split.clusters(weight_FD.shape[0]) * split.cluster, columns

    def kernel(x: jax.Array, weight: jax.Array, residual: jax.Array, norm: jax.Array) -> tuple[jax.Array, ScaledTokens]:
        out, values, squares = run(x, weight, residual, None, norm)
        return out, ScaledTokens(BlockedTokens(values, x.shape[0]) if blocked else values, squares, eps)

    def composed(
        x: jax.Array, weight: jax.Array, residual: jax.Array, norm: jax.Array
    ) -> tuple[jax.Array, ScaledTokens]:
        out = reference.linear(x, weight, residual=residual)
        return out, ScaledTokens.of(out, norm, eps, parts, blocked)

    return lax.platform_dependent(x_TD, weight_FD, residual_TF, norm_F, cuda=kernel, default=composed)


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
        out = jax.jit(run)(x, weight, residual)[0]
        wanted = reference.linear(x, weight, activation=activation, residual=residual)
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")


def check_norms() -> None:
    """Raises ArithmeticError if two products with a norm between them are wrong on a small input; on a GPU."""
    rng = np.random.default_rng(0)
    for T, D, F, split in ((5, 512, 1024, Split(64, 2, 2)), (27, 768, 512, Split(128, 1, 1))):
        x, first, second, residual = (
            jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D), (2 * F, F), (T, F))
        )
        norm_F = jnp.asarray(rng.uniform(0.5, 1.5, F), jnp.float32)
        add = implementation(x, first, residual=True, scaled=True, split=split)
        parts = split.clusters(F) * split.cluster
        product = implementation(residual, second, activation="silu", parts=parts, eps=1e-5)

        @jax.jit
        def both(x: jax.Array, residual: jax.Array, norm_F: jax.Array) -> jax.Array:
            _, values, squares = add(x, first, residual, None, norm_F)  # noqa: B023
            return product(values, second, None, squares)[0]  # noqa: B023

        total = reference.linear(x, first, residual=residual)
        wanted = reference.linear(total, second, norm=(norm_F, 1e-5), activation="silu")
        error = float(jnp.abs(both(x, residual, norm_F).astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{NORMS} is wrong by {error:.1e} at T={T} F={F} D={D}")
