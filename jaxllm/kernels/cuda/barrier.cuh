// Barriers in shared memory, of 8 bytes, between the threads of a block: "mbarrier" in the PTX
// ISA. Under JAXLLM_EMULATE the same names come from the emulator of the tests.
#pragma once
#include "ptx.cuh"

#ifdef JAXLLM_EMULATE
#include "barrier_on_cpu.h"
#else

// A barrier in shared memory that `count` arrivals complete, time after time. Its uses count as phases: 0, 1, 0, 1...
DEVICE void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialised barriers known to all; then comes __syncthreads().
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase last until `bytes` more have come to it.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives once this thread's copies so far (cp_async_16) have landed. Products see them after `fence_products` of those
// who wait.
DEVICE void cp_async_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
DEVICE bool barrier_ended(u32 barrier, u32 phase) {
  u32 ended;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(phase)
      : "memory");
  return ended;
}
// The same, and at once.
DEVICE bool barrier_ended_now(u32 barrier, u32 phase) {
  u32 ended;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(phase)
      : "memory");
  return ended;
}
DEVICE u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
// Waits for the end of the phase; that before the first counts as ended, and is 1. After ten seconds the kernel fails:
// an error can be told from slowness, and a wait that never ends cannot.
DEVICE void barrier_wait(u32 barrier, u32 phase) {
  if (barrier_ended(barrier, phase)) return;
  const u64 began = nanoseconds();
  while (!barrier_ended(barrier, phase))
    if (nanoseconds() - began > 10000000000ull) asm volatile("trap;");
}

#endif
