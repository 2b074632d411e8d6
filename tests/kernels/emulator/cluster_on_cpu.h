// What cluster.cuh has, on a CPU: see cuda_on_cpu.h.
#pragma once

namespace emulator {

#ifdef CLUSTER
constexpr u32 BLOCKS_OF_CLUSTER = CLUSTER;
#else
constexpr u32 BLOCKS_OF_CLUSTER = 1;
#endif

extern std::vector<u8*> shared_of_blocks;  // of those that run at once: a cluster, or all
extern std::vector<Meeting> cluster_barriers;
u32 live_threads_of_cluster();
bool is_running(u32 block);

inline u32 own_rank() { return current->block % BLOCKS_OF_CLUSTER; }
inline Meeting& cluster_barrier() { return cluster_barriers[current->block / BLOCKS_OF_CLUSTER]; }

// The shared memory of a block of this one's cluster, which may be written to.
inline u8* shared_of(u32 rank, const char* what) {
  if (rank >= BLOCKS_OF_CLUSTER) fail(std::string(what) + ": no such block");
  const u32 block = current->block - own_rank() + rank;
  if (rank != own_rank() && !cluster_barrier().generation)
    fail(std::string(what) + ": to a block that may not have started");
  if (!is_running(block)) fail(std::string(what) + ": to a block that ended");
  return shared_of_blocks[block];
}

}  // namespace emulator

inline void cp_async_16_ahead(u32 to, const void* from, u32 bytes) { cp_async_16(to, from, bytes); }
inline u64 read_once() { return 0; }
inline void cp_async_16_once(u32 to, const void* from, u64) { cp_async_16(to, from, 16); }
inline void prefetch_line(const void* from) { emulator::check_global(from, 4, "prefetch_line"); }
inline void prefetch(const void* from, u32 bytes) {
  if ((u64)from % 16 || bytes % 16 || !bytes) emulator::fail("prefetch: not multiples of 16");
  emulator::check_global(from, bytes, "prefetch");
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
  emulator::Meeting& b = emulator::cluster_barrier();
  if (++b.arrived == emulator::live_threads_of_cluster()) {
    b.arrived = 0;
    ++b.generation;
  } else {
    emulator::wait_until_changed(&b.generation, "cluster_sync");
  }
}
inline void cluster_started() {
  emulator::Meeting& b = emulator::cluster_barrier();
  emulator::current->cluster_seen = b.generation;
  if (++b.arrived == emulator::live_threads_of_cluster()) {
    b.arrived = 0;
    ++b.generation;
  }
}
inline void cluster_wait() {
  emulator::Meeting& b = emulator::cluster_barrier();
  if (b.generation == emulator::current->cluster_seen) emulator::wait_until_changed(&b.generation, "cluster_wait");
}
inline void cluster_store(u32 address, u32 rank, float value) {
  emulator::shared_pointer(address, 4, "cluster_store");
  std::memcpy(emulator::shared_of(rank, "cluster_store") + address, &value, 4);
}
inline void cluster_store_4(u32 address, u32 rank, float4 v) {
  if (address % 16) emulator::fail("cluster_store_4: unaligned address");
  const float four[] = {v.x, v.y, v.z, v.w};
  for (u32 i = 0; i < 4; ++i) cluster_store(address + i * 4, rank, four[i]);
}
inline float cluster_load(u32 address, u32 rank) {
  if (rank >= emulator::BLOCKS_OF_CLUSTER) emulator::fail("cluster_load: no such block");
  emulator::shared_pointer(address, 4, "cluster_load");
  float value;
  std::memcpy(&value, emulator::shared_of_blocks[emulator::current->block - emulator::own_rank() + rank] + address, 4);
  return value;
}
inline void cluster_send_4(u32 address, u32 barrier, u32 rank, float4 v) {
  if (address % 16) emulator::fail("cluster_send_4: unaligned address");
  const float four[] = {v.x, v.y, v.z, v.w};
  for (u32 i = 0; i < 4; ++i) cluster_store(address + i * 4, rank, four[i]);
  emulator::shared_pointer(barrier, 8, "cluster_send_4");
  emulator::arrive(*(emulator::Barrier*)(emulator::shared_of(rank, "cluster_send_4") + barrier), 0, -16);
}
inline void copy_to_blocks(u32 to, const void* from, u32 bytes, u32 barrier, u32 blocks) {
  const char* const what = "copy_to_blocks";
  if (to % 16 || bytes % 16 || !bytes || (u64)from % 16) emulator::fail(std::string(what) + ": not multiples of 16");
  emulator::check_global(from, bytes, what);
  emulator::shared_pointer(to + bytes - 16, 16, what);
  emulator::shared_pointer(barrier, 8, what);
  if (!blocks || blocks >> emulator::BLOCKS_OF_CLUSTER) emulator::fail(std::string(what) + ": no such block");
  for (u32 rank = 0; rank < emulator::BLOCKS_OF_CLUSTER; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    u8* const there = emulator::shared_of(rank, what);
    emulator::Barrier& b = *(emulator::Barrier*)(there + barrier);
    if (!b.count || b.count == 0xfff) emulator::fail(std::string(what) + ": the barrier was not initialised");
    b.bulk ^= 1;  // and those who wait look again
    std::memset(there + to, 0xff, bytes);
    emulator::landings.push_back({&b, {{there + to, (const u8*)from, bytes, bytes}}, 0, (int)bytes});
    if (emulator::eager) emulator::land_at(b);
  }
}
inline void copy_once(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  copy_to_blocks(to, from, bytes, barrier, 1u << emulator::own_rank());
}
inline void cluster_arrive(u32 barrier, u32 rank) {
  emulator::shared_pointer(barrier, 8, "cluster_arrive");
  if (!emulator::cluster_barrier().generation) emulator::fail("cluster_arrive: at a block that may not have started");
  emulator::Barrier& b = *(emulator::Barrier*)(emulator::shared_of(rank, "cluster_arrive") + barrier);
  if (!b.count || b.count == 0xfff) emulator::fail("cluster_arrive: the barrier was not initialised");
  emulator::arrive(b, 1, 0);
}
inline void cluster_barrier_wait(u32 barrier, u32 phase) { barrier_wait(barrier, phase); }
