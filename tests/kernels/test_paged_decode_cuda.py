"""The CUDA kernels of paged decode attention, run by the emulator, against the reference in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.paged_attention import api, decode_cuda, reference
from tests.kernels.emulator.emulator import Kernels


def emulate(q, kv, pages, positions, first, *, scale, softcap, seed, ctas, **tuning):
    """As `decode_cuda.attend`, on a GPU with room for `ctas` blocks."""
    fp8 = kv.dtype == jnp.float8_e4m3fn
    launch = decode_cuda.configure(
        q.shape, kv.shape, pages.shape[1], fp8=fp8, scale=scale, softcap=softcap, first=first is not None, **tuning
    )
    launch.macros["CTAS"] = ctas
    arguments = [np.asarray(a) for a in (q, kv, pages, positions, positions if first is None else first)]
    return Kernels(rtc.SOURCES / "paged_decode.cu", launch.macros).run(
        "paged_decode",
        [*arguments, np.zeros(ctas, np.int32)],
        decode_cuda.results(launch, q.shape),
        grid=(q.shape[0], -(-ctas // q.shape[0])),
        threads=launch.threads,
        shared=launch.shared,
        aliases={5: 4},
        seed=seed,
    )[:2]


def inputs(R, Q, K, G, H, O, W, dtype, seed=0):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((R, Q, K * G, H)), jnp.bfloat16)
    kv = jnp.asarray(rng.standard_normal((R * W + 1, 2, K, O, H)), dtype)
    pages = (rng.permutation(R * W) + 1).reshape(R, W).astype(np.int32)
    positions = rng.integers(0, W * O, (R, Q)).astype(np.int32)
    positions[0] = W * O - 1
    if R > 2:
        positions[1] = -1
        positions[2] = 0
    if Q > 1:
        positions[0, 1] = -1  # one of a row sees nothing
    for r in range(R):  # what no query sees may be anything, and its pages too
        last = positions[r].max()
        pages[r, last // O + 1 :] = 0
        if last >= 0:
            kv = kv.at[pages[r, last // O], :, :, last % O + 1 :].set(float("nan"))
    kv = kv.at[0].set(float("nan"))
    return q, kv, pages, positions


BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn

CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    # R, Q, K, G, H, O, W, dtype
    "llama": ((5, 1, 2, 4, 128, 32, 10, BF16), {"ctas": 7}),
    "tall_shared": ((3, 1, 2, 4, 128, 32, 25, BF16), {"ctas": 7, "warps": 12, "resident": 1}),
    "one_row": ((1, 1, 2, 4, 128, 32, 20, BF16), {"ctas": 9}),
    "one_cta": ((4, 1, 2, 4, 128, 32, 4, BF16), {"ctas": 1}),
    "shared": ((5, 1, 2, 4, 128, 32, 10, BF16), {"ctas": 7, "whole": 2}),
    "more_shares_than_work": ((3, 1, 1, 4, 128, 32, 9, BF16), {"ctas": 40, "whole": 1, "min_share": 1}),
    "more_ctas_than_work": ((3, 1, 1, 4, 128, 32, 3, BF16), {"ctas": 40}),
    "many_rows": ((150, 1, 1, 2, 64, 16, 3, BF16), {"ctas": 5}),
    "smollm2_h64_g3": ((4, 1, 3, 3, 64, 64, 5, BF16), {"ctas": 6}),
    "phi_h96_g1_softcap": ((4, 1, 2, 1, 96, 16, 12, BF16), {"ctas": 5, "softcap": 5.0}),
    "gemma_h256_g16_window": ((3, 1, 1, 16, 256, 32, 8, BF16), {"ctas": 4, "window": 100}),
    "window": ((6, 1, 2, 4, 128, 32, 12, BF16), {"ctas": 7, "window": 70}),
    "three_queries": ((4, 3, 2, 4, 64, 32, 8, BF16), {"ctas": 6}),
    "five_queries_window_softcap": ((3, 5, 1, 3, 128, 16, 9, BF16), {"ctas": 5, "window": 40, "softcap": 3.0}),
    "fp8_h128": ((4, 1, 2, 4, 128, 32, 8, FP8), {"ctas": 7}),
    "fp8_h64": ((4, 1, 2, 3, 64, 32, 8, FP8), {"ctas": 5}),
    "fp8_g16_shared": ((3, 1, 1, 16, 128, 32, 14, FP8), {"ctas": 5, "whole": 2}),
    "fp8_h96_window": ((4, 1, 1, 8, 96, 16, 9, FP8), {"ctas": 3, "window": 50}),
    "fp8_h256": ((3, 2, 1, 2, 256, 32, 6, FP8), {"ctas": 4}),
}


SLOW = ("one_cta", "more_ctas_than_work", "fp8_h64", "fp8_h256", "phi_h96_g1_softcap")
"""What other cases nearly cover: each costs a build."""


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_equals_reference(case: str, seed: int) -> None:
    sizes, options = CASES[case]
    q, kv, pages, positions = inputs(*sizes)
    window, softcap = options.get("window"), options.get("softcap")
    first = None if window is None else positions - window + 1
    common = {"scale": sizes[4] ** -0.5, "softcap": softcap}
    tuning = {
        key: value for key, value in options.items() if key in ("ctas", "whole", "min_share", "warps", "resident")
    }
    tuning.setdefault("warps", 4)
    out, lse = emulate(q, kv, pages, positions, first, seed=seed, **tuning, **common)
    clean = jnp.nan_to_num(kv.astype(jnp.float32))
    wanted, wanted_lse = reference.attend(q.astype(jnp.float32), clean, pages, positions, first, **common)
    seen = positions >= 0
    out = out.astype(np.float32)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(lse[seen], np.asarray(wanted_lse)[seen], atol=2e-3)
    assert (lse[~seen] < -1e29).all()
    # Weights and results are rounded to bfloat16, each to 2^-9 of its size.
    np.testing.assert_allclose(out[seen], np.asarray(wanted)[seen], atol=6e-3, rtol=6e-3)


@pytest.fixture
def hopper(monkeypatch):
    """A process that compiles for a Hopper GPU, with an NVRTC that makes empty modules."""
    monkeypatch.setattr(call, "_refused", {})
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    monkeypatch.setattr(rtc, "compile_ptx", lambda name, macros: f"// {name}")
    call.describe_target("9.0")
    yield
    call.describe_target(None)


def lowered(platform: str, dtype, G: int = 4, O: int = 32) -> str:
    q, kv, pages, positions = inputs(3, 1, 2, G, 128, O, 4, dtype)
    step = jax.jit(lambda *a: api.paged_attention(*a, scale=0.1))
    return step.trace(q, kv, pages, positions).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_lowered_for_a_gpu(hopper, dtype) -> None:
    text = lowered("cuda", dtype)
    assert text.count("__gpu$xla.gpu.ptx") == 1 and "stablehlo.while" not in text
    assert "__gpu$xla.gpu.ptx" not in lowered("cpu", dtype)


@pytest.mark.parametrize("sizes", [{"G": 17}, {"O": 8}, {"dtype": jnp.float32}], ids=str)
def test_what_it_cannot_do_goes_to_the_reference(hopper, sizes) -> None:
    text = lowered("cuda", **{"dtype": BF16, **sizes})
    assert "__gpu$xla.gpu.ptx" not in text and "stablehlo.while" in text


@pytest.mark.parametrize("rows", [1, 64, 512])
@pytest.mark.parametrize(("H", "G"), [(64, 3), (64, 16), (96, 1), (128, 4), (128, 16), (256, 16)])
def test_shared_memory_and_bytes_under_way(H: int, G: int, rows: int) -> None:
    for fp8 in (False, True):
        launch = decode_cuda.configure(
            (rows, 1, G, H), (9, 2, 1, 32, H), 8, fp8=fp8, scale=1.0, softcap=None, first=False
        )  # fmt: skip
        resident, stages = int(str(launch.macros["RESIDENT"])), int(str(launch.macros["STAGES"]))
        assert resident * (launch.shared + 1024) <= decode_cuda.SM_SHARED
        warps = int(str(launch.macros["WARPS"]))
        under_way = resident * (stages - 1) * warps * 16 * 2 * H * (1 if fp8 else 2)  # while one is computed on
        # 4.6 TB/s times 1 us of latency, over 132 multiprocessors, is 35 KB.
        assert under_way >= 40 * 1024
        assert launch.grid[0] == rows and launch.grid[0] * launch.grid[1] >= launch.ctas
