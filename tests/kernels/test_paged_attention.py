"""Every implementation of paged attention against attention in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.paged_attention import cpu, prefill_cuda, reference
from jaxllm.kernels.paged_attention.api import paged_attention
from jaxllm.mapping import Mapping
from jaxllm.parallel.context import AttentionBatch, Kernel
from jaxllm.parallel.layout import Layout

pytestmark = pytest.mark.quick


def run(name, q, kv, pages, positions, *, scale, window=None, softcap=None, first_RQ=None):
    """One implementation by its name; the arguments of `api.paged_attention`."""
    first_RQ = reference.first_visible(positions, window, first_RQ)
    if name == "reference":
        return reference.attend(q, kv, pages, positions, first_RQ, scale=scale, softcap=softcap)
    return cpu.choose(q, kv, pages, scale=scale, softcap=softcap)(q, kv, pages, positions, first_RQ)


IMPLEMENTATIONS = {"reference": partial(run, "reference"), "cpu": partial(run, "cpu")}


def exact(q, kv, pages, positions, *, scale, window=None, softcap=None, first_RQ=None):
    R, Q, N, H = q.shape
    k, v = kv[:, 0], kv[:, 1]
    K = k.shape[1]
    out, lse = np.zeros(q.shape), np.zeros((R, Q, N))
    for r in range(R):
        keys = np.moveaxis(k[pages[r]].astype(np.float64), 1, 2).reshape(-1, K, H)
        values = np.moveaxis(v[pages[r]].astype(np.float64), 1, 2).reshape(-1, K, H)
        for i in range(Q):
            at = positions[r, i]
            first = 0 if window is None else max(0, at - window + 1)
            if first_RQ is not None:
                first = max(0, first_RQ[r, i])
            if at < first:
                lse[r, i] = -1e30
                continue
            seen = slice(first, at + 1)
            for n in range(N):
                scores = keys[seen, n * K // N] @ q[r, i, n].astype(np.float64) * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                top = scores.max()
                weights = np.exp(scores - top)
                out[r, i, n] = weights @ values[seen, n * K // N] / weights.sum()
                lse[r, i, n] = top + np.log(weights.sum())
    return out, lse


def inputs(R, Q, K, G, H, O, longest, seed=0):
    rng = np.random.default_rng(seed)
    W = -(-longest // O)
    q = rng.standard_normal((R, Q, K * G, H), np.float32)
    kv = rng.standard_normal((R * W + 1, 2, K, O, H), np.float32)
    pages = (rng.permutation(R * W) + 1).reshape(R, W).astype(np.int32)
    positions = np.full((R, Q), -1, np.int32)
    for r in range(R):
        length = Q if r % 3 else max(1, Q // 2)  # some tiles are padded
        start = longest - length if r == 0 else rng.integers(0, longest - length + 1)
        positions[r, :length] = start + np.arange(length)
    if R > 2:
        positions[-1] = -1  # a row of padding only
    return q, kv, pages, positions


CASES = {
    # R, Q, K, G, H, O, longest context
    "decode": ((5, 1, 3, 3, 64, 32, 200), {}),
    "decode_h16_g1": ((4, 1, 2, 1, 16, 4, 37), {}),
    "decode_h80_g8": ((3, 1, 2, 8, 80, 16, 100), {}),
    "decode_h128_g2": ((3, 1, 1, 2, 128, 128, 300), {}),
    "decode_long": ((2, 1, 1, 4, 64, 32, 1500), {}),
    "decode_window": ((4, 1, 2, 2, 64, 32, 1300), {"window": 70}),
    "decode_softcap": ((4, 1, 2, 5, 64, 16, 150), {"softcap": 5.0}),
    "tile": ((3, 32, 3, 3, 64, 32, 200), {}),
    "tile_h80_g1": ((3, 32, 2, 1, 80, 16, 90), {}),
    "tile_g7_long": ((1, 8, 1, 7, 16, 8, 700), {}),
    "tile_window_softcap": ((3, 32, 1, 4, 16, 32, 650), {"window": 40, "softcap": 2.0}),
    "tile_one_page": ((3, 32, 2, 2, 128, 64, 50), {}),
    "odd_sizes": ((3, 5, 2, 3, 20, 7, 61), {"window": 9}),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, name: str) -> None:
    sizes, options = CASES[case]
    args = inputs(*sizes)
    options = {"scale": sizes[4] ** -0.5, **options}
    try:
        out, lse = jax.jit(lambda *a: IMPLEMENTATIONS[name](*a, **options))(*args)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    wanted, wanted_lse = exact(*args, **options)
    real = args[3] >= 0
    np.testing.assert_allclose(np.asarray(out)[real], wanted[real], atol=5e-6, rtol=2e-6)
    np.testing.assert_allclose(np.asarray(lse)[real], wanted_lse[real], atol=5e-6, rtol=2e-6)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(5, 1, 3, 3, 64, 32, 700), (4, 32, 2, 3, 16, 4, 90)], ids=["decode", "tile"])
def test_first_visible_key(name: str, sizes: tuple[int, ...]) -> None:
    """Any first key: one after the last leaves nothing to see, which merging must be able to tell by the lse."""
    args = inputs(*sizes)
    rng = np.random.default_rng(1)
    first = rng.integers(-3, args[3].max(1, keepdims=True) + 4, args[3].shape).astype(np.int32)
    first[1] = args[3][1] + 1  # a row that sees nothing
    call = jax.jit(lambda *a: IMPLEMENTATIONS[name](*a[:4], scale=0.25, first_RQ=a[4]))
    try:
        out, lse = map(np.asarray, call(*args, first))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    wanted, wanted_lse = exact(*args, scale=0.25, first_RQ=first)
    seen = (args[3] >= 0) & (first <= args[3])
    assert 0 < seen.sum() < (args[3] >= 0).sum()
    np.testing.assert_allclose(out[seen], wanted[seen], atol=5e-6, rtol=2e-6)
    np.testing.assert_allclose(lse[seen], wanted_lse[seen], atol=5e-6, rtol=2e-6)
    assert (lse[~seen] < -1e29).all() and np.isfinite(out).all()


def test_native_result_does_not_depend_on_the_batch() -> None:
    """A token gets the same bits decoded alone, decoded with others, and as part of a prompt tile."""
    q, kv, pages, positions = inputs(4, 32, 3, 3, 64, 32, 1100)
    for window in (None, 300):
        call = jax.jit(lambda *a, w=window: run("cpu", *a, scale=0.125, window=w))
        try:
            tile, tile_lse = call(q, kv, pages, positions)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        for r, i in ((0, 3), (1, 0), (1, 31), (2, 17)):
            one, one_lse = call(q[r : r + 1, i : i + 1], kv, pages[r : r + 1], positions[r : r + 1, i : i + 1])
            np.testing.assert_array_equal(one[0, 0], tile[r, i])
            np.testing.assert_array_equal(one_lse[0, 0], tile_lse[r, i])


def test_eight_devices_at_once() -> None:
    devices = jax.devices("cpu")
    mesh = jax.sharding.Mesh(np.asarray(devices), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    sizes = (2 * len(devices), 1, 2, 3, 64, 16, 90)
    q, kv, pages, positions = inputs(*sizes)

    def local(q, positions, kv, pages):
        for _ in range(20):
            q = run("cpu", q, kv, pages, positions, scale=0.125)[0]
        return q

    none = jax.sharding.PartitionSpec()
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, none, spec), out_specs=spec, check_vma=False))
    try:
        out = step(q, positions, kv, pages)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    wanted = jnp.asarray(q)
    for _ in range(20):
        wanted = run("cpu", wanted, kv, pages, positions, scale=0.125)[0]
    np.testing.assert_array_equal(np.asarray(out)[:-1], np.asarray(wanted)[:-1])


def test_reference_over_fp8_pages() -> None:
    """Only the pages are rounded to eight bits: the weights stay as they are."""
    q, kv, pages, positions = inputs(3, 1, 2, 2, 16, 8, 60)
    kv = jnp.asarray(kv, jnp.float8_e4m3fn)
    found, _ = reference.attend(q, kv, pages, positions, scale=0.3)
    wanted, _ = exact(q, np.asarray(kv, np.float32), pages, positions, scale=0.3)
    real = positions >= 0
    np.testing.assert_allclose(np.asarray(found)[real], wanted[real], atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_a_step_in_one_array(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts beside decodes give the same where a kernel takes them as they lie as where they are cut out."""
    D, tiles, tile, O = 2, 3, 4, 4
    _, kv, pages, _ = inputs(D + tiles, 1, 2, 2, 8, O, 24)
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((D + tiles * tile, 4, 8), np.float32))
    positions = np.concatenate([[7, -1], 3 + np.arange(tile), 9 + np.arange(tile), np.full(tile, -1)]).astype(np.int32)
    kernel = Kernel(partial(paged_attention, scale=0.3), window, Layout(Mapping(), np.dtype(np.float32)))
    batch = AttentionBatch(D, tile, jnp.asarray(positions), jnp.asarray(pages))
    step = kernel.step(q, jnp.asarray(kv), batch, *kernel.visible(batch.positions_T, kernel.stripes(kv)))
    taken = []

    def choose(rows, kv, pages, *, before=None, **how):
        taken.append(before)
        return lambda q, *others: (q, q[..., 0])  # for another platform than this

    monkeypatch.setattr(prefill_cuda, "choose", choose)
    found = kernel.step(q, jnp.asarray(kv), batch, *kernel.visible(batch.positions_T, kernel.stripes(kv)))
    assert D in taken
    seen = positions >= 0
    for a, b in zip(found, step, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a)[seen], np.asarray(b)[seen], rtol=1e-5, atol=1e-5)
