// What the blocks of a cluster share, and help for kernels that read weights at the speed of memory. Under JAXLLM_EMULATE
// the same names come from the emulator of the tests.
#pragma once
#include "ptx.cuh"

#ifdef JAXLLM_EMULATE
#include "cluster_on_cpu.h"
#else

// As cp_async_16; the second-level cache is told to fetch the 256 bytes around them.
DEVICE void cp_async_16_ahead(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Lets the second-level cache fetch what another kernel will read; address and bytes are multiples of 16.
DEVICE void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// What fused multiply-add does, on two bf16 in a word, rounded once.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// After __launch_bounds__: the kernel's blocks come in clusters of 1, 2, 4 or 8.
#define CLUSTER_OF_1
#define CLUSTER_OF_2 __cluster_dims__(2, 1, 1)
#define CLUSTER_OF_4 __cluster_dims__(4, 1, 1)
#define CLUSTER_OF_8 __cluster_dims__(8, 1, 1)
#define CLUSTER_JOIN(a, b) a##b
#define CLUSTER_OF(blocks) CLUSTER_JOIN(CLUSTER_OF_, blocks)
// A barrier of all threads of a cluster, which sees what each wrote to shared memory before it.
DEVICE void cluster_sync() {
  __syncwarp();  // it wants whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes a float at the place in the shared memory of block `rank` that `address` is in this block's. That block must
// have started, and not have ended.
DEVICE void cluster_store(u32 address, u32 rank, float value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n"
      "}" ::"r"(address),
      "r"(rank), "f"(value)
      : "memory");
}
// Reads a float at the place in the shared memory of block `rank` that `address` is in this block's.
DEVICE float cluster_load(u32 address, u32 rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n"
      "}"
      : "=f"(value)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

#endif
