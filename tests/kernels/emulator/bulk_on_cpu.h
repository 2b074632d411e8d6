// What bulk.cuh has, on a CPU: see cuda_on_cpu.h.
#pragma once

namespace emulator {

extern std::vector<u8*> shared_of_blocks;  // of the cluster
extern Meeting cluster_barrier;
u32 live_threads_of_cluster();

}  // namespace emulator

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
