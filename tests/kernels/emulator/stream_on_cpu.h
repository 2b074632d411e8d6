// What stream.cuh has, on a CPU: see cuda_on_cpu.h; and CUDA's words for bits and for reductions of a warp.
#pragma once

inline uint4 load_kept(const void* p) {
  if ((u64)p % 16) emulator::fail("load: unaligned address in global memory");
  emulator::check_global(p, 16, "load");
  return *(const uint4*)p;
}
inline uint4 load_streamed(const void* p) { return load_kept(p); }

inline int __ffsll(u64 x) { return __builtin_ffsll((long long)x); }
inline u32 __reduce_max_sync(u32 mask, u32 x) {
  for (int by = 16; by; by /= 2) x = std::max(x, __shfl_xor_sync(mask, x, by));
  return x;
}
inline u32 __reduce_min_sync(u32 mask, u32 x) {
  for (int by = 16; by; by /= 2) x = std::min(x, __shfl_xor_sync(mask, x, by));
  return x;
}
