// What bulk.cuh has, on a CPU: see cuda_on_cpu.h. A barrier keeps its state in its 8 bytes of shared memory.
//
// Bulk copies land when somebody waits for their barrier, or (with every other seed) when they are issued.
#pragma once

#include <map>

namespace emulator {

struct BulkCopy { u8* to; const u8* from; u32 bytes; };
struct Barrier { int bytes; u16 arrivals; u8 count, phase; };  // still to come; `count` arrivals make a phase
static_assert(sizeof(Barrier) == 8, "a barrier is 8 bytes");

extern std::map<const u8*, std::vector<BulkCopy>> bulk_copies;  // under way, by barrier
extern std::vector<u8*> shared_of_blocks;                       // of the cluster
extern Meeting cluster_barrier;
u32 live_threads_of_cluster();

inline Barrier& barrier_at(u32 address, const char* what) {
  Barrier& b = *(Barrier*)shared_pointer(address, 8, what);
  if (b.count == 0xff) fail(std::string(what) + ": the barrier was not initialised");
  return b;
}
inline void end_phase(Barrier& b) {
  if (b.arrivals || b.bytes) return;
  b.arrivals = b.count;
  b.phase ^= 1;
}
inline void arrive(Barrier& b, u32 bytes) {
  if (!b.arrivals) fail("barrier: more arrivals than it was initialised with");
  b.bytes += (int)bytes;
  --b.arrivals;
  end_phase(b);
}
inline void land(Barrier& b, const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  b.bytes -= (int)copy.bytes;
}

}  // namespace emulator

inline void barrier_init(u32 barrier, u32 count) {
  *(emulator::Barrier*)emulator::shared_pointer(barrier, 8, "barrier_init") = {0, (u16)count, (u8)count, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) { emulator::arrive(emulator::barrier_at(barrier, "barrier_arrive"), 0); }
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

inline u64 read_once() { return 0; }
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  if (to % 16 || (u64)from % 16 || bytes % 16 || !bytes) emulator::fail("bulk_copy: not multiples of 16");
  if ((u64)to + bytes > emulator::shared_bytes) emulator::fail("bulk_copy: outside of shared memory");
  emulator::check_global(from, bytes, "bulk_copy");
  emulator::Barrier& b = emulator::barrier_at(barrier, "bulk_copy");
  const emulator::BulkCopy copy{emulator::shared + to, (const u8*)from, bytes};
  if (emulator::eager) {
    emulator::land(b, copy);
    return emulator::end_phase(b);
  }
  std::memset(copy.to, 0xff, bytes);  // what was there may be gone from now on
  emulator::bulk_copies[(const u8*)&b].push_back(copy);
}

inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (int i = 0; i < 32; i += 16) {
    auto half = [&](u32 word) { return (double)emulator::from_bf16((u16)(word >> i)); };
    out |= (u32)emulator::to_bf16((float)(half(a) * half(b) + half(c))) << i;
  }
  return out;
}

#define CLUSTER_OF(blocks)
inline void cluster_sync() {
  emulator::Meeting& b = emulator::cluster_barrier;
  if (++b.arrived == emulator::live_threads_of_cluster()) {
    b.arrived = 0;
    ++b.generation;
  } else {
    emulator::wait_until_changed(&b.generation, "cluster_sync");
  }
}
inline float cluster_load(u32 address, u32 rank) {
  if (rank >= emulator::shared_of_blocks.size()) emulator::fail("cluster_load: no such block");
  const u8* here = emulator::shared_pointer(address, 4, "cluster_load");
  float value;
  std::memcpy(&value, emulator::shared_of_blocks[rank] + (here - emulator::shared), 4);
  return value;
}
