"""What layers with experts do for one token, step by step, and operands to try it with."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.draws import Draws, random_place
from jaxllm.kernels.grouped_matmul import reference as experts
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.kernels.paged_attention import reference as attention
from jaxllm.kernels.rope_write import reference as rope
from jaxllm.kernels.router.cuda import Choice

HEAD_DIM = 128


class Token(NamedTuple):
    """What all layers read.

    x [1, D] is the residual stream; cos and sin float32 [1, 1, H / 2]; page and slot int32 [1], of the token; pages_RW
    int32 [1, W]; position int32 [1], -1 for no token.
    """

    x: jax.Array
    cos: jax.Array
    sin: jax.Array
    page: jax.Array
    slot: jax.Array
    pages_RW: jax.Array
    position: jax.Array


class Layer(NamedTuple):
    """What one layer reads.

    norm float32 [D]; qkv [(N + 2 * K) * H, D]; q_norm and k_norm float32 [H], or None; output [D, N * H]; mlp_norm
    float32 [D]; router [E, D]; bias of the choice, float32 [E], or None; gate_up [E, 2 * F, D]; down [E, D, F];
    kv_PYKOH the pool, which is written in place.
    """

    norm: jax.Array
    qkv: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    output: jax.Array
    mlp_norm: jax.Array
    router: jax.Array
    bias: jax.Array | None
    gate_up: jax.Array
    down: jax.Array
    kv_PYKOH: jax.Array


class Operands(NamedTuple):
    """What layers that follow one another read."""

    token: Token
    layers: tuple[Layer, ...]


def plain(operands: Operands, choice: Choice, *, activation: str, scale: float) -> tuple[jax.Array, list[jax.Array]]:
    """The residual stream after the layers, float32 [1, D], and the written pools.

    Step by step in float32; what goes into a product is rounded to the dtype of x. scale: on q.k.
    """
    token, layers = operands
    dtype, x, pools = token.x.dtype, token.x, []

    def wide(array: jax.Array) -> jax.Array:
        return array.astype(jnp.float32)

    for layer in layers:
        x = x.astype(dtype)
        y = wide(rms_norm(x, (layer.norm, choice.eps)))
        qkv = Product.of((y @ wide(layer.qkv).T).astype(dtype))
        norms = (layer.q_norm, layer.k_norm)
        q_TNH, kv = rope.rope_write(
            qkv, token.cos, token.sin, layer.kv_PYKOH, token.page, token.slot, *norms, eps=choice.eps
        )
        found, _ = attention.attend(wide(q_TNH[None]), wide(kv), token.pages_RW, token.position[None], scale=scale)
        attended = found.reshape(1, -1).astype(dtype)
        x = (wide(x) + wide(attended) @ wide(layer.output).T).astype(dtype)
        y = wide(rms_norm(x, (layer.mlp_norm, choice.eps)))
        logits_TE = y @ wide(layer.router).T
        score_TE = jax.nn.sigmoid(logits_TE) if choice.sigmoid else jax.nn.softmax(logits_TE)
        _, chosen_TX = jax.lax.top_k(score_TE if layer.bias is None else score_TE + layer.bias, choice.chosen)
        weights_TX = jnp.take_along_axis(score_TE, chosen_TX, axis=1)
        weights_TX = weights_TX / weights_TX.sum(axis=1, keepdims=True) if choice.normalise else weights_TX
        arguments = y, chosen_TX, weights_TX * choice.scale, wide(layer.gate_up), wide(layer.down)
        x = wide(x) + experts.experts(*arguments, activation=activation, of=layer.router.shape[0])
        pools.append(kv)
    return x, pools


def exact(operands: Operands, choice: Choice, *, activation: str, scale: float) -> tuple[jax.Array, list[jax.Array]]:
    """As `plain`, and nothing is rounded."""
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, operands)
    return plain(wide, choice, activation=activation, scale=scale)


_exact = jax.jit(exact, static_argnames=("choice", "activation", "scale"))


def random_operands(
    D: int,
    heads: tuple[int, int],
    E: int,
    F: int,
    tokens: int,
    *,
    layers: int = 1,
    page: int = 32,
    norms: bool = True,
    bias: bool = False,
    seed: int = 0,
) -> Operands:
    """Operands with `tokens` tokens in the context, this one too. heads: of queries, and of keys and values.

    Of a size that keeps what is added near what is there.
    """
    (N, K), H = heads, HEAD_DIM
    first, second, *keys = jax.random.split(jax.random.key(seed), 2 + layers)
    place = random_place(first, tokens, H=H, page=page, seed=seed)
    W = place[4].shape[1]

    @jax.jit
    def make(key: jax.Array) -> Layer:
        draws = Draws(key, 12)
        return Layer(
            draws.norm(D),
            draws.bf16((N + 2 * K) * H, D, scale=D**-0.5),
            draws.norm(H) if norms else None,
            draws.norm(H) if norms else None,
            draws.bf16(D, N * H, scale=(N * H) ** -0.5),
            draws.norm(D),
            draws.bf16(E, D, scale=4 * D**-0.5),
            draws.uniform(E) if bias else None,
            draws.bf16(E, 2 * F, D, scale=D**-0.5),
            draws.bf16(E, D, F, scale=2 * F**-0.5),
            draws.bf16(W + 3, 2, K, page, H),
        )

    token = Token(jax.random.normal(second, (1, D), jnp.bfloat16), *place)
    return Operands(token, tuple(make(key) for key in keys))


def shortened(operands: Operands, tokens: int) -> Operands:
    """The same with fewer tokens in the context."""
    token, page = operands.token, operands.layers[0].kv_PYKOH.shape[3]
    place = {"page": token.pages_RW[0, (tokens - 1) // page], "slot": (tokens - 1) % page, "position": tokens - 1}
    arrays = {name: jnp.asarray(at, jnp.int32)[None] for name, at in place.items()}
    return Operands(token._replace(**arrays), operands.layers)


def difference(operands: Operands, found: tuple[jax.Array, list[jax.Array]], choice: Choice, scale: float) -> float:
    """Between a result and `exact`: of the stream, as a share of what the layers add, or of a pool."""
    wanted = _exact(operands, choice, activation="silu", scale=scale)
    a, b, start = (np.asarray(array, np.float32) for array in (found[0], wanted[0], operands.token.x))
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b - start))]
    for pool, wanted_pool in zip(found[1], wanted[1], strict=True):
        one, other = (np.asarray(array, np.float32) for array in (pool, wanted_pool))
        errors.append(float(np.abs(one - other).max() / np.abs(other).max()))
    return max(errors)
