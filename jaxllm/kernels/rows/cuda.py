"""The passes between products on a Hopper GPU, by `cuda/residual_norm.cu` and `cuda/silu_mul.cu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Activations, BlockedTokens, Product, QuantizedTokens
from jaxllm.kernels.rows import reference

KERNELS = NORM, GATE, QUANTIZE = "residual_norm", "silu_mul", "quantize_tokens"
"""The names by which they are turned off; the last one has the first one's source."""
ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}
SMALLEST = 256
"""Columns, fewer than which a block has too little to do."""
MOST_THREADS = 1024
FEW = 2 * call.SMS
"""Rows that are on the chip at once: what counts is how long one takes, and a thread has as little to do as can be."""
MOST_SPLITS = 16
TOLERANCE = {False: 0.01, True: 0.03}
"""By how much results may differ from the reference, which rounds oftener; whether they are e4m3, where one rounding up
instead of down is an eighth."""

FASTER: dict[tuple[str, bool], tuple[tuple[int, int], ...]] = {
    (NORM, False): ((128, 1024),),
    (GATE, False): ((128, 1024),),
    (NORM, True): ((33, 1 << 20),),
    (GATE, True): ((33, 1 << 20),),
    (QUANTIZE, True): ((33, 1 << 20),),
}
"""Tokens, from and to, for which a kernel was measured to be faster than what XLA makes of the same, by its name and
whether what goes on is e4m3.

Measured on an H200 (jax 0.11.2) in the engine with Llama-3.1-8B's shapes, all of them beside none. In e4m3, together
with a rotation that finishes the projection: 64 requests decode in 3.60 ms, not 4.03; without that 256 in 6.36, not
6.85, and prompts go from 64,306 to 70,031 tokens per second. In bfloat16: 8 requests 4.45 ms, not 4.39; 64 5.34, not
5.07; 256 9.57, not 9.87. Products of prompts' tokens in cuBLAS add the residual themselves."""


def is_used(kernel: str) -> bool:
    """Whether there are tokens that the kernel is used for."""
    return any(name == kernel and tokens for (name, _), tokens in FASTER.items()) or call.asked_for(kernel)


def choose(kernel: str, tokens: int, *, quantised: bool) -> None:
    """Raises NotImplementedError where the kernel cannot be used, or was not found to be faster."""
    call.require(kernel)
    ranges = FASTER.get((kernel, quantised), ())
    if not any(low <= tokens <= high for low, high in ranges) and not call.asked_for(kernel):
        raise NotImplementedError(f"XLA does {tokens} tokens")


def macros_of(
    product: Product, columns: int, *, quantised: bool, per: int | None = None, blocks: int = 1
) -> dict[str, Any]:
    """Those of rows.cuh, and PER: for rows of which `columns` are a result, in so many blocks.

    Raises NotImplementedError for what the kernels cannot do.
    """
    (T, F), S = product.shape, product.sums.shape[0] if product.sums.ndim == 3 else 0
    dtype = product.dtype
    rounded = S > 0 and product.sums.dtype != jnp.float32
    if dtype not in (jnp.bfloat16, jnp.float32) or product.sums.dtype not in (dtype, jnp.float32 if S else dtype):
        raise NotImplementedError(f"{product.sums.dtype} products in {dtype}")
    if columns % 8 or columns < SMALLEST or S > MOST_SPLITS or not T:
        raise NotImplementedError(f"{T} rows of {columns} columns in {S} parts")
    if quantised and dtype != jnp.bfloat16:
        raise NotImplementedError(f"e4m3 of {dtype}")
    units = -(-columns // 8 // blocks)
    if per is None:
        # Of many rows several are on a multiprocessor, and a thread that has two units waits less often for others.
        per = -(-units // MOST_THREADS) if T <= FEW else -(-units // 512) if units > 512 else 2 if units > 256 else 1
    threads = -(-units // per // 32) * 32
    if threads > MOST_THREADS:
        raise NotImplementedError(f"rows of {columns} columns")
    scaled = int(product.token_scale is not None)
    together = max(1, 896 // threads) if T > FEW else 1  # with registers for all loads of a thread at once
    sizes = {"COLUMNS": F, "THREADS": threads, "BLOCKS": together, "PER": per, "SPLITS": S, "SCALED": scaled}
    sizes["ROUNDED"] = int(rounded)
    return {**sizes, "FLOAT": int(dtype == jnp.float32), "QUANT": int(quantised)}


def norm_kernel(
    product: Product,
    *,
    eps: float | None,
    residual: bool,
    quantised: bool,
    per: int | None = None,
    blocked: int = 0,
) -> Callable[..., tuple[jax.Array | None, Activations]]:
    """(product, residual or None, weight or None) -> the sum where there was one to make, and what goes on.

    eps: of the norm; None: there is none, and the sum itself is quantised. blocked: what goes on is `BlockedTokens` of
    so many rows; 0: it is not.
    """
    macros = macros_of(product, product.shape[1], quantised=quantised, per=per)
    T, D = product.shape
    if blocked and (product.dtype != jnp.bfloat16 or quantised or eps is None or D % 64 or blocked < T):
        raise NotImplementedError(f"{blocked} rows of {D} columns in blocks")
    finished = residual or product.sums.ndim == 3 or product.token_scale is not None
    macros |= {"RESIDUAL": int(residual), "NORM": int(eps is not None), "SUM": int(finished), "BLOCKED": blocked}
    ptx = call.compile_or_refuse(NORM, NORM, {**macros, "EPS": repr(float(eps or 0.0))})

    def run(
        product: Product, residual_TD: jax.Array | None = None, weight_D: jax.Array | None = None
    ) -> tuple[jax.Array | None, Activations]:
        sums, dtype = product.sums, product.dtype
        given = [product.token_scale, product.column_scale, residual_TD, weight_D]
        sum_TD, *out = call.launch(
            NORM,
            ptx,
            [sums, *(sums if other is None else other for other in given)],
            [
                jax.ShapeDtypeStruct(product.shape if finished else (16,), dtype),
                *_out((D // 64, blocked, 64) if blocked else product.shape, dtype, quantised),
            ],
            grid=(T,),
            threads=macros["THREADS"],
            shared=macros["THREADS"] // 4,
        )
        y = BlockedTokens(out[0], T) if blocked else _activations(out, dtype, quantised)
        return sum_TD if finished else None, y

    return run


def gate_kernel(
    product: Product, activation: str, *, quantised: bool, per: int | None = None
) -> Callable[[Product], Activations]:
    """The kernel of `api.gate` for these shapes. Raises NotImplementedError where there is none."""
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"activation {activation}")
    T, columns = product.shape[0], product.shape[1] // 2
    # A row that nobody needs as a whole is spread over the chip.
    blocks = 1 if quantised else -(-columns // 8 // (128 if T <= 16 else 256))
    macros = macros_of(product, columns, quantised=quantised, per=per, blocks=blocks)
    macros["ACTIVATION"] = ACTIVATIONS[activation]
    ptx = call.compile_or_refuse(GATE, GATE, macros)

    def run(product: Product) -> Activations:
        sums, dtype = product.sums, product.dtype
        out = call.launch(
            GATE,
            ptx,
            [sums, *(sums if other is None else other for other in (product.token_scale, product.column_scale))],
            _out((T, columns), dtype, quantised),
            grid=(T, blocks),
            threads=macros["THREADS"],
            shared=macros["THREADS"] // 4,
        )
        return _activations(out, dtype, quantised)

    return run


def _out(shape: tuple[int, ...], dtype: jnp.dtype, quantised: bool) -> list[jax.ShapeDtypeStruct]:
    values = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn if quantised else dtype)
    return [values, jax.ShapeDtypeStruct((shape[0], 1) if quantised else (4,), jnp.float32)]


def _activations(out: list[jax.Array], dtype: jnp.dtype, quantised: bool) -> Activations:
    return QuantizedTokens(out[0], out[1], dtype) if quantised else out[0]


def require_residual_norm(residual_TD: jax.Array, *, quantised: bool) -> None:
    """Raises NotImplementedError where XLA must add to such residuals."""
    choose(NORM, residual_TD.shape[0], quantised=quantised)
    macros_of(Product.of(residual_TD), residual_TD.shape[1], quantised=False)


def residual_norm(
    product: Product, residual_TD: jax.Array, eps: float, *, quantised: bool, blocked: int = 0
) -> Callable[..., tuple[jax.Array, Activations]]:
    """The kernel of `api.residual_norm`. Raises NotImplementedError where XLA must do the work."""
    require_residual_norm(residual_TD, quantised=quantised or product.token_scale is not None)
    if (residual_TD.shape, residual_TD.dtype) != (product.shape, product.dtype):
        raise NotImplementedError(f"a product in {product.dtype}{product.shape} and a residual in {residual_TD.dtype}")
    run = norm_kernel(product, eps=eps, residual=True, quantised=quantised, blocked=blocked)

    def kernel(product: Product, residual_TD: jax.Array, weight_D: jax.Array) -> tuple[jax.Array, Activations]:
        sum_TD, y = run(product, residual_TD, weight_D)
        assert sum_TD is not None
        return sum_TD, y

    return kernel


def quantized_norm(x_TD: jax.Array, eps: float) -> Callable[[jax.Array, jax.Array], QuantizedTokens]:
    """The kernel of `api.quantized_norm`. Raises NotImplementedError where XLA must do the work."""
    if x_TD.ndim != 2:
        raise NotImplementedError("rows of rows")
    choose(NORM, x_TD.shape[0], quantised=True)
    run = norm_kernel(Product.of(x_TD), eps=eps, residual=False, quantised=True)
    return lambda x_TD, weight_D: _tokens(run(Product.of(x_TD), None, weight_D)[1])


def blocked_norm(x_TD: jax.Array, eps: float, rows: int) -> Callable[[jax.Array, jax.Array], BlockedTokens]:
    """The kernel of `api.blocked_norm`. Raises NotImplementedError where there is none."""
    if x_TD.ndim != 2:
        raise NotImplementedError("rows of rows")
    call.require(NORM)
    run = norm_kernel(Product.of(x_TD), eps=eps, residual=False, quantised=False, blocked=rows)

    def kernel(x_TD: jax.Array, weight_D: jax.Array) -> BlockedTokens:
        x = run(Product.of(x_TD), None, weight_D)[1]
        assert isinstance(x, BlockedTokens)
        return x

    return kernel


def gate(product: Product, activation: str, *, quantised: bool) -> Callable[[Product], Activations]:
    """The kernel of `api.gate`. Raises NotImplementedError where XLA must do the work."""
    choose(GATE, product.shape[0], quantised=quantised)
    return gate_kernel(product, activation, quantised=quantised)


def quantize(x_TD: jax.Array) -> Callable[[jax.Array], QuantizedTokens]:
    """The kernel of `api.quantize`. Raises NotImplementedError where XLA must do the work."""
    if x_TD.ndim != 2:
        raise NotImplementedError("rows of rows")
    choose(QUANTIZE, x_TD.shape[0], quantised=True)
    run = norm_kernel(Product.of(x_TD), eps=None, residual=False, quantised=True)
    return lambda x_TD: _tokens(run(Product.of(x_TD))[1])


def _tokens(x: Activations) -> QuantizedTokens:
    assert isinstance(x, QuantizedTokens)
    return x


def check(kernel: str) -> None:
    """Raises ArithmeticError if a kernel differs from its reference on small inputs; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, D, splits, quantised, dtype, blocked in (
        (3, 4096, 0, False, jnp.bfloat16, 0),
        (70, 1040, 4, True, jnp.bfloat16, 0),
        (2, 576, 0, False, jnp.float32, 0),
        (9, 512, 2, False, jnp.bfloat16, 64),
    ):
        x, residual = (jnp.asarray(rng.standard_normal((T, n)), dtype) for n in (2 * D if kernel == GATE else D, D))
        weight_D = jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.float32)
        product = Product.of(x)
        if splits:
            parts = jnp.asarray(rng.standard_normal((splits, *x.shape)), jnp.float32)
            of_rows, of_columns = (jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32) for n in ((T, 1), x.shape[1]))
            product = Product(parts, of_rows, of_columns, x.dtype)
        found: Any
        wanted: Any
        if kernel == NORM:
            run = jax.jit(norm_kernel(product, eps=1e-5, residual=True, quantised=quantised, blocked=blocked))
            found = run(product, residual, weight_D)
            wanted = reference.residual_norm(product, residual, (weight_D, 1e-5), quantised=quantised)
        elif kernel == GATE:
            found = jax.jit(gate_kernel(product, "silu", quantised=quantised))(product)
            wanted = reference.gate(product, "silu", quantised=quantised)
        elif dtype == jnp.bfloat16:
            found = jax.jit(norm_kernel(Product.of(x), eps=None, residual=False, quantised=True))(Product.of(x))[1]
            wanted = reference.quantize(x)
        else:
            continue
        error = distance(found, wanted)
        if not error < TOLERANCE[quantised or kernel == QUANTIZE]:
            raise ArithmeticError(f"{kernel} is wrong by {error:.1e} at {T} rows of {D}")


def distance(found: Any, wanted: Any) -> float:
    """The largest norm of a difference over the norm of what is wanted, of results of the same form."""

    def numbers(tree: Any) -> list[np.ndarray]:
        if isinstance(tree, BlockedTokens):
            return numbers(tree.plain())
        if isinstance(tree, QuantizedTokens):
            return [np.asarray(tree.values, np.float32) * np.asarray(tree.scale)]
        if isinstance(tree, tuple):
            return [x for part in tree for x in numbers(part)]
        return [np.asarray(tree, np.float32)]

    pairs = zip(numbers(found), numbers(wanted), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
