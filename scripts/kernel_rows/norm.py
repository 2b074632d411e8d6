"""Passes between products (residual + norm, act(gate) * up, quantisation): against the reference, and beside XLA's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_rows._measure import BANDWIDTH, Row

from jaxllm.bench.profile import record
from jaxllm.kernels.linear.product import Product, QuantizedTokens
from jaxllm.kernels.linear.quantized import quantize_tokens
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.kernels.rows import cuda, reference

BF16, F32 = jnp.bfloat16, jnp.float32
D, F = 4096, 14336
"""Of Llama-3.1-8B."""
EPS = 1e-5
TOKENS = (1, 8, 64, 256, 16384)

# rows, columns, dtype, sums, scaled, residual, quantised, units of a thread
NORMS = (
    (1, 4096, BF16, 0, False, True, False, None),
    (17, 4096, BF16, 8, False, True, False, None),
    (3, 16384, BF16, 2, False, True, False, None),
    (5, 576, F32, 0, False, True, False, None),
    (2, 16384, F32, 4, False, True, False, None),
    (301, 1000, BF16, 0, False, True, False, None),
    (4097, 4096, BF16, 0, False, True, False, 4),
    (16384, 5120, BF16, 0, False, True, False, None),
    (33, 4096, BF16, 0, True, True, True, None),
    (999, 8192, BF16, 0, True, True, True, None),
    (7, 2048, BF16, 0, False, False, True, None),
    (65, 4096, BF16, 0, False, False, False, None),
)
# rows, columns of the result, dtype, scaled, activation, quantised
GATES = (
    (1, 14336, BF16, False, "silu", False),
    (3, 1000, F32, False, "gelu_tanh", False),
    (65, 14336, BF16, True, "silu", True),
    (777, 14336, BF16, True, "silu", True),
    (301, 5504, BF16, False, "silu", False),
)
QUANTISED = ((1, 4096), (33, 4096), (1001, 8192))


def numbers(key: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, F32).astype(dtype)


def product_of(T: int, columns: int, dtype: Any, parts: int, scaled: bool) -> Product:
    sums = numbers(1, parts, T, columns, dtype=F32) if parts else numbers(1, T, columns, dtype=dtype)
    scales = [jnp.abs(numbers(key, *shape, dtype=F32)) + 0.5 for key, shape in ((2, (T, 1)), (3, (columns,)))]
    return Product(sums, *(scales if scaled else (None, None)), np.dtype(dtype))


def right() -> dict[str, Any]:
    """Distance from the reference, of the sums and of what goes on."""
    found: dict[str, Any] = {}
    wrong = False

    def compare(label: str, one: Any, other: Any, quantised: bool) -> None:
        nonlocal wrong
        error = cuda.distance(one, other)
        found[label] = error
        wrong = wrong or not error < cuda.TOLERANCE[quantised]

    for T, columns, dtype, parts, scaled, residual, quantised, per in NORMS:
        product = product_of(T, columns, dtype, parts, scaled)
        other, weight = numbers(4, T, columns, dtype=dtype), 1 + numbers(5, columns, dtype=F32) / 4
        run = jax.jit(cuda.norm_kernel(product, eps=EPS, residual=residual, quantised=quantised, per=per))
        label = f"{T}x{columns} {np.dtype(dtype).name} {parts} {'scaled' * scaled} {'e4m3' * quantised}"
        if residual:
            plain = jax.jit(partial(_residual_norm, quantised=quantised))
            compare(label, run(product, other, weight), plain(product, other, weight), quantised)
        else:
            plain = jax.jit(partial(_normed, quantised=quantised))
            compare(label, run(product, None, weight)[1], plain(product.sums, weight), quantised)
    for T, columns, dtype, scaled, activation, quantised in GATES:
        product = product_of(T, 2 * columns, dtype, 0, scaled)
        kernel = jax.jit(cuda.gate_kernel(product, activation, quantised=quantised))
        plain = jax.jit(partial(reference.gate, activation=activation, quantised=quantised))
        compare(f"{activation} {T}x{columns} {'e4m3' * quantised}", kernel(product), plain(product), quantised)
    for T, columns in QUANTISED:
        product = product_of(T, columns, BF16, 0, False)
        run = jax.jit(cuda.norm_kernel(product, eps=None, residual=False, quantised=True))
        wanted = QuantizedTokens(*jax.jit(quantize_tokens)(product.sums), product.dtype)
        compare(f"e4m3 {T}x{columns}", run(product)[1], wanted, True)
    return found | {"wrong": wrong}


def _residual_norm(product: Product, residual: jax.Array, weight: jax.Array, *, quantised: bool) -> Any:
    return reference.residual_norm(product, residual, (weight, EPS), quantised=quantised)


def _normed(x: jax.Array, weight: jax.Array, *, quantised: bool) -> Any:
    return reference.quantized_norm(x, (weight, EPS)) if quantised else rms_norm(x, (weight, EPS))


REPEATS = 20
RUNS = 3


def device_time(run: Callable[..., Any], *arguments: Any) -> tuple[float, int]:
    """Microseconds of the kernels of a call, each by itself, and their number: from a trace.

    Around such small kernels everything else takes longer than they do. They find in the second-level cache what fits.
    """

    def program(arguments: Any) -> Any:
        outs = []
        for _ in range(REPEATS if arguments[0].shape[0] <= 1024 else 2):
            arguments, out = lax.optimization_barrier((arguments, run(*arguments)))
            outs.append(out)
        return outs  # all of them, or XLA leaves out what nobody reads

    call = jax.jit(program)
    repeats = len(jax.block_until_ready(call(arguments)))
    with tempfile.TemporaryDirectory() as folder:
        found = record(folder, lambda: jax.block_until_ready([call(arguments) for _ in range(RUNS)]))
    found = [kernel for kernel in found if "Memcpy" not in kernel.name and "Memset" not in kernel.name]
    calls = RUNS * repeats
    return 1e3 * sum(kernel.milliseconds for kernel in found) / calls, round(sum(k.calls for k in found) / calls)


def beside(own: Callable[..., Any], plain: Callable[..., Any], *arguments: Any, moved: float) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, run in (("", own), ("xla_", plain)):
        microseconds, count = device_time(run, *arguments)
        out |= {f"{name}us": microseconds, f"{name}kernels": count}
    return out | {"roof_percent": 1e8 * moved / BANDWIDTH / out["us"]}


def pair(tokens: int, parts: int, quantised: bool, per: int | None = None) -> dict[str, Any]:
    """A product and a residual to the sum and its norm."""
    product = product_of(tokens, D, BF16, 0 if quantised else parts, quantised)
    residual, weight = numbers(4, tokens, D), jnp.ones(D, F32)
    kernel = cuda.norm_kernel(product, eps=EPS, residual=True, quantised=quantised, per=per)
    moved = tokens * D * (2 + 2 + (1 if quantised else 2) + (4 * parts or 2))
    return beside(kernel, partial(_residual_norm, quantised=quantised), product, residual, weight, moved=moved)


def norm_alone(tokens: int) -> dict[str, Any]:
    x, weight = numbers(4, tokens, D), jnp.ones(D, F32)
    kernel = cuda.norm_kernel(Product.of(x), eps=EPS, residual=False, quantised=False)

    def own(x: jax.Array, weight: jax.Array) -> Any:
        return kernel(Product.of(x), None, weight)[1]

    return beside(own, lambda x, weight: rms_norm(x, (weight, EPS)), x, weight, moved=4 * tokens * D)


def gate(tokens: int, quantised: bool, per: int | None = None) -> dict[str, Any]:
    """silu(gate) * up."""
    product = product_of(tokens, 2 * F, BF16, 0, quantised)
    kernel = cuda.gate_kernel(product, "silu", quantised=quantised, per=per)
    plain = partial(reference.gate, activation="silu", quantised=quantised)
    return beside(kernel, plain, product, moved=tokens * F * (4 + (1 if quantised else 2)))


def quantisation(tokens: int) -> dict[str, Any]:
    """Of attention's result."""
    x = numbers(4, tokens, D)
    kernel = cuda.norm_kernel(Product.of(x), eps=None, residual=False, quantised=True)
    return beside(lambda x: kernel(Product.of(x))[1], reference.quantize, x, moved=3 * tokens * D)


def rows() -> Iterator[Row]:
    yield Row("rows right", right)
    for tokens in TOKENS:
        parts = {8: 8, 64: 8, 256: 2}.get(tokens, 0)
        what = f" of {parts} sums" if parts else ""
        yield Row(f"residual + norm{what} T={tokens}", partial(pair, tokens, parts, False))
    for tokens in (1, 64):
        yield Row(f"norm T={tokens}", partial(norm_alone, tokens))
    for tokens in (64, 256, 8192):
        yield Row(f"fp8 residual + norm T={tokens}", partial(pair, tokens, 0, True))
        yield Row(f"fp8 silu * up T={tokens}", partial(gate, tokens, True))
        yield Row(f"fp8 quantisation T={tokens}", partial(quantisation, tokens))
    for tokens in (8, 64, 256, 8192):
        yield Row(f"silu * up T={tokens}", partial(gate, tokens, False))
    for per in (1, 4):  # units of a thread, beside the 2 of the rows before
        yield Row(f"residual + norm T=8192, {per} units", partial(pair, 8192, 0, False, per))
        yield Row(f"fp8 residual + norm T=8192, {per} units", partial(pair, 8192, 0, True, per))
    yield Row("fp8 silu * up T=8192, 2 units", partial(gate, 8192, True, 2))
