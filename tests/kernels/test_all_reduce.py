"""Sums over ranks that write to each other's memory: the kernel in emulators, a thread for each rank; its choice."""

from __future__ import annotations

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
from jaxllm.mapping import Mapping
from jaxllm.parallel.collectives import Exchange, exchanging, sum_partial
from jaxllm.parallel.mesh import make_mesh
from tests.kernels.emulator.emulator import Kernels

THREADS, BLOCKS = 16, 4
SETS = 2
pytestmark = pytest.mark.timeout(60)


class Ranks:
    """The memory of some ranks, and what each is told of it."""

    def __init__(self, count: int):
        self.count = count
        size = 128 + SETS * count * BLOCKS * 2 * THREADS * 16
        self.memory = [np.zeros(size + 16, np.uint8) for _ in range(count)]
        self.word = np.zeros(1, np.uint32)
        at = [-(-m.ctypes.data // 16) * 16 for m in self.memory]
        self.groups = [
            np.array([*np.roll(at, -rank), rank, self.word.ctypes.data], np.uint64).view(np.uint32)
            for rank in range(count)
        ]
        self.kernels: dict[tuple, Kernels] = {}

    def kernel(self, rank: int, x: np.ndarray, residual: bool, timeout_ms: int) -> Kernels:
        key = rank, x.nbytes, x.dtype, residual
        if key not in self.kernels:
            macros = cuda.macros_of(jnp.asarray(x), self.count, residual=residual, timeout_ms=timeout_ms)
            macros |= {"THREADS": THREADS, "BLOCKS": BLOCKS, "CLUSTER": self.grid(x)}
            self.kernels[key] = Kernels(rtc.SOURCES / "all_reduce.cu", macros, own=True)
        return self.kernels[key]

    @staticmethod
    def grid(x: np.ndarray) -> int:
        return -(-x.nbytes // (16 * THREADS))

    def run(self, rank: int, x: np.ndarray, residual: np.ndarray | None, seed: int, timeout_ms: int) -> np.ndarray:
        kernel = self.kernel(rank, x, residual is not None, timeout_ms)
        arguments = [x, x if residual is None else residual, self.groups[rank]]
        results = [(x.shape, x.dtype)]
        (out,) = kernel.run(
            "all_reduce", arguments, results, grid=(self.grid(x),), threads=THREADS, shared=16, seed=seed
        )
        return out


@pytest.mark.parametrize("count", [2, 3, 4])
def test_kernel_equals_reference(count: int) -> None:
    """Sums of several sizes in a row, the ranks as far apart as they get; all have the same bits."""
    ranks, rng = Ranks(count), np.random.default_rng(count)
    # Of one block that is not full; and of four, the last one not full.
    sizes = [(jnp.bfloat16, 8 * count, True), (np.float32, 252, False)]
    work = []
    for number in range(15):
        dtype, size, residual = sizes[number % 2] if number < 4 else sizes[rng.integers(2)]
        parts = rng.standard_normal((count, size)).astype(dtype)
        work.append((parts, rng.standard_normal(size).astype(dtype) if residual else None))
    for rank in range(count):  # built by one thread
        for parts, residual in work:
            ranks.kernel(rank, parts[rank], residual is not None, 20_000)

    def one(rank: int) -> list[np.ndarray]:
        chance = random.Random(rank)
        out = []
        for number, (parts, residual) in enumerate(work):
            time.sleep(chance.choice((0, 0, 0.005)))
            out.append(ranks.run(rank, parts[rank], residual, 7 * number + rank, 20_000))
        return out

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(one, range(count)))
    assert not ranks.word[0]
    for number, (parts, residual) in enumerate(work):
        wanted = reference.all_reduce(jnp.asarray(parts), None if residual is None else jnp.asarray(residual))
        for rank in range(count):
            np.testing.assert_array_equal(found[rank][number], np.asarray(wanted), f"sum {number} on rank {rank}")


def test_numbers_begin_anew() -> None:
    """After 2**32 sums, with the other phase, and never 0, which is what memory begins with."""
    ranks = Ranks(2)
    for memory in ranks.memory:
        at = -memory.ctypes.data % 16
        memory[at : at + 4 * BLOCKS].view(np.uint32)[:] = 2**32 - 3
    x = np.arange(252, dtype=np.float32)
    for rank in range(2):
        ranks.kernel(rank, x, False, 20_000)

    def one(rank: int) -> list[np.ndarray]:
        return [ranks.run(rank, x * (n + rank), None, n, 20_000) for n in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(one, range(2)):
            for n in range(5):
                np.testing.assert_array_equal(found[n], x * (2 * n + 1))


def test_nobody_waits_for_ever() -> None:
    """Two of three ranks: NaNs, and the word says so; whoever comes later gives up at once."""
    ranks = Ranks(3)
    x = np.ones(64, jnp.bfloat16)
    for rank in range(3):
        ranks.kernel(rank, x, False, 500)
    began = time.monotonic()
    results: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda r=rank: results.update({r: ranks.run(r, x, None, r, 500)})) for rank in (0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.4 < time.monotonic() - began < 20
    assert ranks.word[0] in (1, 3)
    assert all(np.isnan(out.astype(np.float32)).all() for out in results.values())
    again = ranks.run(0, x, None, 0, 500)
    assert np.isnan(again.astype(np.float32)).all()


def test_only_what_the_kernel_can_do() -> None:
    x = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    assert cuda.macros_of(x(256, 4096), 2, residual=True)["UNITS"] == 131072
    for shape, dtype in (((257, 4096), jnp.bfloat16), ((1, 7), jnp.bfloat16), ((8, 64), jnp.float16), ((0, 64), None)):
        with pytest.raises(NotImplementedError, match="sums of"):
            cuda.macros_of(x(*shape, dtype=dtype or jnp.bfloat16), 2, residual=False)
    with pytest.raises(NotImplementedError, match="residual"):
        cuda.run(x(8, 64), x(1, 64), x(6), 2)  # type: ignore[arg-type]
    for ranks in (2, 3, 4, 6, 8):
        assert cuda.limit(ranks) == cuda.blocks(ranks) * cuda.THREADS * cuda.UNIT > 256 << 10


def test_no_group_on_a_cpu() -> None:
    assert api.Group.open(make_mesh(Mapping(tp=4)), ("ep", "tp")) is None


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("axes", [("ep", "tp"), ("tp", "cp", "ep"), ("tp",)])
def test_sums_take_the_exchange_of_their_axes(axes: tuple[str, ...], refuses: bool) -> None:
    """On fake devices: whatever adds up, the result is the sum and the residual."""
    mesh, used = make_mesh(Mapping(tp=2, ep=2)), []

    def add_up(x: jax.Array, residual: jax.Array | None, group: jax.Array, ranks: int) -> jax.Array:
        if refuses:
            raise NotImplementedError("too large")
        used.append(ranks)
        parts = jax.lax.all_gather(x, ("ep", "tp"))
        return reference.all_reduce(parts, residual) + (group[0, 0] - group[0, 0]).astype(x.dtype)

    def step(x_TD: jax.Array, residual_TD: jax.Array, group: jax.Array) -> jax.Array:
        with exchanging(Exchange(group, ("ep", "tp"), add_up)):
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
