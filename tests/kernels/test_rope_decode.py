"""Decode attention that rotates and writes what is new, run on the emulator, against the two steps in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.paged_attention import decode_cuda, rope_cuda
from tests.kernels.emulator.launches import Launches

BF16 = np.dtype(ml_dtypes.bfloat16)


def emulate(given: Any, width: int, seed: int, ctas: int, monkeypatch: pytest.MonkeyPatch, **tuning: int) -> Any:
    """What `rope_cuda.implementation` launches, on a GPU with room for `ctas` blocks."""
    configure = decode_cuda.configure

    def configured(*shapes: Any, **options: Any) -> decode_cuda.Launch:
        launch = configure(*shapes, **options, **{"warps": 4, **tuning})
        macros = {**launch.macros, "CTAS": ctas}
        return decode_cuda.Launch(macros, (shapes[0][0], -(-ctas // shapes[0][0])), launch.threads, launch.shared)

    monkeypatch.setattr(decode_cuda, "configure", configured)
    Launches(monkeypatch, seed)
    H = given[3].shape[-1]
    return rope_cuda.implementation(given[0].shape, given[3], width, H**-0.5, None)(*given)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("sizes", "positions", "tuning"),
    [
        # K, G, H, O, W
        ((2, 4, 128, 32, 5), [0, 63, -1, 79, 64], {"ctas": 7}),
        ((2, 4, 128, 32, 9), [287, 128, 15, 240], {"ctas": 7, "whole": 1, "min_share": 1}),
        pytest.param((2, 3, 64, 16, 12), [100, 47, 16, 191, 80], {"ctas": 3}, marks=pytest.mark.slow),
        pytest.param((1, 2, 256, 64, 3), [100, 191, 31], {"ctas": 4, "whole": 1}, marks=pytest.mark.slow),
        pytest.param((1, 8, 96, 32, 6), [191, 17, 96], {"ctas": 5}, marks=pytest.mark.slow),
    ],
)
def test_equals_rotation_and_then_attention(sizes, positions, tuning, seed, monkeypatch) -> None:
    K, G, H, O, W = sizes
    given = list(rope_cuda.example(len(positions), K, G, H, O, W, positions))
    pool = np.array(given[3])
    for r, at in enumerate(positions):  # what nobody sees, and where what is new comes to, may be anything
        if at >= 0:
            pool[given[6][r, at // O], :, :, at % O :] = np.nan
    pool[0] = np.nan
    given[3] = pool
    out, written = emulate(tuple(given), W, seed, monkeypatch=monkeypatch, **tuning)
    clean = [jnp.asarray(np.nan_to_num(a.astype(np.float32)) if a is pool else a) for a in given]
    wanted, pages = rope_cuda.composed(*clean, scale=H**-0.5, softcap=None)
    real = np.asarray(positions) >= 0
    np.testing.assert_allclose(out.astype(np.float32)[real], np.asarray(wanted, np.float32)[real], atol=1e-2, rtol=1e-2)
    assert not out[~real].astype(np.float32).any()
    found, expected = written.astype(np.float32), np.asarray(pages, np.float32)
    changed = np.zeros(found.shape, bool)
    for r, at in enumerate(positions):
        if at >= 0:
            changed[given[6][r, at // O], :, :, at % O] = True
    np.testing.assert_allclose(found[changed], expected[changed], rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(found[~changed], pool.astype(np.float32)[~changed])


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table; without a GPU the same program says the same as the two steps."""
    given = rope_cuda.example(3, 2, 2, 64, 32, 2, [40, -1, 3])
    options: dict[str, Any] = {"scale": 0.1, "softcap": None}
    with pytest.raises(NotImplementedError, match="no GPU"):
        rope_cuda.attend(Product.of(given[0]), *given[1:], **options)
    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(call, "compile_or_refuse", lambda kernel, source, macros: "")
    with pytest.raises(NotImplementedError, match="two kernels are for 3 rows"):
        rope_cuda.attend(Product.of(given[0]), *given[1:], **options)
    monkeypatch.setattr(rope_cuda, "ROWS", ((2, 3),))
    found = rope_cuda.attend(Product.of(given[0]), *map(jnp.asarray, given[1:]), **options)
    for a, b in zip(found, rope_cuda.composed(*map(jnp.asarray, given), **options), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    with pytest.raises(NotImplementedError, match="heads in float32"):
        rope_cuda.attend(Product.of(given[0].astype(jnp.float32)), *given[1:], **options)
    eight = jax.ShapeDtypeStruct(given[3].shape, jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="pages in float8"):
        rope_cuda.implementation(given[0].shape, eight, 2, 0.1, None)
