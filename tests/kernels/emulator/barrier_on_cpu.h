// What barrier.cuh has, on a CPU: see cuda_on_cpu.h. A barrier keeps its state in its 8 bytes of shared memory.
#pragma once

namespace emulator {

// missing: arrivals still to come in this phase, which has `count` of them.
struct Barrier { u32 unused; u32 missing : 12, count : 12, phase : 8; };
static_assert(sizeof(Barrier) == 8, "a barrier is 8 bytes");

inline Barrier& barrier_at(u32 address, const char* what) {
  Barrier& b = *(Barrier*)shared_pointer(address, 8, what);
  if (b.count == 0 || b.count == 0xfff) fail(std::string(what) + ": the barrier was not initialised");
  return b;
}

}  // namespace emulator

inline void barrier_init(u32 barrier, u32 count) {
  *(emulator::Barrier*)emulator::shared_pointer(barrier, 8, "barrier_init") = {0, count, count, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) {
  if (emulator::current->unfenced) emulator::fail("barrier_arrive: copies that products cannot see (fence_products)");
  emulator::Barrier& b = emulator::barrier_at(barrier, "barrier_arrive");
  if (--b.missing) return;
  b.missing = b.count;
  b.phase ^= 1;
}
inline void barrier_wait(u32 barrier, u32 phase) {
  emulator::Barrier& b = emulator::barrier_at(barrier, "barrier_wait");
  while (b.phase == phase) emulator::wait_until_changed((const u64*)&b, "barrier_wait");
}
