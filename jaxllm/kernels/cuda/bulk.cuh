// Copies of whole rows by the copy engine, the barriers in shared memory that they complete on ("mbarrier"), and what
// the blocks of a cluster share. Under JAXLLM_EMULATE the same names come from the emulator of the tests.
#pragma once
#include "ptx.cuh"

#ifdef JAXLLM_EMULATE
#include "bulk_on_cpu.h"
#else

// A barrier is 8 bytes. A phase ends when `count` arrivals and all bytes that were announced have come.
DEVICE void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the inits, before other threads (after a block barrier) and the copy engine use them.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies will bring in the same phase.
DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of a phase: 0 for the first, 1 for the second, 0 for the third, ...
DEVICE void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n"
      "}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// How the second-level cache treats what is read once.
DEVICE u64 read_once() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Copies bytes from global to shared memory; they count on `barrier`. Addresses and bytes are multiples of 16.
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// What fused multiply-add does, on two bf16 in a word, rounded once.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// After __launch_bounds__: the kernel's blocks come in clusters of 1, 2 or 4.
#define CLUSTER_OF_1
#define CLUSTER_OF_2 __cluster_dims__(2, 1, 1)
#define CLUSTER_OF_4 __cluster_dims__(4, 1, 1)
#define CLUSTER_JOIN(a, b) a##b
#define CLUSTER_OF(blocks) CLUSTER_JOIN(CLUSTER_OF_, blocks)
// A barrier of all threads of a cluster, which sees what each wrote to shared memory before it.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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
