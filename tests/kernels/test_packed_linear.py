"""Products with weights that stay quantised, against the same weights expanded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.linear import api, cpu, packed
from jaxllm.kernels.linear.blocks import BLOCK, Blocks, Packing, pack

pytestmark = pytest.mark.quick


def weight(packing: Packing, F: int, D: int) -> tuple[jax.Array, np.ndarray]:
    """A packed matrix, and what it stands for in float32."""
    rng = np.random.default_rng(F + D)
    q = rng.integers(0, 1 << packing.value, (F, D), np.uint8)
    scale, low = rng.uniform(-0.1, 0.1, (2, F, D // BLOCK)).astype(np.float16)
    wide = lambda x: np.repeat(x.astype(np.float32), BLOCK, axis=1)  # noqa: E731
    if packing is Packing.Q8:
        return jnp.asarray(pack(packing, Blocks(q, scale))), wide(scale) * (q.astype(np.float32) - 128)
    return jnp.asarray(pack(packing, Blocks(q, scale, low))), wide(scale) * q + wide(low)


@pytest.fixture(autouse=True)
def needs_the_kernel() -> None:
    if not packed.available():
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize(("F", "D"), [(960, 576), (16, 32), (48, 1536)])
def test_equals_expanded_weights(packing: Packing, F: int, D: int) -> None:
    w, full = weight(packing, F, D)
    assert api.num_rows(w) == F and w.nbytes == F * D // BLOCK * {4: 20, 8: 34}[packing.value]
    for T in (1, 2, 3, 4, 5, 12, 16, 17, 24, 33, 130):
        x = np.random.default_rng(T).standard_normal((T, D), np.float32)
        y = np.asarray(api.matmul(jnp.asarray(x), w))
        exact = x.astype(np.float64) @ full.T.astype(np.float64)
        np.testing.assert_allclose(y, exact, atol=1e-5 * np.abs(full).max() * D)
        if T <= cpu.MAX_TOKENS:  # the same sums in the same order as of the expanded weights
            np.testing.assert_array_equal(y, cpu.matmul(jnp.asarray(x), jnp.asarray(full)))


def test_a_token_does_not_depend_on_the_batch() -> None:
    w, _ = weight(Packing.Q4, 96, 320)
    x = np.random.default_rng(0).standard_normal((90, 320), np.float32)
    whole = np.asarray(api.matmul(jnp.asarray(x), w))
    for T in (1, 2, 3, 7, 16, 40):
        np.testing.assert_array_equal(api.matmul(jnp.asarray(x[50 : 50 + T]), w), whole[50 : 50 + T])


@pytest.mark.parametrize("packing", Packing)
def test_rows(packing: Packing) -> None:
    w, full = weight(packing, 64, 96)
    ids = jnp.asarray([0, 63, 17, 17, 16])
    np.testing.assert_array_equal(jax.jit(api.take_rows)(w, ids), full[np.asarray(ids)])


def test_small_scales_are_kept() -> None:
    q = np.full((16, BLOCK), 3, np.uint8)
    scale = np.full((16, 1), 6e-8, np.float16)  # the smallest half there is
    w = jnp.asarray(pack(Packing.Q4, Blocks(q, scale, scale)))
    y = np.asarray(api.matmul(jnp.ones((1, BLOCK), jnp.float32), w))
    np.testing.assert_allclose(y, BLOCK * 4 * np.float64(scale[0, 0]), rtol=1e-6)


def test_other_dtypes_are_refused() -> None:
    w, _ = weight(Packing.Q4, 16, 32)
    with pytest.raises(NotImplementedError, match="float32"):
        packed.matmul(jnp.ones((1, 32), jnp.bfloat16), w)
