"""Products of up to 64 tokens with a large matrix, both in e4m3, on a Hopper GPU, by `cuda/skinny_fp8.cu`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import quantized, reference
from jaxllm.kernels.linear.cuda import ACTIVATIONS, CLUSTERS
from jaxllm.kernels.linear.product import Product, QuantizedTokens
from jaxllm.kernels.linear.quantized import QuantizedWeight, quantize, quantize_tokens
from jaxllm.kernels.linear.reference import Norm
from jaxllm.kernels.rows import api as rows

KERNEL = "skinny_fp8"
MAX_TOKENS = 64
COLUMNS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
"""Rows of the weight that a product is made for."""
WIDE_TOKENS = 4
"""Tokens up to which every block can quantise all of them."""
WIDE_INPUTS = 16384
"""More do not fit in shared memory beside enough of the weight."""
WIDE_REGISTERS = 112
"""Of a thread, for its part of these, and of a norm's weight."""
AHEAD = 96 * 1024
"""Bytes of the weight that is read next, for each block to bring to the second-level cache."""
SLACK = 8192
"""Bytes after the stages, which products may read and make nothing of."""

FEW = 8
"""Tokens up to which the kernel is the fastest."""
MEGABYTES: tuple[tuple[int, int, int], ...] = ((1, FEW, 600),)
"""Where the kernel is used: for so many tokens and more, up to so many, weights of up to so many megabytes.

Measured on an H200 (jax 0.11.2), the products of a layer of Llama-3.1-8B with what is around them: at 1 token 68 us,
where a kernel that widens the weight to bfloat16 takes 73; at 8 tokens 88, XLA 91; at 16 tokens 89 and 88."""

Operands = tuple[jax.Array, QuantizedWeight, jax.Array | None, jax.Array | None]
"""x, weight, the norm's weight and the residual."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the work is split; see the kernel."""

    rows: int
    cluster: int
    across: int
    deep: int
    panels: int

    @property
    def lines(self) -> int:
        return self.deep * self.panels

    @property
    def threads(self) -> int:
        return 128 * self.across * self.deep

    def grid(self, features: int) -> int:
        return -(-features // self.rows) * self.cluster

    def steps(self, inputs: int) -> int:
        return -(-inputs // (128 * self.cluster * self.lines))

    def shared(self, tokens: int, inputs: int, wide: bool, stages: int | None = None) -> int:
        """Bytes of shared memory."""
        stages = self.stages(tokens, inputs, wide) if stages is None else stages
        x = -(-inputs // (128 * self.cluster)) * 1024 if wide else 0
        given = max(SLACK, 0 if self.cluster == 1 else self.rows * tokens * 4)
        return x + stages * self.stage(tokens, wide) + given + (256 if wide else 0)

    def stage(self, tokens: int, wide: bool) -> int:
        """Bytes of a stage."""
        return self.lines * 128 * (self.rows + (0 if wide else token_rows(tokens)))

    def stages(self, tokens: int, inputs: int, wide: bool) -> int:
        """As many as fit in shared memory and are of use; 0 where too few fit."""
        stage = self.stage(tokens, wide)
        least = max(2, -(-self.deep * tokens * (self.rows + 8) * 4 // stage))  # sums take their place
        count = (call.MAX_SHARED - self.shared(tokens, inputs, wide, 0)) // stage
        return min(count, max(self.steps(inputs), least)) if count >= least else 0

    def fits(self, tokens: int, inputs: int, wide: bool = False, gated: bool = False) -> bool:
        """Whether the kernel can be made so."""
        at_once = self.threads // (self.lines * 8)
        if wide and (tokens > WIDE_TOKENS or self.threads < 256 or inputs % (self.cluster * self.lines * 128)):
            return False
        return (
            self.rows % self.across == 0
            and self.rows // self.across in COLUMNS
            and at_once % 8 == 0
            and self.rows % at_once == 0
            and self.rows % ((16 if gated else 4) * self.cluster) == 0
            and inputs // 128 >= self.cluster * self.lines
            and self.stages(tokens, inputs, wide) > 0
        )

    def nanoseconds(self, tokens: int, features: int, inputs: int, wide: bool) -> float:
        """An estimate, to compare splits by."""
        blocks, together = self.grid(features), CLUSTERS[self.cluster] * self.cluster
        rounds = -(-blocks // together)
        part = self.steps(inputs) * self.lines * 128
        # A block reads at up to 45 bytes per nanosecond, tokens from the second-level cache; all together the weight at
        # 4,560, and what they read of both at about 6,000.
        alone = part * (self.rows + tokens) / 45
        # A step is a barrier, and products one after the other, which all warpgroups' read shared memory for.
        product = (64 + self.rows // self.across) * 32 * self.across * self.deep / 225
        alone = max(alone, self.steps(inputs) * (170 + self.panels * 4 * product))
        chip = min(blocks, together) * part * max(self.rows / 4560, (self.rows + tokens) / 6000)
        under_way = (self.stages(tokens, inputs, wide) - 1) * self.lines * 128 * self.rows
        sums = 0 if self.cluster == 1 else 500 + 250 * self.cluster + self.rows * tokens * 4 / 40
        return rounds * (max(alone, chip) * max(1.0, 65536 / under_way) ** 0.5 + sums + 2500)


def token_rows(tokens: int) -> int:
    """Rows of shared memory that tokens take."""
    return next(rows for rows in (8, 16, 32, 64) if rows >= tokens)


@cache
def splitting(tokens: int, features: int, inputs: int, *, wide: bool = False, gated: bool = False) -> Split:
    """A good split. Raises NotImplementedError where nothing fits."""
    tokens = WIDE_TOKENS if wide else token_rows(tokens)  # and so the same for all of them
    splits = []
    for cluster, across, columns, deep, panels in itertools.product(CLUSTERS, (1, 2), COLUMNS, (1, 2), (1, 2)):
        split = Split(columns * across, cluster, across, deep, panels)
        if split.threads == 256 and split.fits(tokens, inputs, wide, gated):
            splits.append(split)
    if not splits:
        raise NotImplementedError("it does not fit in shared memory")
    return min(splits, key=lambda split: split.nanoseconds(tokens, features, inputs, wide))


def registers(tokens: int, inputs: int, norm: bool, threads: int = 256) -> int:
    """That a thread has its part of wide tokens in."""
    spread = next(count for count in (1, 2, 4, MAX_TOKENS) if count >= tokens)
    return -(-inputs * spread // (8 * threads)) * (12 if norm else 4)


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    features: int,
    *,
    eps: float | None = None,
    activation: str | None = None,
    residual: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ahead: jax.Array | jax.ShapeDtypeStruct | None = None,
    fetched: int = AHEAD,
    split: Split | None = None,
) -> Callable[..., jax.Array]:
    """The kernel for an x: a function of (x, x_scale, weight, scale, norm_D, residual_TF, ahead), for an H100 or H200.

    It computes what `api.linear` does, [T, F] (half of F with an activation) in out_dtype, bfloat16 or float32. The
    weight is [F, D] in e4m3 with a float32 scale of each row. x is so, too, with a scale of each token; or bfloat16 of
    up to 4 tokens, which the kernel norms where there is an eps, and quantises as `quantize_tokens`. The norm's weight
    is float32 and the residual bfloat16; ahead is a weight that is read next, in e4m3, of which the second-level cache
    fetches up to `fetched` bytes for each block while this product ends. Operands that there are not are None.

    Sums are float32, of 128 or 256 inputs at a time, which the tensor cores add up with about 14 bits. A token's result
    does not depend on the others.

    Raises NotImplementedError where there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    (T, D), wide = x_TD.shape, x_TD.dtype == jnp.bfloat16
    if not wide and (x_TD.dtype != jnp.float8_e4m3fn or eps is not None):
        raise NotImplementedError(f"activations in {x_TD.dtype}")
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"activation {activation}")
    if not 0 < T <= (WIDE_TOKENS if wide else MAX_TOKENS) or D % 128 or features % (16 if activation else 8):
        raise NotImplementedError(f"{T} tokens of {D} inputs and {features} features")
    split = splitting(T, features, D, wide=wide, gated=activation is not None) if split is None else split
    if wide and registers(T, D, eps is not None, split.threads) > WIDE_REGISTERS:
        raise NotImplementedError(f"{T} tokens of {D} inputs to be quantised")
    shared = split.shared(T, D, wide)
    macros = {
        "TOKENS": T, "FEATURES": features, "INPUTS": D,
        "ROWS": split.rows, "CLUSTER": split.cluster, "ACROSS": split.across, "DEEP": split.deep,
        "PANELS": split.panels, "STAGES": split.stages(T, D, wide),
        "WIDE": int(wide), "NORM": int(eps is not None), "EPS": f"{float(eps or 0.0)!r}f",
        "GATED": ACTIVATIONS[activation], "RESIDUAL": int(residual),
        "OUT_FLOAT": int(out_dtype == jnp.float32), "SHARED": shared,
        "AHEAD": 0 if ahead is None else min(fetched, ahead.size // split.grid(features)) // 512 * 512,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((T, features // 2 if activation else features), out_dtype)

    def run(
        x: jax.Array,
        x_scale: jax.Array | None,
        weight: jax.Array,
        scale: jax.Array,
        norm_D: jax.Array | None = None,
        residual_TF: jax.Array | None = None,
        ahead: jax.Array | None = None,
    ) -> jax.Array:
        # What the kernel does not read must still be a pointer.
        given = (x, x_scale, weight, scale, norm_D, residual_TF, ahead)
        arguments, grid = [x if operand is None else operand for operand in given], (split.grid(features),)
        return call.launch(KERNEL, ptx, arguments, [result], grid=grid, threads=split.threads, shared=shared)[0]

    return run


def is_chosen(x: jax.Array | jax.ShapeDtypeStruct, weight: QuantizedWeight) -> bool:
    """Whether products of such an x (not yet quantised) and this weight are the kernel's."""
    try:
        choose(x, weight)
    except NotImplementedError:
        return False
    return True


def choose(x: jax.Array | jax.ShapeDtypeStruct | QuantizedTokens, weight: QuantizedWeight) -> None:
    """Raises NotImplementedError where the kernel cannot be used here, or was not found to be faster than others."""
    call.require(KERNEL)
    if weight.format != Format("fp8") or len(weight.shape) != 2 or x.dtype != jnp.bfloat16:
        raise NotImplementedError("only bfloat16, and e4m3 with one scale for each row")
    (F, D), tokens = weight.shape, math.prod(x.shape[:-1])
    if not 0 < tokens <= MAX_TOKENS or D % 128 or F % 32:
        raise NotImplementedError(f"{tokens} tokens of {D} inputs and {F} features")
    megabytes = F * D / 1e6
    if not call.asked_for(KERNEL) and not any(
        low <= tokens <= high and megabytes <= most for low, high, most in MEGABYTES
    ):
        raise NotImplementedError(f"others do {tokens} tokens and {megabytes:.0f} MB")
    splitting(tokens, F, D, wide=is_wide(tokens, D))


def is_wide(tokens: int, inputs: int) -> bool:
    """Whether the kernel is to quantise so many tokens itself."""
    return tokens <= WIDE_TOKENS and inputs <= WIDE_INPUTS and registers(tokens, inputs, False) <= WIDE_REGISTERS


def product(x: QuantizedTokens, weight: QuantizedWeight) -> Product:
    """The product of e4m3 activations and weights. Raises NotImplementedError where another must do it."""
    choose(x, weight)
    return Product.of(_multiply(x, weight))


def _multiply(x: QuantizedTokens, weight: QuantizedWeight) -> jax.Array:
    run = implementation(x.values, weight.shape[0], out_dtype=x.dtype)

    def kernel(x: QuantizedTokens, weight: QuantizedWeight) -> jax.Array:
        return run(x.values, x.scale, weight.values, weight.scale)

    def composed(x: QuantizedTokens, weight: QuantizedWeight) -> jax.Array:
        return quantized.product(x, weight).finish()

    return lax.platform_dependent(x, weight, cuda=kernel, default=composed)


def linear(
    x_TD: jax.Array,
    weight: QuantizedWeight,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """See `api.linear`; in one kernel, for so few tokens that it quantises them itself; the result in `dtype`.

    Raises NotImplementedError where others must do it.
    """
    choose(x_TD, weight)
    if not is_wide(x_TD.shape[0], x_TD.shape[1]):
        raise NotImplementedError("tokens are quantised by a kernel before")
    if residual is not None and residual.dtype != x_TD.dtype:
        raise NotImplementedError("a residual of another dtype")
    if norm is not None and registers(x_TD.shape[0], x_TD.shape[1], True) > WIDE_REGISTERS:
        x_TD, norm = reference.rms_norm(x_TD, norm), None
    norm_D, eps = (None, None) if norm is None else norm
    run = implementation(
        x_TD, weight.shape[0], eps=eps, activation=activation, residual=residual is not None, out_dtype=dtype
    )

    def kernel(operands: Operands) -> jax.Array:
        x, weight, norm_D, residual = operands
        return run(x, None, weight.values, weight.scale, norm_D, residual)

    def composed(operands: Operands) -> jax.Array:
        x, weight, norm_D, residual = operands
        norm = None if norm_D is None or eps is None else (norm_D, eps)
        matmul = partial(_quantised, dtype)
        return reference.linear(x, weight, norm=norm, activation=activation, residual=residual, matmul=matmul)

    operands: Operands = (x_TD, weight, norm_D, residual)
    return lax.platform_dependent(operands, cuda=kernel, default=composed)


def _quantised(
    dtype: jax.typing.DTypeLike, x: jax.Array, weight: QuantizedWeight, _: jax.typing.DTypeLike
) -> jax.Array:
    return quantized.product(QuantizedTokens(*quantize_tokens(x), jnp.dtype(dtype)), weight).finish()


def matmul(x: jax.Array, weight: QuantizedWeight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """See `api.matmul`; tokens are quantised. Raises NotImplementedError where another must do it."""
    choose(x, weight)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"results in {dtype}")
    x_TD = x.reshape(-1, x.shape[-1])
    if is_wide(x_TD.shape[0], x_TD.shape[1]):
        y_TF = linear(x_TD, weight, dtype=dtype)
    else:
        y_TF = _multiply(replace(rows.quantize(x_TD), dtype=jnp.dtype(dtype)), weight)
    return y_TF.reshape(*x.shape[:-1], -1)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D, split in (
        (3, 224, 1280, Split(112, 1, 1, 2, 2)),
        (50, 384, 2048, Split(192, 4, 2, 1, 1)),
    ):
        wide, x = (jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((F, D), (T, D)))
        weight = quantize(wide, Format("fp8"))
        values, scale = quantize_tokens(x)
        run = implementation(values, F, out_dtype=jnp.float32, split=split)
        found = jax.jit(run)(values, scale, weight.values, weight.scale)
        wanted = jnp.matmul(values.astype(jnp.float32), weight.values.astype(jnp.float32).T, precision="highest")
        wanted = wanted * scale * weight.scale[:, 0]
        error = float(jnp.abs(found - wanted).max())
        if not error < 0.003 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")
