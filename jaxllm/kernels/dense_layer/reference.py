"""What the kernel of whole layers reads, and the same step by step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.draws import Draws, random_place
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.linear.reference import gated, rms_norm
from jaxllm.kernels.paged_attention import reference as attention
from jaxllm.kernels.rope_write import reference as rope


class Layer(NamedTuple):
    """What a layer has; norms and biases may be None where there are none.

    qkv [(N + 2 * K) * H, D], output [D, N * H], gate_up [2 * F, D], down [D, F], all bfloat16; bias bfloat16
    [(N + 2 * K) * H]; norm and mlp_norm float32 [D]; q_norm and k_norm float32 [H]; kv_PYKOH the pool, which is
    written in place.
    """

    qkv: jax.Array
    output: jax.Array
    gate_up: jax.Array
    down: jax.Array
    bias: jax.Array | None
    norm: jax.Array
    mlp_norm: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    kv_PYKOH: jax.Array


class Operands(NamedTuple):
    """What the kernel reads.

    x [1, D] is the residual stream; cos and sin float32 [1, 1, H / 2]; page and slot int32 [1], of the token; pages_RW
    int32 [1, W]; position int32 [1], -1 for no token; layers one after the other, all alike.
    """

    x: jax.Array
    cos: jax.Array
    sin: jax.Array
    page: jax.Array
    slot: jax.Array
    pages_RW: jax.Array
    position: jax.Array
    layers: tuple[Layer, ...]


def plain(operands: Operands, *, activation: str, scale: float, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The same step by step, in float32; what blocks tell one another is rounded as the kernel does."""

    def wide(array: jax.Array) -> jax.Array:
        return array.astype(jnp.float32)

    x, pools, dtype = operands.x, [], operands.x.dtype
    for layer in operands.layers:
        made = wide(rms_norm(x, (layer.norm, eps))) @ wide(layer.qkv).T
        made = made if layer.bias is None else made + wide(layer.bias)
        where = operands.cos, operands.sin, layer.kv_PYKOH, operands.page, operands.slot
        q_TNH, kv = rope.rope_write(Product.of(made.astype(dtype)), *where, layer.q_norm, layer.k_norm, eps=eps)
        found, _ = attention.attend(
            wide(q_TNH)[None], wide(kv), operands.pages_RW, operands.position[None], scale=scale
        )
        attended = wide(found.reshape(1, -1).astype(dtype))
        x = (wide(x) + attended @ wide(layer.output).T).astype(dtype)
        gate, up = jnp.split(wide(rms_norm(x, (layer.mlp_norm, eps))) @ wide(layer.gate_up).T, 2, axis=1)
        hidden = wide(gated(gate, up, activation).astype(dtype))
        x = (wide(x) + hidden @ wide(layer.down).T).astype(dtype)
        pools.append(kv)
    return x, tuple(pools)


def random_operands(
    D: int,
    heads: tuple[int, int],
    F: int,
    tokens: int,
    *,
    layers: int = 1,
    H: int = 128,
    page: int = 32,
    norms: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Operands:
    """Operands of a size that keeps what is added near what is there.

    tokens: in the context, this one too. heads: of queries, and of keys and values.
    """
    N, K = heads
    first, *keys = jax.random.split(jax.random.key(seed), layers + 1)
    place = random_place(first, tokens, H=H, page=page, seed=seed)
    W, rows = place[4].shape[1], (N + 2 * K) * H

    @jax.jit
    def make_layer(key: jax.Array) -> Layer:
        draws = Draws(key, 10)
        return Layer(
            draws.bf16(rows, D, scale=D**-0.5),
            draws.bf16(D, N * H, scale=(N * H) ** -0.5),
            draws.bf16(2 * F, D, scale=D**-0.5),
            draws.bf16(D, F, scale=2 * F**-0.5),
            draws.bf16(rows) if bias else None,
            draws.norm(D),
            draws.norm(D),
            draws.norm(H) if norms else None,
            draws.norm(H) if norms else None,
            draws.bf16(W + 3, 2, K, page, H),
        )

    return Operands(jax.random.normal(first, (1, D), jnp.bfloat16), *place, tuple(map(make_layer, keys)))


def difference(
    operands: Operands, found: tuple[jax.Array, tuple[jax.Array, ...]], *, scale: float, eps: float
) -> float:
    """Between a result and `plain`: of the stream, as a share of what the layers add, or of a pool."""
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda operands: plain(operands, activation="silu", scale=scale, eps=eps))(operands)
    a, b, start = (np.asarray(array, np.float32) for array in (found[0], wanted[0], operands.x))
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b - start))]
    for pair in zip(found[1], wanted[1], strict=True):
        a, b = (np.asarray(array, np.float32) for array in pair)
        errors.append(float(np.abs(a - b).max() / np.abs(b).max()))
    return max(errors) if all(error == error for error in errors) else float("nan")
