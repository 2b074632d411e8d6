// What the blocks of a cluster share, and help for kernels that read weights at the speed of memory. Under JAXLLM_EMULATE
// the same names come from the emulator of the tests.
#pragma once
#include "barrier.cuh"

#ifdef JAXLLM_EMULATE
#include "cluster_on_cpu.h"
#else

// As cp_async_16; the second-level cache is told to fetch the 256 bytes around them.
DEVICE void cp_async_16_ahead(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// As cp_async_16, of what nobody reads again: in the second-level cache it makes room first. by: of `read_once`.
DEVICE u64 read_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void cp_async_16_once(u32 to, const void* from, u64 by) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(by) : "memory");
}
// Lets the second-level cache fetch the 128 bytes around what will be read.
DEVICE void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
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
// That all threads of the cluster have started, in two halves, for work between them; it orders no writes but those of
// `barrier_init_fence`.
DEVICE void cluster_started() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
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
// The same for four floats; the address is a multiple of 16.
DEVICE void cluster_store_4(u32 address, u32 rank, float4 v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
      "}" ::"r"(address),
      "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
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

// Sends four floats to the place in the shared memory of block `rank` that `address`, a multiple of 16, is in this
// block's, and tells the barrier (barrier.cuh) there of 16 bytes. That block must have started, and not have ended before
// they come. Who waits for the barrier with `cluster_barrier_wait` sees them.
DEVICE void cluster_send_4(u32 address, u32 barrier, u32 rank, float4 v) {
  asm volatile(
      "{\n"
      ".reg .b32 there, told;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 told, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [told];\n"
      "}" ::"r"(address),
      "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}
// Copies `bytes`, a multiple of 16, that lie together in global memory to the same place in the shared memory of every
// block of the cluster whose bit of `blocks` is set, and tells the barrier that is at `barrier` in each of these of so many
// bytes. All of them must have started. Products see what has come without `fence_products`.
DEVICE void copy_to_blocks(u32 to, const void* from, u32 bytes, u32 barrier, u32 blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"((u16)blocks)
      : "memory");
}
// Copies `bytes`, a multiple of 16, that lie together in global memory and that nobody reads again, and tells the barrier of
// so many bytes. by: of `read_once`.
DEVICE void copy_once(u32 to, const void* from, u32 bytes, u32 barrier, u64 by) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(by)
      : "memory");
}
// Arrives at the barrier in the shared memory of block `rank` that is at `barrier` in this block's. That block must have
// started, and not have ended. It says that what was there has been read: no writes are ordered by it.
DEVICE void cluster_arrive(u32 barrier, u32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
DEVICE bool cluster_barrier_ended(u32 barrier, u32 phase) {
  u32 ended;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(phase)
      : "memory");
  return ended;
}
// As `barrier_wait`.
DEVICE void cluster_barrier_wait(u32 barrier, u32 phase) {
  if (cluster_barrier_ended(barrier, phase)) return;
  const u64 began = nanoseconds();
  while (!cluster_barrier_ended(barrier, phase))
    if (nanoseconds() - began > 10000000000ull) asm volatile("trap;");
}

#endif
