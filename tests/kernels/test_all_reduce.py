"""Sums over ranks that write to each other's memory: the kernel in emulators, a thread for each rank; its choice."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.kernels.all_reduce import api, cuda, reference
from jaxllm.kernels.cuda import rtc
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.linear.quantized import quantize_tokens
from jaxllm.kernels.linear.reference import Norm, rms_norm
from jaxllm.layers.embedding import EXACT, greedy
from jaxllm.mapping import Mapping
from jaxllm.parallel.collectives import Exchange, Unsummed, exchanging, settle, sum_later, sum_partial
from jaxllm.parallel.mesh import make_mesh
from tests.kernels.emulator.emulator import Kernels

SLOT, SLOTS, CLUSTERS = 32, 4, 2
PHASES = 2
pytestmark = pytest.mark.timeout(60)


class Ranks:
    """The memory of some ranks, and what each is told of it."""

    def __init__(self, count: int, numbered: bool = True):
        self.count = count
        self.numbered = numbered
        size = 128 + PHASES * 2 * count * SLOTS * 2 * SLOT * 16
        self.memory = [np.zeros(size + 16, np.uint8) for _ in range(count)]
        self.word = np.zeros(1, np.uint32)
        at = [-(-m.ctypes.data // 16) * 16 for m in self.memory]
        if not numbered:
            for memory in self.memory:
                memory[-memory.ctypes.data % 16 + 128 :] = 0xFF
        self.groups = [
            np.array([*np.roll(at, -rank), rank, self.word.ctypes.data], np.uint64).view(np.uint32)
            for rank in range(count)
        ]
        self.kernels: dict[tuple, Kernels] = {}

    def macros(self, x: np.ndarray, residual: bool, eps: float | None, timeout_ms: int, shots: int = 1) -> dict:
        return cuda.macros_of(
            jnp.asarray(x),
            self.count,
            residual=residual,
            eps=eps,
            shots=shots,
            numbered=self.numbered,
            clusters=CLUSTERS,
            slot=SLOT,
            timeout_ms=timeout_ms,
        ) | {"SLOTS": SLOTS, "IN_ORDER": 1}

    def kernel(
        self, rank: int, x: np.ndarray, residual: bool, eps: float | None, timeout_ms: int, shots: int = 1
    ) -> Kernels:
        key = rank, x.shape, x.dtype, residual, eps, shots
        if key not in self.kernels:
            macros = self.macros(x, residual, eps, timeout_ms, shots)
            self.kernels[key] = Kernels(rtc.SOURCES / "all_reduce.cu", macros, own=True)
        return self.kernels[key]

    def run(
        self,
        rank: int,
        x: np.ndarray,
        residual: np.ndarray | None,
        norm: Norm,
        seed: int,
        timeout_ms: int,
        shots: int = 1,
    ) -> list[np.ndarray]:
        weight, eps = norm or (x, None)
        kernel = self.kernel(rank, x, residual is not None, eps, timeout_ms, shots)
        macros = self.macros(x, residual is not None, eps, timeout_ms, shots)
        arguments = [x, x if residual is None else residual, self.groups[rank], weight, x, x]
        results = [(x.shape, x.dtype), (x.shape if norm else (16,), x.dtype), ((4,), np.float32)]
        return kernel.run(
            "all_reduce",
            arguments,
            results,
            grid=cuda.grid_of(macros),
            threads=macros["THREADS"],
            shared=cuda.shared_of(macros),
            seed=seed,
        )[:2]


# One block that is not full; four, the last one not full; two rows of two slots, the second not full; two rows of two
# blocks. In two shots, for four ranks: shares of two of them; of three, the last one not full; six rows, of which the
# second block, or pair of blocks, has two.
KINDS = [
    (jnp.bfloat16, (16,), True, False),
    (np.float32, (3, 164), False, False),
    (jnp.bfloat16, (2, 400), True, True),
    (jnp.bfloat16, (2, 512), True, True),
]
SHARES = [
    (jnp.bfloat16, (8 * SLOT * 2,), True, False),
    (np.float32, (2 * SLOT * 4 + 12,), False, False),
    (jnp.bfloat16, (6, 400), True, True),
    (jnp.bfloat16, (6, 512), True, True),
]


@pytest.mark.parametrize(
    ("count", "shots", "numbered"),
    [(2, 1, True), (4, 2, False), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((4, 2, True), (5, 2, False)))],
)
def test_kernel_equals_reference(count: int, shots: int, numbered: bool) -> None:
    """Sums of several sizes in a row, the ranks as far apart as they get; all have the same bits."""
    ranks, rng = Ranks(count, numbered), np.random.default_rng(count)
    work = []
    for number in range(18):
        # Sums in two shots take turns with sums in one.
        way = shots if number % 3 else 1
        kinds = KINDS if way == 1 else SHARES
        dtype, shape, residual, normed = kinds[number % 4 if number < 8 else rng.integers(4)]
        parts = rng.standard_normal((count, *shape)).astype(dtype)
        if not number:
            parts.view(np.uint16)[0, :2] = 0xFFFF  # NaNs of nothing but ones, which a place without a packet has
        norm = (rng.uniform(0.5, 2, shape[-1]).astype(np.float32), 1e-5) if normed else None
        work.append((parts, rng.standard_normal(shape).astype(dtype) if residual else None, norm, way))
    for rank in range(count):  # built by one thread
        for parts, residual, norm, way in work:
            ranks.kernel(rank, parts[rank], residual is not None, norm and norm[1], 20_000, way)

    def one(rank: int) -> list[list[np.ndarray]]:
        chance = random.Random(rank)
        out = []
        for number, (parts, residual, norm, way) in enumerate(work):
            time.sleep(chance.choice((0, 0, 0.005)))
            out.append(ranks.run(rank, parts[rank], residual, norm, 7 * number + rank, 20_000, way))
        return out

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(one, range(count)))
    assert not ranks.word[0]
    for number, (parts, residual, norm, _) in enumerate(work):
        wanted = reference.all_reduce(jnp.asarray(parts), None if residual is None else jnp.asarray(residual))
        for rank in range(count):
            pair = [np.asarray(x, np.float32) for x in (found[rank][number][0], wanted)]  # where NaN is NaN
            np.testing.assert_array_equal(*pair, f"sum {number} on rank {rank}")
            if norm is not None:
                np.testing.assert_array_equal(found[rank][number][1], found[0][number][1])
                normed = np.asarray(rms_norm(wanted, norm), np.float32)
                np.testing.assert_allclose(found[rank][number][1].astype(np.float32), normed, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("count", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_each_trip_is_a_collective_of_its_own(count: int) -> None:
    """Sums are scattered and gathered in turns with whole sums, of sizes whose last block is not full; the ranks as far
    apart as they get."""
    ranks, rng, rows, width = Ranks(count, False), np.random.default_rng(count), 3, 8 * 24
    kinds = [cuda.SCATTER, cuda.GATHER, cuda.KERNEL] * 4
    parts = [rng.standard_normal((count, count * rows, width)).astype(jnp.bfloat16) for _ in kinds]
    residuals = rng.standard_normal((count, rows, width)).astype(jnp.bfloat16)
    norm = rng.uniform(0.5, 2, width).astype(np.float32)

    def launch(rank: int, number: int, build: bool) -> np.ndarray | None:
        kind, x = kinds[number], parts[number][rank]
        if kind == cuda.GATHER:
            x = np.ascontiguousarray(x[:rows])
        eps = 1e-5 if kind == cuda.SCATTER and number % 2 else None
        residual = residuals[rank] if kind == cuda.SCATTER else None
        made = {"residual": residual is not None, "eps": eps, "shots": 2, "numbered": False, "slot": SLOT}
        macros = cuda.macros_of(jnp.asarray(x), count, kernel=kind, clusters=1, timeout_ms=20_000, **made)
        key = rank, number
        if build:
            source = rtc.SOURCES / f"{kind}.cu"
            ranks.kernels[key] = Kernels(source, macros | {"SLOTS": SLOTS, "IN_ORDER": 1}, own=True)
            return None
        shape = {cuda.SCATTER: (rows, width), cuda.GATHER: (count * rows, width)}.get(kind, x.shape)
        found, normed, _ = ranks.kernels[key].run(
            kind,
            [x, x if residual is None else residual, ranks.groups[rank], norm, x, x],
            [(shape, x.dtype), (shape if eps else (16,), x.dtype), ((4,), np.float32)],
            grid=cuda.grid_of(macros, kind),
            threads=macros["THREADS"],
            shared=cuda.shared_of(macros, kind),
            seed=5 * number + rank,
        )
        if eps is not None:
            wanted = np.asarray(rms_norm(jnp.asarray(found, jnp.float32), (jnp.asarray(norm), eps)))
            np.testing.assert_allclose(normed.astype(np.float32), wanted, rtol=2e-2, atol=2e-2)
        return found

    for rank in range(count):
        for number in range(len(kinds)):
            launch(rank, number, True)

    def one(rank: int) -> list[np.ndarray | None]:
        chance = random.Random(rank)
        out = []
        for number in range(len(kinds)):
            time.sleep(chance.choice((0, 0, 0.005)))
            out.append(launch(rank, number, False))
        return out

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(one, range(count)))
    assert not ranks.word[0]
    for number, kind in enumerate(kinds):
        total = reference.all_reduce(jnp.asarray(parts[number]))
        for rank in range(count):
            own = slice(rank * rows, (rank + 1) * rows)
            if kind == cuda.GATHER:
                wanted = parts[number][:, :rows].reshape(-1, width)
            elif kind == cuda.SCATTER:
                wanted = reference.all_reduce(jnp.asarray(parts[number][:, own]), jnp.asarray(residuals[rank]))
            else:
                wanted = total
            np.testing.assert_array_equal(found[rank][number], np.asarray(wanted), f"{kind} {number} on rank {rank}")


@pytest.mark.parametrize(("count", "shots", "clusters"), [(2, 1, 2), (4, 2, 2), (3, 2, 1)])
def test_products_in_e4m3_are_finished_and_the_norm_is_quantised(count: int, shots: int, clusters: int) -> None:
    """What the kernel does in one pass equals the steps: scales, sum, norm, e4m3; on every rank the same bits."""
    ranks, rng, shape = Ranks(count, False), np.random.default_rng(count), (6, 512)
    parts = rng.integers(-40, 40, (count, *shape)).astype(jnp.bfloat16)
    of_row = rng.uniform(0.01, 0.1, (count, shape[0], 1)).astype(np.float32)
    of_column = rng.uniform(0.01, 0.1, (count, shape[1])).astype(np.float32)
    residual = rng.standard_normal(shape).astype(jnp.bfloat16)
    residual[3] = 0
    parts[:, 3] = 0  # a row of zeros has the scale 1
    norm = (rng.uniform(0.5, 2, shape[1]).astype(np.float32), 1e-5)
    options = {"residual": True, "eps": 1e-5, "shots": shots, "clusters": clusters, "numbered": False, "slot": SLOT}
    options |= {"scaled": True, "quantised": True, "timeout_ms": 20_000}
    macros = cuda.macros_of(jnp.asarray(parts[0]), count, **options)
    assert macros["CLUSTER"] == clusters
    source = rtc.SOURCES / "all_reduce.cu"
    kernels = [Kernels(source, macros | {"SLOTS": 32, "IN_ORDER": 1}, own=True) for _ in range(count)]
    for memory in ranks.memory:  # larger than that of other tests
        memory.resize(128 + PHASES * 2 * count * 32 * SLOT * 16 + 16, refcheck=False)
    at = [-(-m.ctypes.data // 16) * 16 for m in ranks.memory]
    for rank, memory in enumerate(ranks.memory):
        memory[:] = 0
        memory[-memory.ctypes.data % 16 + 128 :] = 0xFF
        group = np.array([*np.roll(at, -rank), rank, ranks.word.ctypes.data], np.uint64)
        ranks.groups[rank] = group.view(np.uint32)

    def one(rank: int) -> list[np.ndarray]:
        return kernels[rank].run(
            "all_reduce",
            [parts[rank], residual, ranks.groups[rank], norm[0], of_row[rank], of_column[rank]],
            [(shape, parts.dtype), (shape, np.dtype(jnp.float8_e4m3fn)), ((shape[0], 1), np.float32)],
            grid=cuda.grid_of(macros),
            threads=macros["THREADS"],
            shared=cuda.shared_of(macros),
            seed=rank,
        )

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(one, range(count)))
    assert not ranks.word[0]
    products = [
        Product(*map(jnp.asarray, x), jnp.dtype(jnp.bfloat16)) for x in zip(parts, of_row, of_column, strict=True)
    ]
    wanted = reference.all_reduce(jnp.stack([x.finish() for x in products]), jnp.asarray(residual))
    normed = np.asarray(rms_norm(wanted.astype(jnp.float32), norm), np.float32)
    values, scale = quantize_tokens(jnp.asarray(normed, jnp.bfloat16))
    for out, eight, eight_scale in found:
        np.testing.assert_array_equal(out, np.asarray(wanted))
        np.testing.assert_array_equal(eight.view(np.uint8), found[0][1].view(np.uint8))
        np.testing.assert_allclose(eight_scale, scale, rtol=0.01)  # a last place of bfloat16
        back, right = (np.asarray(v, np.float32) * np.asarray(s) for v, s in ((eight, eight_scale), (values, scale)))
        np.testing.assert_allclose(back, normed, rtol=0.07, atol=0.01)
        assert np.mean(np.abs(back - right) > 0.01 * np.abs(right) + 1e-3) < 0.01


@pytest.mark.parametrize("numbered", [True, False])
def test_a_place_keeps_a_packet_until_it_is_read(numbered: bool) -> None:
    """A rank that has what another sent ends the sum, and may send for the next one before the other has read anything.
    Here the other one reads nothing before that."""
    ranks, units = Ranks(2, numbered), 3
    x = np.arange(4 * units, dtype=np.float32)
    ahead, behind = (ranks.kernel(rank, x, False, None, 10_000).library for rank in range(2))
    ctypes.c_void_p.in_dll(behind, "peer_other").value = ctypes.addressof(ctypes.c_uint64.in_dll(ahead, "peer_sent"))
    ctypes.c_uint64.in_dll(behind, "peer_until").value = (4 if numbered else 3) * units  # with the next sum's

    def one(rank: int) -> list[np.ndarray]:
        return [ranks.run(rank, x * (n + rank), None, None, n, 10_000)[0] for n in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(one, range(2)):
            for n in range(3):
                np.testing.assert_array_equal(found[n], x * (2 * n + 1))
    assert not ranks.word[0]


def test_numbers_begin_anew() -> None:
    """After 2**32 sums, with the other phase, and never 0, which is what memory begins with."""
    ranks = Ranks(2)
    for memory in ranks.memory:
        at = -memory.ctypes.data % 16
        memory[at : at + 4 * SLOTS].view(np.uint32)[:] = 2**32 - 3
    x = np.arange(3 * 164, dtype=np.float32).reshape(3, 164)
    for rank in range(2):
        ranks.kernel(rank, x, False, None, 20_000)

    def one(rank: int) -> list[np.ndarray]:
        return [ranks.run(rank, x * (n + rank), None, None, n, 20_000)[0] for n in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(one, range(2)):
            for n in range(5):
                np.testing.assert_array_equal(found[n], x * (2 * n + 1))


def test_nobody_waits_for_ever() -> None:
    """Two of three ranks: NaNs, and the word says so; whoever comes later gives up at once."""
    ranks = Ranks(3)
    x = np.ones(64, jnp.bfloat16)
    for rank in range(3):
        ranks.kernel(rank, x, False, None, 500)
    began = time.monotonic()
    results: dict[int, np.ndarray] = {}

    def one(rank: int) -> None:
        results[rank], _ = ranks.run(rank, x, None, None, rank, 500)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.4 < time.monotonic() - began < 20
    assert ranks.word[0] in (1, 3)
    assert all(np.isnan(out.astype(np.float32)).all() for out in results.values())
    again, _ = ranks.run(0, x, None, None, 0, 500)
    assert np.isnan(again.astype(np.float32)).all()


def test_only_what_the_kernel_can_do() -> None:
    x = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    assert cuda.macros_of(x(256, 4096), 2, residual=True)["UNITS"] == 131072
    for shape, dtype in (((513, 4096), jnp.bfloat16), ((1, 7), jnp.bfloat16), ((8, 64), jnp.float16), ((0, 64), None)):
        with pytest.raises(NotImplementedError, match="sums of"):
            cuda.macros_of(x(*shape, dtype=dtype or jnp.bfloat16), 2, residual=False)
    assert cuda.macros_of(x(1, 8192), 2, residual=True, eps=1e-5, clusters=1)["THREADS"] == 1024
    for shape, dtype in (((1, 8200), jnp.bfloat16), ((8, 68), jnp.bfloat16), ((8, 64), jnp.float32)):
        with pytest.raises(NotImplementedError, match="the norm of rows"):
            cuda.macros_of(x(*shape, dtype=dtype), 2, residual=False, eps=1e-5)
    with pytest.raises(NotImplementedError, match="2049 rows"):
        cuda.macros_of(x(2049, 64), 2, residual=False, eps=1e-5)
    with pytest.raises(NotImplementedError, match="residual"):
        cuda.run(x(8, 64), x(1, 64), x(6), 2)  # type: ignore[arg-type]
    for ranks in (2, 3, 4, 6, 8):
        assert cuda.limit(ranks) > 512 << 10
        # Two phases of two shots' places of 16 bytes, one of each sender.
        places = 4 * ranks * cuda.slots(ranks) * cuda.SLOT * 16
        for numbered in (False, True):
            assert cuda.memory_bytes(ranks, numbered) == cuda.counter_bytes(ranks) + places * (1 + numbered)
    with pytest.raises(NotImplementedError, match="rows of"):
        cuda.macros_of(x(6, 64), 4, residual=False, kernel=cuda.SCATTER)
    with pytest.raises(NotImplementedError, match="sums of"):
        cuda.macros_of(x(520, 4096), 4, residual=False, kernel=cuda.GATHER)
    with pytest.raises(NotImplementedError, match="not measured"):
        cuda.gather(x(8, 64), x(6), 5)  # type: ignore[arg-type]
    assert cuda.shots_of(4 << 20, 2) == 1


def test_two_shots_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TWO_SHOTS", {4: 256 << 10})
    x = jax.ShapeDtypeStruct((64, 8192), jnp.bfloat16)
    for asked, ways in (("", (1, 2, 1)), ("+two_shots", (1, 2, 2))):
        monkeypatch.setenv("JAXLLM_CUDA", asked)
        assert tuple(cuda.shots_of(1 << 20, ranks) for ranks in (2, 4, 8)) == ways
        macros = cuda.macros_of(x, 8, residual=True, eps=1e-5)
        assert macros["CLUSTER"] == (8 if asked else 1)
    assert cuda.cluster_of(1024, 8) == 8 and cuda.cluster_of(512, 8) == 4 and cuda.cluster_of(640, 8) == 1


@pytest.mark.parametrize("vocab", [40, EXACT + 4])
def test_greedy_over_an_exchange(vocab: int) -> None:
    """The likeliest tokens, ties to the lowest; where a float cannot hold a token's number, by collectives."""
    mesh, used = make_mesh(Mapping(tp=4)), []

    def add_up(x, residual, group, ranks, norm=None):
        used.append(x.shape)
        return jax.lax.psum(x, "tp"), None

    def step(logits_RV: jax.Array, group: jax.Array) -> jax.Array:
        with exchanging(Exchange(group, ("tp",), add_up)):
            return greedy(logits_RV, ("ep", "tp"))

    group = jnp.zeros((4, 6), jnp.uint32)
    specs = (P(None, "tp"), P(mesh.axis_names))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    if vocab > EXACT:
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((1, vocab), jnp.float32), group)
        assert not used
        return
    logits = np.random.default_rng(0).integers(-9, 9, (3, vocab)).astype(np.float32)
    np.testing.assert_array_equal(mapped(jnp.asarray(logits), group), logits.argmax(1))
    assert used == [(4, 8)]


def test_no_group_on_a_cpu() -> None:
    assert api.Group.open(make_mesh(Mapping(tp=4)), ("ep", "tp")) is None


@pytest.mark.parametrize(("refuses", "later"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("axes", [("ep", "tp"), ("tp", "cp", "ep"), ("tp",)])
def test_sums_take_the_exchange_of_their_axes(axes: tuple[str, ...], refuses: bool, later: bool) -> None:
    """On fake devices: whatever adds up, the result is the sum and the residual."""
    mesh, used = make_mesh(Mapping(tp=2, ep=2)), []

    def add_up(x, residual, group, ranks, norm=None):
        if refuses:
            raise NotImplementedError("too large")
        used.append(ranks)
        parts = jax.lax.all_gather(x, ("ep", "tp"))
        out = reference.all_reduce(parts, residual) + (group[0, 0] - group[0, 0]).astype(x.dtype)
        return out, None if norm is None else rms_norm(out, norm)

    def step(x_TD: jax.Array, residual_TD: jax.Array, group: jax.Array) -> jax.Array:
        with exchanging(Exchange(group, ("ep", "tp"), add_up)):
            if later:
                stream = sum_later(x_TD[0, 0], axes, (), residual_TD)
                assert isinstance(stream, Unsummed) == (axes != ("tp",))
                out, normed = settle(stream, (jnp.ones(8), 1e-5))
                assert (normed is None) == (not used)
                return out
            return sum_partial(x_TD[0, 0], axes, (), residual_TD)

    x = jnp.arange(2 * 2 * 3 * 8.0).reshape(2, 2, 3, 8)
    residual = jnp.arange(24.0).reshape(3, 8)
    group = jnp.arange(4 * 6, dtype=jnp.uint32).reshape(4, 6)
    specs = (P("ep", "tp"), P(), P(mesh.axis_names))
    out = P("ep") if axes == ("tp",) else P()
    found = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(x, residual, group)
    wanted = x.sum(axis=1) + residual if axes == ("tp",) else x.sum(axis=(0, 1)) + residual
    np.testing.assert_array_equal(found, wanted.reshape(found.shape))
    assert used == ([] if refuses or axes == ("tp",) else [4])
