"""Parameters of modules that are kept quantised."""

from __future__ import annotations

from types import EllipsisType
from typing import overload

import jax.numpy as jnp
from flax import nnx

from jaxllm.formats import Format
from jaxllm.kernels.linear.quantized import QuantizedWeight
from jaxllm.parallel.params import ParamSpec

Declared = ParamSpec | dict[str, ParamSpec]
"""A parameter, or the parts of a quantised one by name."""


class QuantizedParam(nnx.Module):
    """In place of an `nnx.Param`: the arrays of a quantised matrix, or of a stack of them."""

    def __init__(self, specs: dict[str, ParamSpec]):
        part = specs["values"].part
        assert part is not None
        self.format: Format = part.format
        self.values = _array(specs["values"])
        self.scale = _array(specs["scale"])
        self.zero = _array(specs["zero"]) if "zero" in specs else None

    def __getitem__(self, index: EllipsisType) -> QuantizedWeight:
        """The weight, as `kernels.linear.api` and `kernels.grouped_matmul.api` take it."""
        zero = None if self.zero is None else self.zero[...]
        return QuantizedWeight(self.values[...], self.scale[...], zero, self.format)


def _array(spec: ParamSpec) -> nnx.Param:
    return nnx.Param(jnp.zeros(spec.shape, spec.dtype), spec=spec)


@overload
def param(spec: ParamSpec) -> nnx.Param: ...
@overload
def param(spec: dict[str, ParamSpec]) -> QuantizedParam: ...
@overload
def param(spec: Declared) -> nnx.Param | QuantizedParam: ...
def param(spec: Declared) -> nnx.Param | QuantizedParam:
    """A parameter of the shape that is declared.

    Modules are built under `nnx.eval_shape`: no memory is used.
    """
    return QuantizedParam(spec) if isinstance(spec, dict) else _array(spec)
