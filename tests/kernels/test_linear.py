"""Every implementation of the product with weights against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.linear import api, cpu, reference

pytestmark = pytest.mark.quick

IMPLEMENTATIONS = {"reference": reference.matmul, "cpu": cpu.matmul, "api": api.matmul}


def arrays(T: int, D: int, F: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(T)
    return rng.standard_normal((T, D), np.float32), rng.standard_normal((F, D), np.float32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("D", "F"), [(576, 960), (1536, 100), (37, 49), (5, 1), (1, 130)])
@pytest.mark.parametrize("T", [1, 3, 16, 17, 33, 64, 128])
def test_equals_float64(T: int, D: int, F: int, name: str) -> None:
    x, weight = arrays(T, D, F)
    try:
        y = jax.jit(IMPLEMENTATIONS[name])(x, weight)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64), atol=3e-4)


def test_native_result_does_not_depend_on_the_batch() -> None:
    x, weight = arrays(128, 300, 130)
    call = jax.jit(cpu.matmul)
    try:
        whole = np.asarray(call(x, weight))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    for T in (1, 2, 16, 20, 40):
        np.testing.assert_array_equal(call(x[80 : 80 + T], weight), whole[80 : 80 + T])


def test_leading_axes_and_other_dtypes() -> None:
    x, weight = arrays(6, 32, 20)
    wanted = api.matmul(x, weight)
    np.testing.assert_array_equal(api.matmul(x.reshape(2, 3, 32), weight), wanted.reshape(2, 3, 20))
    half = api.matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wanted, atol=0.2)


def test_a_program_lowered_for_a_gpu_has_no_native_kernel() -> None:
    x, weight = arrays(4, 64, 48)
    text = jax.jit(api.matmul).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert "jaxllm_linear" not in text and "dot_general" in text
