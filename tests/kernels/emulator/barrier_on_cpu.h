// What barrier.cuh has, on a CPU: see cuda_on_cpu.h. A barrier keeps its state in its 8 bytes of shared memory.
//
// Bulk copies land when somebody waits for their barrier, or (with every other seed) when they are issued.
#pragma once

#include <map>

namespace emulator {

struct BulkCopy { u8* to; const u8* from; u32 bytes; };
// bytes, missing: still to come in this phase, which has `count` arrivals.
struct Barrier { int bytes; u32 missing : 12, count : 12, phase : 8; };
static_assert(sizeof(Barrier) == 8, "a barrier is 8 bytes");

extern std::map<const u8*, std::vector<BulkCopy>> bulk_copies;  // under way, by barrier

inline Barrier& barrier_at(u32 address, const char* what) {
  Barrier& b = *(Barrier*)shared_pointer(address, 8, what);
  if (b.count == 0 || b.count == 0xfff) fail(std::string(what) + ": the barrier was not initialised");
  return b;
}
inline void end_phase(Barrier& b) {
  if (b.missing || b.bytes) return;
  b.missing = b.count;
  b.phase ^= 1;
}
inline void arrive(Barrier& b, u32 bytes) {
  if (!b.missing) fail("barrier: more arrivals than it was initialised with");
  b.bytes += (int)bytes;
  --b.missing;
  end_phase(b);
}
inline void land(Barrier& b, const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  b.bytes -= (int)copy.bytes;
}

}  // namespace emulator

inline void barrier_init(u32 barrier, u32 count) {
  *(emulator::Barrier*)emulator::shared_pointer(barrier, 8, "barrier_init") = {0, count, count, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) {
  if (emulator::current->unfenced) emulator::fail("barrier_arrive: copies that products cannot see (fence_products)");
  emulator::arrive(emulator::barrier_at(barrier, "barrier_arrive"), 0);
}
inline void barrier_arrive_expect(u32 barrier, u32 bytes) {
  emulator::arrive(emulator::barrier_at(barrier, "barrier_arrive_expect"), bytes);
}
inline void barrier_wait(u32 barrier, u32 phase) {
  emulator::Barrier& b = emulator::barrier_at(barrier, "barrier_wait");
  while (b.phase == phase) {
    const auto found = emulator::bulk_copies.find((const u8*)&b);
    if (found != emulator::bulk_copies.end()) {
      for (const emulator::BulkCopy& copy : found->second) emulator::land(b, copy);
      emulator::bulk_copies.erase(found);
      emulator::end_phase(b);
    } else {
      emulator::wait_until_changed((const u64*)&b, "barrier_wait");
    }
  }
}
