// What peer.cuh has, on a CPU: see cuda_on_cpu.h. The ranks are threads of the operating system, each with a copy of
// the library, that write to each other's memory.
#pragma once

#include <chrono>
#include <thread>

// Packets that this rank has sent; and it receives none before `*peer_other` is `peer_until`: what another has sent.
extern "C" {
u64 peer_sent = 0;
const u64* peer_other = nullptr;
u64 peer_until = 0;
}

inline void packet_send(void* to, u64 low, u64 high) {
  if ((u64)to % 16) emulator::fail("packet_send: unaligned address");
  __atomic_store_n((u64*)to, low, __ATOMIC_RELAXED);
  std::this_thread::yield();
  __atomic_store_n((u64*)to + 1, high, __ATOMIC_RELAXED);
  __atomic_add_fetch(&peer_sent, 1, __ATOMIC_RELEASE);
}
inline void packet_receive(const void* from, u64& low, u64& high) {
  while (peer_other && __atomic_load_n(peer_other, __ATOMIC_ACQUIRE) < peer_until) {
    std::this_thread::yield();
    emulator::let_others_run();
  }
  high = __atomic_load_n((const u64*)from + 1, __ATOMIC_RELAXED);
  low = __atomic_load_n((const u64*)from, __ATOMIC_RELAXED);
}
inline u32 load_shared_word(const u32* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_shared_word(u32* p, u32 x) { __atomic_store_n(p, x, __ATOMIC_RELAXED); }
inline u64 clock_nanoseconds() {
  return (u64)std::chrono::steady_clock::now().time_since_epoch().count();
}
inline void poll_again() {
  std::this_thread::yield();
  emulator::let_others_run();
}
