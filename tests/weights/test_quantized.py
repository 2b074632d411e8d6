"""Weights rounded to fewer bits while they are loaded: their numbers, on every layout, and in a dummy model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import api, cuda, reference
from jaxllm.kernels.linear.quantized import QuantizedWeight, dequantize, matmul, quantize, round_e4m3
from jaxllm.mapping import Mapping
from jaxllm.models.checkpoint import checkpoint_shapes
from jaxllm.models.decoder import param_specs
from jaxllm.models.quantization import ONLINE, Quantization
from jaxllm.models.registry import config_from_hf
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.dummy import dummy_params
from jaxllm.weights.load import load_params
from jaxllm.weights.resolve import resolve_model
from tests.tiny_llm import MODEL

FORMATS = {**ONLINE, "int4": Format("int4", group=16), "int8 in groups": Format("int8", group=32)}
GOLDEN = MODEL.parent


def rounded(wide: np.ndarray, format: Format) -> np.ndarray:
    """Round to nearest, as a definition: in float32, with ml_dtypes' conversions."""
    out = np.zeros(wide.shape, np.float64)
    group = format.group or wide.shape[-1]
    for start in range(0, wide.shape[-1], group):
        part = wide[..., start : start + group].astype(np.float32)
        largest = np.maximum(np.abs(part).max(-1, keepdims=True), np.float32(1e-30))
        scale = largest * np.float32(1 / format.limit)
        numbers = part * (np.float32(format.limit) / largest)
        values = numbers.astype(ml_dtypes.float8_e4m3fn) if format.kind == "fp8" else np.round(numbers)
        out[..., start : start + group] = values.astype(np.float64) * scale
    return out


def whole(path: str, params: dict[str, jax.Array], specs: dict[str, Any]) -> jax.Array:
    """A parameter as numbers, whether it is quantised or not."""
    if path in params:
        return params[path].astype(jnp.float32)
    zero = params.get(f"{path}.zero")
    values, scale = jnp.asarray(params[f"{path}.values"]), params[f"{path}.scale"]
    return dequantize(QuantizedWeight(values, scale, zero, specs[f"{path}.values"].part.format), jnp.float32)


def loaded(model: str, format: Format | None, tp: int = 1, **sizes: int) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    files = resolve_model(GOLDEN / model)
    assert files.config is not None
    cfg = config_from_hf(files.config)
    cfg = replace(cfg, quantization=None if format is None else Quantization(format, head=True))
    mapping = Mapping(tp=tp, **sizes)
    specs = param_specs(cfg, Layout(mapping, np.dtype(np.float32)))
    source = files.open()
    try:
        return load_params(specs, checkpoint_shapes(cfg), source, make_mesh(mapping)), specs
    finally:
        source.close()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_numbers(format: Format) -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((5, 96), np.float32) * np.exp(rng.uniform(-9, 9, (5, 96))).astype(np.float32)
    wide[3] = 0
    found = np.asarray(dequantize(quantize(jnp.asarray(wide), format), jnp.float32))
    np.testing.assert_allclose(found, rounded(wide, format), rtol=1e-6, atol=1e-30)


def test_e4m3_is_rounded_once() -> None:
    numbers = np.linspace(-448, 448, 200_001).astype(np.float32)
    numbers = np.concatenate([numbers, numbers / 1000, np.float32([2.0**-10, 3 * 2.0**-10, 2.0**-6, 0])])
    found = np.asarray(jax.jit(round_e4m3)(numbers))
    np.testing.assert_array_equal(found, numbers.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("tp", [slow(1), 2, slow(3)])
@pytest.mark.parametrize(
    ("model", "format"), [("llama_gqa_tied", "fp8"), ("qwen3", "int4"), ("mixtral", "fp8"), ("llama_mlp_bias", "int8")]
)
def test_every_layout_has_the_same_numbers(model: str, format: str, tp: int) -> None:
    """Those of the definition, wherever rows and columns are cut, heads padded and experts stacked."""
    kept = FORMATS[format]
    wide, wide_specs = loaded(model, None, tp)
    found, specs = loaded(model, kept, tp)
    quantised = {spec.part.whole.shape for spec in specs.values() if spec.part is not None}
    assert quantised
    source = resolve_model(GOLDEN / model).open()
    for path, spec in wide_specs.items():
        numbers = np.asarray(whole(path, found, specs))
        matrix = len(spec.shape) > 1 and "embed" not in path and "router" not in path
        if not matrix:
            np.testing.assert_array_equal(numbers, np.asarray(wide[path]))
            continue
        for one, rows in zip(spec.unstack(), numbers, strict=True) if spec.stacked else [(spec, numbers)]:
            at = 0
            for segment in one.segments:
                here = np.take(rows, range(at, at + segment.size), axis=one.axis)
                at += segment.size
                if segment.name is None:
                    assert not here.any()
                    continue
                tensor = rounded(source.read(segment.name, ()).astype(np.float32), kept)
                wanted = np.take(tensor, range(segment.start, segment.stop), axis=one.axis)
                np.testing.assert_allclose(here, wanted, rtol=1e-6, atol=1e-9, err_msg=path)
    source.close()


def test_small_groups_stay_wide() -> None:
    """Columns that do not end between groups on every device are kept wide, as they would be if they were not."""
    _, specs = loaded("qwen3", ONLINE["int4"], 2)
    down = specs["layers.0.mlp.down.weight"]  # 74 columns on two ranks
    assert down.part is None and down.rounded == ONLINE["int4"]
    assert specs["layers.0.mlp.gate_up.weight.values"].part is not None


@pytest.mark.parametrize("format", ["fp8", pytest.param("int4", marks=pytest.mark.slow)])
def test_dummy(format: str) -> None:
    """A dummy model is the wide one, rounded: as far off as rounding is, and the same on every layout."""
    files = resolve_model(MODEL)
    assert files.config is not None
    cfg = config_from_hf(files.config)
    kept = replace(cfg, quantization=Quantization(FORMATS[format], head=True))
    found = []
    for tp in (1, 3):
        layout, mesh = Layout(Mapping(tp=tp), np.dtype(np.float32)), make_mesh(Mapping(tp=tp))
        wide = dummy_params(param_specs(cfg, layout), mesh, seed=3) if tp == 3 else {}
        specs = param_specs(kept, layout)
        params = dummy_params(specs, mesh, seed=3)
        for path, numbers in wide.items():
            if f"{path}.values" in params:
                limit = float(params[f"{path}.scale"].max()) * FORMATS[format].limit
                step = limit / (14 if format == "fp8" else 7)  # half of the largest distance of values
                assert float(jnp.abs(whole(path, params, specs) - numbers).max()) <= 0.51 * step
            else:
                np.testing.assert_array_equal(params[path], numbers)
        found.append(np.asarray(whole("layers.1.attention.out.weight", params, specs)))
    wide_columns = min(part.shape[1] for part in found)
    np.testing.assert_array_equal(found[0][:, :wide_columns], found[1][:, :wide_columns])


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_products(format: Format) -> None:
    rng = np.random.default_rng(1)
    wide, x = rng.standard_normal((40, 96), np.float32), rng.standard_normal((35, 96), np.float32)
    weight = quantize(jnp.asarray(wide), format)
    wanted = x.astype(np.float64) @ rounded(wide, format).T
    np.testing.assert_allclose(matmul(jnp.asarray(x), weight), wanted, rtol=0, atol=2e-5)
    short = jnp.asarray(x, jnp.bfloat16)
    if format != Format("fp8"):
        np.testing.assert_allclose(matmul(short, weight), wanted, rtol=0, atol=0.15)
        return
    # Activations are rounded, too; and a token's product is the same, however many there are.
    many = np.asarray(matmul(short, weight, jnp.bfloat16), np.float32)
    exact = rounded(np.asarray(short, np.float32), format) @ rounded(wide, format).T
    np.testing.assert_allclose(many, exact, rtol=0.01, atol=0.02)
    for count in (1, 7):
        few = np.asarray(matmul(short[:count], weight, jnp.bfloat16), np.float32)
        np.testing.assert_allclose(few, many[:count], rtol=0.01, atol=0.02)


def test_the_kernel_of_few_tokens_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With values, scales of rows and all that is around the product; elsewhere its parts do the same work."""
    rng = np.random.default_rng(2)
    asked: list[Any] = []

    def implementation(x: Any, values: Any, **options: Any) -> Any:
        asked.append((x.shape, values.dtype, options))
        return lambda x, values, scale, norm, residual: x[:, :0] @ jnp.zeros((0, 20), jnp.bfloat16)

    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(cuda, "implementation", implementation)
    weight = quantize(jnp.asarray(rng.standard_normal((40, 96)), jnp.bfloat16), Format("int8"))
    x, residual = (jnp.asarray(rng.standard_normal((3, width)), jnp.bfloat16) for width in (96, 20))
    around: dict[str, Any] = {"norm": (jnp.ones(96), 1e-5), "activation": "silu", "residual": residual}
    found = api.linear(x, weight, **around)
    wanted = reference.linear(x, dequantize(weight, jnp.float32), **around, matmul=reference.matmul)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0.03, atol=0.1)
    (shape, dtype, options), *_ = asked
    assert shape == (3, 96) and dtype == jnp.int8
    assert options == {"eps": 1e-5, "activation": "silu", "residual": True, "out_dtype": jnp.bfloat16}
