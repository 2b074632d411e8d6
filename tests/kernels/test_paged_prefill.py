"""The CUDA kernels of prefill attention, run by the emulator, against the reference in float32."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.paged_attention import prefill_cuda, reference, tiles
from jaxllm.kernels.paged_attention.prefill_cuda import VARIANTS, Variant
from tests.kernels.emulator.emulator import EmulatorError, Kernels

KERNELS = ("paged_prefill", "paged_prefill_mma")
BLOCKS = 3
"""Blocks of threads that stay: so few that each takes several tiles."""


def variant_of(kernel: str, head_dim: int) -> Variant:
    (variant,) = (v for v in VARIANTS[head_dim] if v.kernel == kernel)
    return variant


def emulate(variant: Variant, arguments, *, scale, softcap=None, seed=0, before=0):
    q, kv, pages, last, first = map(np.asarray, arguments)
    (R, Q), (*tokens, N, H), K = last.shape, q.shape, kv.shape[2]
    fp8 = kv.dtype == jnp.float8_e4m3fn
    how = {"scale": scale, "softcap": softcap, "before": before}
    defined = prefill_cuda.macros_of(variant, q.shape, kv.shape, fp8=fp8, **how)
    lines = tiles.schedule(last, first, group=N // K, width=pages.shape[1], pages=len(kv))
    items = K * tiles.num_tiles(R, Q, N // K)
    grid = min(items, BLOCKS) if variant.persistent else items
    results = [(q.shape, q.dtype), ((*tokens, N), np.dtype(np.float32))]
    if variant.persistent:
        results.append(((grid, prefill_cuda.MAP_WORDS), np.dtype(np.int32)))
    return Kernels(rtc.SOURCES / f"{variant.kernel}.cu", defined).run(
        variant.kernel,
        [q, kv, pages, last, first, np.asarray(lines)],
        results,
        grid=(grid,),
        threads=variant.threads,
        shared=variant.shared(H, fp8),
        seed=seed,
    )[:2]


def assert_right(found, arguments, *, scale, softcap=None) -> None:
    q, kv, pages, last, first = arguments
    wide = (jnp.asarray(q, jnp.float32), jnp.asarray(kv, jnp.float32))
    wanted = [np.asarray(x) for x in reference.attend(*wide, pages, last, first, scale=scale, softcap=softcap)]
    out, lse = (np.asarray(x, np.float32) for x in found)
    seen = np.asarray(last >= np.maximum(first, 0))
    assert seen.any()
    np.testing.assert_allclose(lse[seen], wanted[1][seen], atol=1e-4, rtol=1e-5)
    # Probabilities are rounded to bfloat16, and so is the result: 2^-9 of each.
    np.testing.assert_allclose(out[seen], wanted[0][seen], atol=1e-2, rtol=1e-2)
    assert (lse[~seen] < -1e29).all() and np.isfinite(out).all()


def prompt(R, Q, K, G, H, O, W, starts, *, window=None, seed=0):
    """Rows of Q tokens of causal prompts that begin at `starts` (None: padding); half of the last row is padding."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((R, Q, K * G, H), np.float32)
    kv = rng.standard_normal((R * W + 1, 2, K, O, H), np.float32)
    pages = (rng.permutation(R * W) + 1).reshape(R, W).astype(np.int32)
    last = np.full((R, Q), -1, np.int32)
    for r, start in enumerate(starts):
        if start is not None:
            count = Q if r + 1 < R else Q // 2 + 1
            last[r, :count] = start + np.arange(count)
        pages[r, (last[r].max() + O) // O :] = 0
    first = np.zeros_like(last) if window is None else np.maximum(last - window + 1, 0)
    return (jnp.asarray(q, jnp.bfloat16), jnp.asarray(kv, jnp.bfloat16), pages, last, first)


@functools.cache
def mixed(head_dim: int):
    return prefill_cuda.sample(head_dim)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("head_dim", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_counts_of_every_kind(kernel: str, head_dim: int, seed: int) -> None:
    """Counts that rise and that do not, windows, tokens and whole tiles that see nothing."""
    arguments, scale = mixed(head_dim), head_dim**-0.5
    found = emulate(variant_of(kernel, head_dim), arguments, scale=scale, seed=seed)
    assert_right(found, arguments, scale=scale)


CASES = {
    # R, Q, K, G, H, O, W, starts of the rows; options
    "llama_tile_g4": ((2, 128, 1, 4, 128, 64, 9, (300, 37)), {}),
    "tile_is_a_page": ((2, 128, 2, 1, 64, 128, 3, (0, 200)), {}),
    "short_rows_g7": ((4, 5, 2, 7, 64, 32, 12, (0, 377, None, 100)), {}),
    "two_tokens_g16": ((3, 2, 1, 16, 128, 16, 25, (1, 390, 128)), {}),
    "pages_of_24_softcap": ((2, 40, 1, 3, 96, 24, 12, (240, 101)), {"softcap": 15.0}),
    "gemma_window_softcap": ((2, 64, 1, 2, 256, 16, 30, (400, 13)), {"softcap": 50.0, "window": 90}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_prompts(kernel: str, case: str) -> None:
    sizes, options = CASES[case]
    arguments = prompt(*sizes, window=options.get("window"))
    how = {"scale": sizes[4] ** -0.5, "softcap": options.get("softcap")}
    assert_right(emulate(variant_of(kernel, sizes[4]), arguments, **how), arguments, **how)


@pytest.mark.parametrize("variant", [prefill_cuda.wgmma(96), prefill_cuda.wgmma(64, 2)])
def test_other_ways_to_compile(variant: Variant) -> None:
    arguments, scale = mixed(128), 128**-0.5
    for seed in (0, 1):
        found = emulate(variant, arguments, scale=scale, seed=seed)
        assert_right(found, arguments, scale=scale)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("head_dim", VARIANTS)
def test_pages_in_e4m3(head_dim: int, seed: int) -> None:
    q, kv, *others = mixed(head_dim)
    arguments, scale = (q, kv.astype(jnp.float8_e4m3fn), *others), head_dim**-0.5
    found = emulate(VARIANTS[head_dim][0], arguments, scale=scale, seed=seed)
    assert_right(found, arguments, scale=scale)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_come_after_other_tokens(kernel: str) -> None:
    """Queries and results of the tokens before, which are another kernel's, are neither read nor written."""
    sizes, before = CASES["short_rows_g7"][0], 3
    q, *others = prompt(*sizes)
    R, Q, N, H = q.shape
    whole = np.concatenate([np.full((before, N, H), np.nan, q.dtype), np.asarray(q).reshape(R * Q, N, H)])
    scale = H**-0.5
    out, lse = emulate(variant_of(kernel, H), (whole, *others), scale=scale, before=before)
    assert np.isnan(out[:before].astype(np.float32)).all() and np.isnan(lse[:before]).all(), "as they were"
    assert_right((out[before:].reshape(q.shape), lse[before:].reshape(R, Q, N)), (q, *others), scale=scale)


@pytest.mark.parametrize("case", ["short_rows_g7", "pages_of_24_softcap"])
def test_what_pages_were_left_with_is_not_seen(case: str) -> None:
    """NaNs after the last key of each row, and entries of its pages that point nowhere."""
    R, Q, K, G, H, O, W, starts = CASES[case][0]
    q, kv, pages, last, first = prompt(R, Q, K, G, H, O, W, starts)
    kv = np.asarray(kv).copy()
    for r in range(R):
        used, rest = divmod(int(last[r].max()) + 1, O)
        kv[pages[r, used + bool(rest) :]] = np.nan
        if rest:
            kv[pages[r, used], :, :, rest:] = np.nan
        pages[r, used + bool(rest) :] = 10**6
    arguments, scale = (q, jnp.asarray(kv), pages, last, first), H**-0.5
    clean = (q, jnp.nan_to_num(jnp.asarray(kv)), np.where(pages < len(kv), pages, 0), last, first)
    assert_right(emulate(variant_of("paged_prefill", H), arguments, scale=scale), clean, scale=scale)


@pytest.mark.parametrize("kernel", KERNELS)
def test_stripes_of_a_context(kernel: str) -> None:
    """What a rank of RING sees: runs of equal counts that jump by a stripe, and merging gives the whole."""
    H, O, ranks, Q = 128, 16, 2, 64
    q, kv, pages, last, _ = prompt(1, Q, 1, 2, H, O, 16, (130,))
    last[:] = 130 + np.arange(Q)
    whole = reference.attend(q.astype(jnp.float32), kv.astype(jnp.float32), pages, last, scale=0.1)
    parts = []
    for rank in range(ranks):
        tokens = last + 1
        count = tokens // (O * ranks) * O + np.clip(tokens % (O * ranks) - rank * O, 0, O)
        arguments = (q, kv, pages[:, rank::ranks], (count - 1).astype(np.int32), np.zeros_like(last))
        parts.append([np.asarray(x, np.float32) for x in emulate(variant_of(kernel, H), arguments, scale=0.1)])
    lse = np.logaddexp(parts[0][1], parts[1][1])
    out = sum(np.exp(p[1] - lse)[..., None] * p[0] for p in parts)
    np.testing.assert_allclose(lse, whole[1], atol=1e-4)
    np.testing.assert_allclose(out, whole[0], atol=1e-2, rtol=1e-2)


BROKEN = {
    "score_descriptor": ("smem + K_AT, PANEL_ROW, 16, 8 * PANEL_ROW", "smem + K_AT, PANEL_ROW, 16, 4 * PANEL_ROW"),
    "value_panels": ("PANEL_ROW, KV_ATOMS, 8 * PANEL_ROW", "PANEL_ROW, 8 * PANEL_ROW, KV_ATOMS"),
    "first_scores_read_early": ("    wgmma_wait<0>();\n    wgmma_pin(s);", ""),
    "queries_freed_early": ("    if (last == first) free_buffer(rings.q);", "    free_buffer(rings.q);"),
    "scores_read_early": ("      wgmma_wait<1>();\n      wgmma_pin(s);", ""),
    "output_read_early": ("    wgmma_wait<1>();\n    wgmma_pin(o);", ""),
    "output_of_two_tiles": ("start_output(last == first)", "start_output(false)"),
    "keys_not_waited_for": ("      wait_for(rings.k);\n      wait_for(rings.v);", "      wait_for(rings.v);"),
    "copies_not_fenced": ("    wait_for(rings.k);\n    fence_products();", "    wait_for(rings.k);"),
    "boxes_of_another_page": ("base % PAGE + i;", "base % PAGE;"),
    "bytes_not_expected": ("if (lane == 0) barrier_expect(full, KV_BYTES);", "if (lane == 0) barrier_arrive(full);"),
    "e4m3_not_fenced": ("    fence_products();\n    barrier_arrive(full);", "    barrier_arrive(full);"),
    "e4m3_not_waited_for": ("    cp_async_wait<LATER>();\n", ""),
    "not_rescaled": ("if (softmax.rescaled) rescale(o, softmax.keep);", ""),
    "wrong_phase": ("barrier_wait(ring.freed(), ring.phase ^ 1)", "barrier_wait(ring.freed(), ring.phase)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_emulator_finds_mistakes(what: str, tmp_path, monkeypatch) -> None:
    """A kernel with one thing wrong gives wrong numbers or an error, at least with one of the two orders of events."""
    for path in rtc.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text())
    right, wrong = BROKEN[what]
    source = (rtc.SOURCES / "paged_prefill.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "paged_prefill.cu").write_text(source.replace(right, wrong))
    monkeypatch.setattr(rtc, "SOURCES", tmp_path)
    arguments, scale = mixed(128), 128**-0.5
    if "e4m3" in what:
        arguments = (arguments[0], arguments[1].astype(jnp.float8_e4m3fn), *arguments[2:])
    with pytest.raises((AssertionError, EmulatorError)):
        for seed in (0, 1):
            found = emulate(variant_of("paged_prefill", 128), arguments, scale=scale, seed=seed)
            assert_right(found, arguments, scale=scale)


@pytest.mark.parametrize("head_dim", VARIANTS)
def test_shared_memory_fits(head_dim: int) -> None:
    for variant in VARIANTS[head_dim]:
        assert variant.shared(head_dim, fp8=variant.persistent) <= call.MAX_SHARED


def test_what_it_cannot_do_is_said() -> None:
    arguments, scale = mixed(128), 128**-0.5
    q, kv, pages = arguments[:3]
    how = {"scale": scale, "softcap": None}
    variant = VARIANTS[128][0]
    for bad in ((q.astype(jnp.float32), kv, pages), (q, kv[..., :5, :], pages), (q, kv, pages.astype(jnp.int16))):
        with pytest.raises(NotImplementedError):
            prefill_cuda.compile_variant(variant, *bad, **how)
    with pytest.raises(NotImplementedError, match="decoding"):
        prefill_cuda.choose(q[:, :1], kv, pages, **how)
    with pytest.raises(NotImplementedError, match="head dim"):
        prefill_cuda.choose(q[..., :80], kv, pages, **how)
