// What barrier.cuh has, on a CPU: see cuda_on_cpu.h. A barrier keeps its state in its 8 bytes of shared memory.
#pragma once

namespace emulator {

// missing: arrivals still to come in this phase, which has `count` of them, and `bytes` still to come (fewer than none, if
// they came before they were expected). copies: changes with arrivals of copies that will land; bulk: with bulk copies.
struct Barrier { int bytes : 22; u32 copies : 9, bulk : 1; u32 missing : 12, count : 12, phase : 8; };
static_assert(sizeof(Barrier) == 8, "a barrier is 8 bytes");

inline Barrier& barrier_at(u32 address, const char* what) {
  Barrier& b = *(Barrier*)shared_pointer(address, 8, what);
  if (b.count == 0 || b.count == 0xfff) fail(std::string(what) + ": the barrier was not initialised");
  return b;
}

// Copies that arrive at a barrier when they land, which is when somebody waits for it.
struct Landing { Barrier* barrier; std::vector<Copy> copies; u32 arrivals = 1; int bytes = 0; };
inline std::vector<Landing> landings;

inline void arrive(Barrier& b, u32 arrivals, int bytes) {
  if (arrivals > b.missing) fail("a barrier has more arrivals than it counts");
  b.missing -= arrivals;
  b.bytes += bytes;
  if (b.missing || b.bytes) return;
  b.missing = b.count;
  b.phase ^= 1;
}
inline void land_at(Barrier& b) {
  for (size_t i = 0; i < landings.size(); ++i)
    if (landings[i].barrier == &b) {
      Landing landing = std::move(landings[i]);
      landings.erase(landings.begin() + i--);
      const bool before = current->unfenced;
      land(landing.copies);
      current->unfenced = before;
      arrive(b, landing.arrivals, -landing.bytes);
    }
}

}  // namespace emulator

inline void barrier_init(u32 barrier, u32 count) {
  *(emulator::Barrier*)emulator::shared_pointer(barrier, 8, "barrier_init") = {0, 0, 0, count, count, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) {
  if (emulator::current->unfenced) emulator::fail("barrier_arrive: copies that products cannot see (fence_products)");
  emulator::arrive(emulator::barrier_at(barrier, "barrier_arrive"), 1, 0);
}
inline void barrier_expect(u32 barrier, u32 bytes) {
  emulator::arrive(emulator::barrier_at(barrier, "barrier_expect"), 1, (int)bytes);
}
inline void cp_async_arrive(u32 barrier) {
  emulator::Barrier& b = emulator::barrier_at(barrier, "cp_async_arrive");
  b.copies = b.copies % 511 + 1;  // and those who wait look again
  emulator::landings.push_back({&b, std::move(emulator::current->open)});
  emulator::current->open.clear();
  if (emulator::eager) emulator::land_at(b);
}
inline void barrier_wait(u32 barrier, u32 phase) {
  emulator::Barrier& b = emulator::barrier_at(barrier, "barrier_wait");
  while (b.phase == phase) {
    emulator::land_at(b);
    if (b.phase == phase) emulator::wait_until_changed((const u64*)&b, "barrier_wait");
  }
  if (b.copies) emulator::current->unfenced = true;
}
inline bool barrier_ended_now(u32 barrier, u32 phase) {
  emulator::Barrier& b = emulator::barrier_at(barrier, "barrier_ended_now");
  emulator::land_at(b);
  return b.phase != phase;
}
