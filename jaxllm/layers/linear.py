"""Matrix products with weights kept as checkpoints keep them, `[out, in]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jaxllm.kernels.linear import api
from jaxllm.kernels.linear.parts import parts_of
from jaxllm.kernels.linear.product import Activations, Product, QuantizedTokens
from jaxllm.kernels.linear.wide_cuda import rows_for
from jaxllm.kernels.rows import api as rows
from jaxllm.layers.quantize import Declared, param
from jaxllm.layers.stream import Stream, Unadded, Unmultiplied
from jaxllm.parallel.collectives import Axes, gather_rows, ranks, sum_later, sum_partial

if TYPE_CHECKING:
    from jaxllm.layers.norm import RMSNorm


class ColumnLinear(nnx.Module):
    """Output features split over ranks: no communication, but for rows that are."""

    def __init__(self, weight: Declared, bias: Declared | None = None):
        self.weight = param(weight)
        assert not isinstance(bias, dict)
        self.bias = None if bias is None else param(bias)

    def __call__(self, x_TD: Activations, norm: RMSNorm | None = None, tokens: Axes = ()) -> jax.Array:
        """The product with x, which `norm` norms first.

        tokens: the ranks whose rows are brought together for the product.
        """
        x_TD, around = self._around(x_TD, norm, tokens)
        return api.linear(x_TD, self.weight[...], **around)

    def product(self, x_TD: Activations, norm: RMSNorm | None, tokens: Axes, *, in_parts: bool) -> Product:
        """`__call__`, for a consumer that finishes the product. in_parts: of which it may get sums over parts."""
        x_TD, around = self._around(x_TD, norm, tokens)
        weight = self.weight[...]
        try:
            return Product.of(api.fused(x_TD, weight, **around))
        except NotImplementedError:
            pass
        whole = not in_parts or self.bias is not None
        parts = 1 if whole else parts_of(x_TD.shape[0], weight.shape[0], x_TD.shape[1])
        return api.product(x_TD, weight, **around, parts=parts)

    def gated(
        self,
        x_TD: Activations,
        activation: str,
        norm: RMSNorm | None,
        tokens: Axes,
        *,
        quantised: bool,
    ) -> Activations:
        """act(first half) * second half of the product, see `__call__`. quantised: it may be e4m3."""
        x_TD, around = self._around(x_TD, norm, tokens)
        return api.gated(x_TD, self.weight[...], activation, **around, quantised=quantised)

    def _around(self, x: Activations, norm: RMSNorm | None, tokens: Axes) -> tuple[Activations, dict[str, Any]]:
        """x with the rows of all ranks, and what is around its product."""
        if ranks(tokens) > 1:
            assert isinstance(x, jax.Array)
            x, norm = gather_rows(x if norm is None else norm(x), tokens), None
        bias_F = None if self.bias is None else self.bias[...]
        return x, {"norm": None if norm is None else (norm.weight[...], norm.eps), "bias_F": bias_F}

    def multiplies_e4m3(self, x_TD: jax.ShapeDtypeStruct, tokens: Axes = ()) -> bool:
        """Whether the product takes e4m3 in place of such activations."""
        return ranks(tokens) == 1 and api.multiplies_e4m3(x_TD, self.weight[...])

    def takes_scaled(self, x_TD: jax.ShapeDtypeStruct, activation: str | None = None, tokens: Axes = ()) -> bool:
        """Whether the product of such activations had better get them as `ScaledTokens`."""
        if ranks(tokens) > 1 or self.bias is not None:
            return False
        return api.scales(x_TD, self.weight[...], activation)

    def blocks(self, x_TD: jax.ShapeDtypeStruct, activation: str, tokens: Axes = ()) -> int:
        """Rows of the `BlockedTokens` that `gated` had better get such activations as; 0: as they are."""
        if ranks(tokens) > 1 or self.bias is not None or not api.takes_blocks(x_TD, self.weight[...], activation):
            return 0
        return rows_for(x_TD.shape[0])


class RowLinear(nnx.Module):
    """Input features split over `axes`: partial sums are added up by one all-reduce."""

    def __init__(self, weight: Declared, bias: Declared | None = None, *, axes: Axes):
        self.weight = param(weight)
        assert not isinstance(bias, dict)
        self.bias = None if bias is None else param(bias)
        self.axes = axes

    def partial(self, x_TD: Activations) -> jax.Array:
        """This rank's part of the sum, without the bias."""
        return api.linear(x_TD, self.weight[...])

    def multiplies_e4m3(self, tokens: int, dtype: jax.typing.DTypeLike) -> bool:
        """Whether the product takes e4m3 in place of activations of so many tokens in this dtype."""
        weight = self.weight[...]
        return api.multiplies_e4m3(jax.ShapeDtypeStruct((tokens, weight.shape[-1]), dtype), weight)

    def __call__(self, x_TD: Activations, tokens: Axes = (), *, residual: jax.Array | None = None) -> Stream:
        """The product with x, added to the residual; then the last sum may be left to `settle`.

        tokens: where the rows are those of several ranks, and each wants its own back, it is a reduce-scatter.
        """
        bias = None if self.bias is None else self.bias[...]
        if ranks((*self.axes, *tokens)) == 1:
            if residual is None:
                return api.linear(x_TD, self.weight[...], bias_F=bias)
            return self._add(x_TD, bias, residual)
        if bias is None:
            if residual is not None:
                return sum_later(self._unfinished(x_TD), self.axes, tokens, residual)
            return sum_partial(self.partial(x_TD), self.axes, tokens)
        y = sum_partial(self.partial(x_TD), self.axes, tokens) + bias
        return y if residual is None else residual + y

    def _unfinished(self, x_TD: Activations) -> jax.Array | Product:
        """`partial`, with scales of e4m3 still to be multiplied with."""
        weight = self.weight[...]
        try:
            return api.fused(x_TD, weight)
        except NotImplementedError:
            made = api.product(x_TD, weight)
        return made.finish() if made.token_scale is None else made

    def scales(self, x_TD: jax.Array) -> bool:
        """Whether the product also makes what the norm after it needs."""
        return self.bias is None and api.scales(x_TD, self.weight[...], None)

    def _add(self, x_TD: Activations, bias_D: jax.Array | None, residual_TD: jax.Array) -> Stream:
        """The residual plus the product: by the product's kernel, or that of the norm that comes next, or XLA."""
        weight = self.weight[...]
        if isinstance(x_TD, jax.Array) and isinstance(weight, jax.Array) and self.scales(x_TD):
            return Unmultiplied(x_TD, weight, residual_TD)
        try:
            return api.fused(x_TD, weight, bias_F=bias_D, residual=residual_TD)
        except NotImplementedError:
            pass
        like = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
        quantised = isinstance(x_TD, QuantizedTokens) or api.multiplies_e4m3(like, weight)
        if not rows.adds(residual_TD, quantised=quantised):
            return api.linear(x_TD, weight, bias_F=bias_D, residual=residual_TD)
        parts = 1 if bias_D is not None else parts_of(residual_TD.shape[0], residual_TD.shape[1], x_TD.shape[1])
        return Unadded(api.product(x_TD, weight, bias_F=bias_D, parts=parts), residual_TD)
