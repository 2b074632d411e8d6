"""The residual stream between layers: its last sum may wait for the norm that comes next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from jaxllm.kernels.linear import api as linear
from jaxllm.kernels.linear.product import Activations, Product
from jaxllm.kernels.linear.reference import Norm
from jaxllm.kernels.rows import api as rows
from jaxllm.parallel import collectives
from jaxllm.parallel.collectives import Unsummed


@partial(jax.tree_util.register_dataclass, data_fields=["product", "residual_TD"], meta_fields=[])
@dataclass(frozen=True)
class Unadded:
    """The residual plus a product, which `settle` adds."""

    product: Product
    residual_TD: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["y_TF", "weight_DF", "residual_TD"], meta_fields=[])
@dataclass(frozen=True)
class Unmultiplied:
    """The residual plus y @ weight.T, which `settle` makes together with what the next norm needs."""

    y_TF: jax.Array
    weight_DF: jax.Array
    residual_TD: jax.Array


Stream = jax.Array | Unsummed | Unadded | Unmultiplied
"""x_TD, or what it will be the sum of: over ranks, or of a product and the residual."""


def like(x: Stream) -> jax.ShapeDtypeStruct:
    """Shape and dtype of x_TD."""
    x_TD = x if isinstance(x, jax.Array) else x.residual_TD
    return jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)


def settle(
    x: Stream, norm: Norm | None = None, *, quantised: bool = False, blocked: int = 0, scaled: bool = False
) -> tuple[jax.Array, Activations | None]:
    """The stream x_TD, summed, and what a norm (weight and epsilon) makes of it where that is to be had with the sum.

    quantised: the second may be e4m3. blocked: it may be `BlockedTokens` of so many rows (0: not). scaled: it may be
    `ScaledTokens`.
    """
    if isinstance(x, Unmultiplied):
        if norm is not None and scaled:
            return linear.add_scaled(x.y_TF, x.weight_DF, x.residual_TD, norm, blocked)
        return linear.linear(x.y_TF, x.weight_DF, residual=x.residual_TD), None
    if not isinstance(x, Unadded):
        return collectives.settle(x, norm, quantised=quantised)
    if norm is not None:
        return rows.residual_norm(x.product, x.residual_TD, norm, quantised=quantised, blocked=blocked)
    return x.residual_TD + x.product.finish(), None
