"""The CUDA kernel of decode attention over latents, run by the emulator, against the reference in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.paged_attention import api, latent_cuda, reference
from tests.kernels.emulator.emulator import EmulatorError, Kernels

VALUES, H = latent_cuda.VALUES, latent_cuda.VALUES + 64


def inputs(R, N, O, W, seed=0, even=False):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((R, 1, N, H)), jnp.bfloat16)
    kv = jnp.asarray(rng.standard_normal((R * W + 1, 1, 1, O, H)), jnp.bfloat16)
    pages = (rng.permutation(R * W) + 1).reshape(R, W).astype(np.int32)
    positions = rng.integers(0, W * O, (R, 1)).astype(np.int32)
    positions[0] = W * O - 1
    if even:
        positions[:, 0] = W * O - 1 - np.arange(R)
    elif R > 2:
        positions[1] = -1
        positions[2] = 0
    for r in range(R):  # what no query sees may be anything, and its pages too
        last = positions[r, 0]
        pages[r, last // O + 1 :] = 0
        if last >= 0:
            kv = kv.at[pages[r, last // O], :, :, last % O + 1 :].set(float("nan"))
    return q, kv.at[0].set(float("nan")), pages, positions


def emulate(q, kv, pages, positions, first, *, scale, seed, **tuning):
    """As `decode_cuda.attend`."""
    launch = latent_cuda.configure(
        q.shape, kv.shape, pages.shape[1], VALUES, scale=scale, first=first is not None, **tuning
    )
    arguments = [np.asarray(a) for a in (q, kv, pages, positions, positions if first is None else first)]
    kernel, written = latent_cuda.source_of(launch), latent_cuda.results(launch, q.shape)
    return Kernels(rtc.SOURCES / f"{kernel}.cu", launch.macros).run(
        kernel,
        [*arguments, np.zeros(written[4][0], np.int32)],
        written,
        grid=launch.grid,
        threads=launch.threads,
        shared=launch.shared,
        aliases={5: 4},
        seed=seed,
    )[:2]


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    # R, N, O, W
    "whole_rows": ((4, 16, 32, 5), {"processors": 3}),
    "shared_window": ((4, 5, 32, 13), {"processors": 5, "whole": 1, "window": 150, "min_share": 2}),
    "many_parts": ((1, 12, 64, 11), {"processors": 9, "whole": 1}),
    "two_tiles_shared": ((3, 128, 64, 5), {"processors": 4, "whole": 1, "min_share": 2}),
    "many_whole": ((3, 128, 32, 9), {"processors": 4, "whole": 5}),
    "many_shared": ((3, 128, 64, 7), {"processors": 6, "whole": 1, "min_share": 2}),
    "many_window": (
        (3, 20, 16, 23),
        {"processors": 4, "window": 100, "whole": 1, "min_share": 1},
    ),
    "many_small_pages": (
        (4, 64, 8, 37),
        {"processors": 3, "whole": 1, "min_share": 1},
    ),
    "many_rows": ((37, 64, 8, 9), {"processors": 5, "whole": 1, "min_share": 1}),
    "many_pairs": (
        (2, 64, 32, 8),
        {"processors": 4, "whole": 1, "min_share": 1, "even": True},
    ),
    "many_pairs_of_20": (
        (3, 20, 32, 8),
        {"processors": 6, "whole": 1, "min_share": 1, "even": True},
    ),
    "many_shared_window": ((3, 128, 64, 7), {"processors": 6, "whole": 1, "min_share": 2, "window": 150, "ahead": 3}),
    "pages_of_16": ((3, 64, 16, 23), {"processors": 4, "whole": 1, "min_share": 1}),
}


def run_case(case: str, seed: int) -> None:
    sizes, options = CASES[case]
    q, kv, pages, positions = inputs(*sizes, even=options.get("even", False))
    first = positions - options["window"] + 1 if "window" in options else None
    tuning = {key: value for key, value in options.items() if key not in ("window", "even")}
    out, lse = emulate(q, kv, pages, positions, first, scale=H**-0.5, seed=seed, **tuning)
    clean = jnp.nan_to_num(kv.astype(jnp.float32))
    wanted, wanted_lse = reference.attend(
        q.astype(jnp.float32), clean, pages, positions, first, scale=H**-0.5, values=VALUES
    )
    seen = positions >= 0
    out = out.astype(np.float32)
    assert np.isfinite(out).all() and out.shape == wanted.shape
    np.testing.assert_allclose(lse[seen], np.asarray(wanted_lse)[seen], atol=2e-3)
    assert (lse[~seen] < -1e29).all()
    # Weights and results are rounded to bfloat16, each to 2^-9 of its size.
    np.testing.assert_allclose(out[seen], np.asarray(wanted)[seen], atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, seed: int) -> None:
    run_case(case, seed)


BROKEN: dict[str, tuple[str, str, str, str]] = {
    # case, file, right, wrong
    "copies_not_fenced": (
        "shared_window",
        "latent.cuh",
        "    fence_products();\n    barrier_arrive",
        "    barrier_arrive",
    ),
    "queries_not_fenced": (
        "many_whole",
        "latent_halves.cuh",
        "    fence_products();\n    named_sync(3, 256);\n",
        "    named_sync(3, 256);\n",
    ),
    "values_of_the_other_half": (
        "many_whole",
        "latent_halves.cuh",
        "uniform(group) * HALF * PANEL",
        "(1 - uniform(group)) * HALF * PANEL",
    ),
    "never_shrinks": (
        "many_whole",
        "latent_halves.cuh",
        "    if (!__any_sync(~0u, first != 1.f || second != 1.f)) return;\n",
        "    return;\n",
    ),
    "few_never_shrink": ("shared_window", "latent_few.cu", "if (__any_sync(~0u, shrinks)) {", "if (false) {"),
    "weights_not_awaited": (
        "shared_window",
        "latent_few.cu",
        "    named_sync(1, 128);\n  }\n\n  DEVICE void mul",
        "  }\n\n  DEVICE void mul",
    ),
    "half_freed_early": (
        "many_whole",
        "latent_halves.cuh",
        "    add_weights();\n    wgmma_wait<0>();\n    keep_weights(mine);\n    free(stage_of(count));\n",
        "    add_weights();\n    keep_weights(mine);\n    free(stage_of(count));\n",
    ),
    "other_weights_not_awaited": (
        "many_whole",
        "latent_halves.cuh",
        "    barrier_wait(weights_ready(smem, stage), phase_of(count));\n",
        "",
    ),
    "weights_over_keys": (
        "many_whole",
        "latent_halves.cuh",
        "    named_sync(1 + group, 128);  // all have the scores: the last panel is read\n",
        "",
    ),
    "unseen_not_cleared": ("many_whole", "latent_halves.cuh", "    if (tail) {  // what", "    if (false) {  // what"),
    "sums_of_another_scale": (
        "many_shared",
        "latent_many.cu",
        "attention.sum[half] * fast_exp2(attention.own_top[half] - attention.top[half])",
        "attention.sum[half]",
    ),
    "pair_not_awaited": (
        "many_pairs",
        "latent_pair.cuh",
        "    if (of.lane == 0) word_wait(finished + other, 1);\n",
        "",
    ),
    "parts_not_awaited": ("many_parts", "latent.cuh", "  if (lane == 0) word_wait(finished + part.from, parts);\n", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_the_emulator_finds_mistakes(what: str, tmp_path, monkeypatch) -> None:
    for path in rtc.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text())
    case, name, right, wrong = BROKEN[what]
    source = (rtc.SOURCES / name).read_text()
    assert source.count(right) == 1
    (tmp_path / name).write_text(source.replace(right, wrong))
    monkeypatch.setattr(rtc, "SOURCES", tmp_path)
    with pytest.raises((AssertionError, EmulatorError)):
        for seed in (0, 1):
            run_case(case, seed)


@pytest.fixture
def hopper(monkeypatch):
    """A process that compiles for a Hopper GPU, with an NVRTC that makes empty modules."""
    monkeypatch.setattr(call, "_refused", {})
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    monkeypatch.setattr(rtc, "compile_ptx", lambda name, macros: f"// {name}")
    call.describe_target("9.0")
    yield
    call.describe_target(None)


@pytest.mark.parametrize(("rows", "launches"), [(3, 1), (200, 2)])
def test_lowered_for_a_gpu(hopper, rows: int, launches: int) -> None:
    shapes = ((rows, 1, 128, H), jnp.bfloat16), ((9, 1, 1, 32, H), jnp.bfloat16), ((rows, 4), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((rows, 1), jnp.int32))]
    step = jax.jit(lambda *a: api.paged_attention(*a, scale=0.1, values=VALUES))
    lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.ptx") == launches
    assert lowered.out_info[0].shape == (rows, 1, 128, VALUES)


@pytest.mark.parametrize(
    ("q", "kv", "values"),
    [
        ((3, 2, 16, 576), (9, 1, 1, 32, 576), 512),  # two tokens of a row
        ((3, 1, 96, 576), (9, 1, 1, 32, 576), 512),
        ((3, 1, 16, 320), (9, 1, 1, 32, 320), 256),
        ((3, 1, 16, 576), (9, 1, 1, 4, 576), 512),
    ],
)
def test_what_it_cannot_do_is_said(q, kv, values: int) -> None:
    with pytest.raises(NotImplementedError):
        latent_cuda.configure(q, kv, 4, values, scale=1.0, first=False)


@pytest.mark.parametrize("first", [False, True])
def test_shared_memory_fits(first: bool) -> None:
    launch = latent_cuda.configure(
        (latent_cuda.MAX_ROWS, 1, 128, H), (9, 1, 1, 32, H), 4, VALUES, scale=1.0, first=first
    )
    assert launch.shared <= call.MAX_SHARED
