"""The emulator computes what the instructions compute, and finds the mistakes that it says it finds."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.emulator.emulator import EmulatorError, Kernels

MATRIX = r"""
#include "ptx.cuh"
// One warp: c = a @ b for a [16, 16], b [16, 8] (b kept as it is, and kept transposed).
extern "C" __global__ void __launch_bounds__(32) multiply(
    const u16* a, const u16* b, const u16* bt, float* c, float* ct) {
  DYNAMIC_SHARED(s);
  const u32 lane = threadIdx.x, base = shared_address(s);
  cp_async_16(base + lane * 16, a + lane * 8, 16);
  if (lane < 16) cp_async_16(base + 512 + lane * 16, b + lane * 8, 16);
  if (lane < 16) cp_async_16(base + 768 + lane * 16, bt + lane * 8, 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  u32 fa[4], fb[4], fbt[4];
  ldmatrix_x4(fa, base + (lane % 16) * 32 + lane / 16 * 16);
  ldmatrix_x4_trans(fb, base + 512 + (lane % 16) * 16);
  ldmatrix_x4(fbt, base + 768 + (lane % 8) * 32 + lane / 8 % 2 * 16);
  float x[4] = {}, y[4] = {};
  mma_bf16(x, fa, fb[0], fb[1]);
  mma_bf16(y, fa, fbt[0], fbt[1]);
  for (int i = 0; i < 4; ++i) {
    const u32 at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    c[at] = x[i];
    ct[at] = y[i];
  }
}
"""

REVERSE = r"""
#include "ptx.cuh"
// Writes x backwards through shared memory. BARRIER, WAIT, LENGTH: what a kernel may get wrong.
extern "C" __global__ void __launch_bounds__(64) reverse(const float* x, float* y) {
  DYNAMIC_SHARED(s);
  const u32 i = threadIdx.x;
  if (i < 16) cp_async_16(shared_address(s) + i * 16, x + i * 4, 16);
  cp_async_commit();
  WAIT;
  BARRIER;
  y[LENGTH - 1 - i] = ((float*)s)[i];
}
"""

EXCHANGE = r"""
#include "barrier.cuh"
#include "cluster.cuh"
// Each of two blocks gives its half of x to the other. WAIT, START, SYNC, END: what a kernel may get wrong.
extern "C" __global__ void __launch_bounds__(64) CLUSTER_OF(CLUSTER) exchange(const float* x, float* y) {
  DYNAMIC_SHARED(s);
  const u32 i = threadIdx.x, rank = blockIdx.x % CLUSTER, bar = shared_address(s) + 512;
  if (i == 0) {
    barrier_init(bar, 2);
    barrier_init_fence();
  }
  __syncthreads();
  START;
  if (i == 40)
    for (u32 j = 0; j < 64; j++) ((float*)s)[j] = x[blockIdx.x * 64 + j];
  if (i == 0 || i == 40) barrier_arrive(bar);
  WAIT;
  cluster_store(shared_address(s) + 256 + i * 4, TARGET, -((float*)s)[i]);
  SYNC;
  y[blockIdx.x * 64 + i] = ((float*)s)[64 + i];
}
"""


def kernels(tmp_path, name, text, **macros) -> Kernels:
    path = tmp_path / f"{name}.cu"
    path.write_text(text)
    return Kernels(path, macros)


def test_matrix_instructions(tmp_path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((16, 16), (16, 8)))
    run = kernels(tmp_path, "multiply", MATRIX).run
    arguments = [a.view(np.uint16), b.view(np.uint16), np.ascontiguousarray(b.T).view(np.uint16)]
    for seed in range(4):
        found = run("multiply", arguments, [((16, 8), np.float32)] * 2, grid=(1,), threads=32, shared=1024, seed=seed)
        for c in found:
            np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-5)


GOOD = {"WAIT": "cp_async_wait<0>()", "BARRIER": "__syncthreads()", "LENGTH": 64}


def says(message: str | None) -> contextlib.AbstractContextManager[object]:
    """The emulator raises this, or nothing."""
    return contextlib.nullcontext() if message is None else pytest.raises(EmulatorError, match=message)


@pytest.mark.parametrize(
    ("wrong", "seed", "message"),
    [
        ({}, 0, None),
        ({}, 1, None),
        ({"BARRIER": ""}, 1, "wrong"),
        ({"BARRIER": "__syncwarp()"}, 1, "wrong"),
        ({"WAIT": ""}, 0, "ended with asynchronous copies under way"),
        ({"WAIT": "cp_async_wait<1>()"}, 0, "wrong|under way"),
        ({"LENGTH": 65}, 0, "access outside of the arguments"),
        ({"BARRIER": "if(i<32)__syncthreads();else named_barrier(1,64)"}, 0, "deadlock"),
        ({"BARRIER": "if(i%2)__syncwarp()"}, 0, "deadlock"),
    ],
    ids=str,
)
def test_mistakes_are_found(tmp_path, wrong, seed, message) -> None:
    x = np.arange(64, dtype=np.float32)
    built = kernels(tmp_path, "reverse", REVERSE, **{**GOOD, **wrong})

    with says(message):
        (y,) = built.run("reverse", [x], [((64,), np.float32)], grid=(1,), threads=64, shared=256, seed=seed)
        if not (y == x[::-1]).all():
            raise EmulatorError("wrong")


SOUND = {
    "WAIT": "barrier_wait(bar,0)",
    "START": "cluster_sync()",
    "SYNC": "cluster_sync()",
    "TARGET": "1-rank",
    "CLUSTER": 2,
}


@pytest.mark.parametrize(
    ("wrong", "seed", "message"),
    [
        ({}, 0, None),
        ({}, 1, None),
        ({"WAIT": ""}, 0, "wrong"),
        ({"WAIT": "barrier_wait(bar,0);barrier_wait(bar,1)"}, 0, "deadlock"),
        ({"START": ""}, 0, "may not have started"),
        ({"SYNC": "__syncthreads()"}, 0, "wrong"),
        ({"SYNC": "if(i<32)cluster_sync();else __syncthreads()"}, 0, "deadlock"),
        ({"WAIT": "barrier_wait(bar,0);if(rank)return;cluster_sync()"}, 0, "ended"),
        ({"TARGET": "rank+1"}, 0, "no such block"),
    ],
    ids=str,
)
def test_barriers_and_clusters(tmp_path, wrong, seed, message) -> None:
    x = np.arange(256, dtype=np.float32)
    built = kernels(tmp_path, "exchange", EXCHANGE, **{**SOUND, **wrong})

    with says(message):
        (y,) = built.run("exchange", [x], [((256,), np.float32)], grid=(4,), threads=64, shared=1024, seed=seed)
        if not (y.reshape(2, 2, 64) == -x.reshape(2, 2, 64)[:, ::-1]).all():
            raise EmulatorError("wrong")


def test_e4m3(tmp_path) -> None:
    """Against ml_dtypes, through a kernel that converts there and back."""
    text = r"""
    #include "ptx.cuh"
    extern "C" __global__ void __launch_bounds__(32) convert(const float* x, float* y) {
      const u32 i = threadIdx.x;
      const u32 two = e4m3_to_f16(pack_e4m3(x[2 * i], x[2 * i + 1]));
      y[2 * i] = emulator::from_f16((u16)two);
      y[2 * i + 1] = emulator::from_f16((u16)(two >> 16));
    }
    """
    x = np.concatenate([np.linspace(-500, 500, 40), np.geomspace(1e-4, 1, 24)]).astype(np.float32)
    (y,) = kernels(tmp_path, "convert", text).run("convert", [x], [(x.shape, np.float32)], grid=(1,), threads=32)
    wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(y, wanted)
