"""Quantised weights as arguments of products, how they are made from numbers, and their products by XLA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats import Format
from jaxllm.kernels.linear.product import Product, QuantizedTokens

E4M3_MAX = 448.0


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale", "zero"], meta_fields=["format"])
@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [..., F, D] whose numbers are (value - zero) * scale; see `Format`.

    values: [..., F, D] in e4m3 or int8, or uint8 [..., F, D / 2]. scale: float32 [..., F, G], one for each group of
    inputs. zero: int8 [..., F, G], or None.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        *rows, columns = self.values.shape
        return (*rows, columns * self.format.per_byte)

    @property
    def dtype(self) -> jnp.dtype:
        """Of its values; no other weight is in one of these."""
        return jnp.dtype(jnp.int4) if self.format.kind == "int4" else self.values.dtype

    @property
    def size(self) -> int:
        return self.values.size * self.format.per_byte

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One matrix of a stack."""
        zero = None if self.zero is None else self.zero[index]
        return QuantizedWeight(self.values[index], self.scale[index], zero, self.format)


Weight = jax.Array | QuantizedWeight


def unpack(weight: QuantizedWeight) -> jax.Array:
    """Its values, one an element."""
    if weight.format.kind != "int4":
        return weight.values
    return lax.bitcast_convert_type(weight.values, jnp.int4).reshape(weight.shape)


def dequantize(weight: QuantizedWeight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix itself; computed in float32 and rounded once."""
    D, group = weight.shape[-1], weight.format.group

    def of_inputs(grouped: jax.Array) -> jax.Array:
        return grouped if group is None else jnp.repeat(grouped, group, axis=-1)[..., :D]

    numbers = unpack(weight).astype(jnp.float32)
    if weight.zero is not None:
        numbers = numbers - of_inputs(weight.zero.astype(jnp.float32))
    return (numbers * of_inputs(weight.scale)).astype(dtype)


def quantize(wide: jax.Array, format: Format) -> QuantizedWeight:
    """The matrix [..., F, D] rounded to the nearest; the largest number of each group keeps its size."""
    values, scale = round_groups(wide, format)
    return QuantizedWeight(pack(values, format), scale, None, format)


def round_groups(wide: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """Values of a matrix, one an element, and its scales."""
    D, group = wide.shape[-1], format.group or wide.shape[-1]
    groups = format.groups(D)
    numbers = jnp.pad(wide.astype(jnp.float32), [(0, 0)] * (wide.ndim - 1) + [(0, groups * group - D)])
    numbers = numbers.reshape(*wide.shape[:-1], groups, group)
    # By products, not quotients, which XLA turns into products where it likes to.
    largest = jnp.abs(numbers).max(axis=-1)
    scale = jnp.where(largest > 0, largest * np.float32(1 / format.limit), 1.0)
    inverse = jnp.where(largest > 0, format.limit / largest, 1.0)
    return nearest((numbers * inverse[..., None]).reshape(*wide.shape[:-1], -1)[..., :D], format), scale


def nearest(numbers: jax.Array, format: Format) -> jax.Array:
    """The values of a format that are nearest to numbers, one an element."""
    numbers = jnp.clip(numbers, -format.limit, format.limit)
    if format.kind == "fp8":
        return round_e4m3(numbers).astype(jnp.float8_e4m3fn)
    return jnp.round(numbers).astype(jnp.int8)


def pack(values: jax.Array, format: Format) -> jax.Array:
    """Values as they are kept: of int4 two in a byte."""
    if format.kind != "int4":
        return values
    low, high = values[..., 0::2].astype(jnp.uint8), values[..., 1::2].astype(jnp.uint8)
    return (low & 15) | (high << 4)


def round_e4m3(numbers: jax.Array) -> jax.Array:
    """float32 numbers that e4m3 has. XLA:CPU's own conversion goes by way of float16, and so rounds twice."""
    tiny = jnp.round(numbers * 2**9) * 2**-9  # below 2^-6 all steps are the same
    return jnp.where(jnp.abs(numbers) < 2.0**-6, tiny, lax.reduce_precision(numbers, exponent_bits=8, mantissa_bits=3))


def quantize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations in e4m3 and the float32 scale [..., 1] of each token."""
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest * np.float32(1 / E4M3_MAX), 1.0)
    inverse = jnp.where(largest > 0, E4M3_MAX / largest, 1.0)
    return jnp.clip(wide * inverse, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scale


def multiplies_e4m3(x: jax.Array | jax.ShapeDtypeStruct, weight: QuantizedWeight) -> bool:
    """Whether the product quantises activations: of however many tokens, so that none depends on how many there are."""
    return x.dtype == jnp.bfloat16 and weight.format == Format("fp8") and weight.zero is None


def product(x: QuantizedTokens, weight: QuantizedWeight) -> Product:
    """The product of e4m3 activations and weights, whose scales are still to be multiplied with."""
    # Of one row XLA would make a product with a vector, for which it widens the whole weight in memory.
    values = jnp.pad(x.values, [(0, 1), (0, 0)]) if x.shape[0] == 1 else x.values
    y = lax.dot_general(values, weight.values, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    return Product(y[: x.shape[0]], x.scale, weight.scale[:, 0], x.dtype)


def matmul(x: jax.Array, weight: QuantizedWeight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """See `api.matmul`.

    In bfloat16, activations are quantised to e4m3, each token by its largest, and multiplied with e4m3 weights as they
    are. Otherwise the values of the weight are widened in the product.
    """
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    if weight.format.group is not None or weight.zero is not None:
        return lax.dot_general(x, dequantize(weight, x.dtype), contract, preferred_element_type=dtype)
    if multiplies_e4m3(x, weight):
        values, scale = quantize_tokens(x.reshape(-1, x.shape[-1]))
        return product(QuantizedTokens(values, scale, jnp.dtype(dtype)), weight).finish().reshape(*x.shape[:-1], -1)
    y = lax.dot_general(x, unpack(weight).astype(x.dtype), contract, preferred_element_type=jnp.float32)
    return (y * weight.scale[:, 0]).astype(dtype)
