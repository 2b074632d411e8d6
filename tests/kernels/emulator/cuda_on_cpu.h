// Runs CUDA C++ kernels on a CPU, one block (or cluster of blocks) after the other, so that the very source of a kernel is tested without a GPU.
//
// Each thread of a block is a fiber with a stack of its own, and runs until it has to wait for others. What the threads
// of a warp do together (shuffles, matrix instructions) is done by the last of them to come. Which fiber runs next is
// drawn at random, so that what only works in one order of the threads soon fails. Found and told as errors:
//   - shared memory that is read before it is written: it begins as NaNs
//   - asynchronous copies that are read before they were waited for: they land when they are waited for, or (with every
//     other seed) when they are issued, which finds memory that is overwritten while another thread still needs it
//   - barriers and warp instructions that some of the threads never reach
//   - accesses outside of the arguments: each lies against a page that cannot be touched
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#define DEVICE inline
#define DYNAMIC_SHARED(name) u8* name = emulator::shared
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const

struct dim3 { u32 x, y, z; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Copy { u8* to; const u8* from; u32 bytes, size; };

struct Thread {
  dim3 index;
  u32 number;                       // in its block, and after those of the blocks before in its cluster
  u32 block;                        // in its cluster
  void* stack;                      // where it goes on, while it does not run
  const u64* waits_for = nullptr;   // not ready while this is still `seen`
  u64 seen = 0;
  const char* at = "";              // what it waits at
  bool done = false;
  bool lets_others_run = false;     // polls memory that something else may write
  std::vector<Copy> open;           // copies issued and not yet committed
  std::deque<std::vector<Copy>> groups;
  bool unfenced = false;            // copies landed that products of other threads may not see yet
  u64 cluster_seen = 0;             // generation of the cluster's barrier when the thread arrived
};

// A meeting of threads: all of them give something, and the last one does the work.
struct Meeting {
  u64 generation = 0;
  u32 arrived = 0;                  // how many
  u32 lanes = 0;                    // which, in a warp
  const char* what = nullptr;
  void* given[32] = {};
  std::vector<std::function<void()>> open_products;  // of a warp, issued and not yet committed
  std::deque<std::vector<std::function<void()>>> products;
};

extern Thread* current;
extern dim3 block_index, block_size, grid_size;
extern u8* shared;                  // the block's dynamic shared memory
extern u32 shared_bytes;
extern bool eager;                  // copies land when they are issued
extern std::vector<Meeting> warps;
extern Meeting* barriers;           // the block's 16
u32 live_threads();

[[noreturn]] void fail(const std::string& what);
void wait_until_changed(const u64* value, const char* at);
// Other warps run before the thread goes on.
void let_others_run();
// Fails unless [p, p + bytes) is in one of the kernel's arguments.
void check_global(const void* p, u32 bytes, const char* what);

inline u32 lane() { return current->number % 32; }

// Meets the lanes of `mask`; the last to come calls work(given), with what each lane gave by its number.
template <class Work>
void meet(const char* what, u32 mask, void* mine, Work work) {
  Meeting& warp = warps[current->number / 32];
  if (!(mask >> lane() & 1)) fail(std::string(what) + ": the lane is not in its own mask");
  if (warp.arrived && warp.what != what)
    fail(std::string("lanes of a warp are at different instructions: ") + what + " and " + warp.what);
  warp.what = what;
  warp.given[lane()] = mine;
  warp.lanes |= 1u << lane();
  if (++warp.arrived == (u32)__builtin_popcount(mask)) {
    if (warp.lanes != mask) fail(std::string(what) + ": not the lanes of its mask");
    work(warp.given);
    warp.arrived = warp.lanes = 0;
    ++warp.generation;
  } else {
    wait_until_changed(&warp.generation, what);
  }
}

inline u8* shared_pointer(u32 address, u32 bytes, const char* what) {
  if (address % std::min(bytes, 16u)) fail(std::string(what) + ": unaligned address in shared memory");
  if ((u64)address + bytes > shared_bytes) fail(std::string(what) + ": outside of shared memory");
  return shared + address;
}

inline void land(std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    std::memcpy(c.to, c.from, c.bytes);
    std::memset(c.to + c.bytes, 0, c.size - c.bytes);
  }
  if (!copies.empty()) current->unfenced = true;
  copies.clear();
}

inline float from_f16(u16 bits) { _Float16 x; std::memcpy(&x, &bits, 2); return (float)x; }
inline u16 to_f16(float x) { _Float16 y = (_Float16)x; u16 bits; std::memcpy(&bits, &y, 2); return bits; }
inline float from_bf16(u16 bits) { u32 word = (u32)bits << 16; float x; std::memcpy(&x, &word, 4); return x; }
inline u16 to_bf16(float x) {
  u32 word;
  std::memcpy(&word, &x, 4);
  if (x != x) return 0x7fff;
  return (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline float from_e4m3(u8 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float sign = bits & 0x80 ? -1.f : 1.f;
  if (exponent == 15 && mantissa == 7) return NAN;
  return sign * (exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9));
}
inline u8 to_e4m3(float x) {  // to nearest even, saturating
  if (x != x) return 0x7f;
  u8 best = 0;
  const float size = std::min(std::fabs(x), 448.f);
  for (u8 code = 0; code < 0x7f; ++code) {
    const float there = std::fabs(from_e4m3(code) - size), here = std::fabs(from_e4m3(best) - size);
    if (there < here || (there == here && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}

struct Mma { float* c; const u32* a; u32 b[2]; };

template <float (*decode)(u16)>
void mma(const char* what, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  Mma mine{c, a, {b0, b1}};
  meet(what, ~0u, &mine, [](void** given) {
    float A[16][16], B[16][8];
    auto half = [](u32 word, int i) { return decode((u16)(word >> (16 * i))); };
    for (int l = 0; l < 32; ++l) {
      const Mma& m = *(Mma*)given[l];
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < 4; ++part)
          A[l / 4 + part % 2 * 8][l % 4 * 2 + i + part / 2 * 8] = half(m.a[part], i);
        for (int part = 0; part < 2; ++part) B[l % 4 * 2 + i + part * 8][l / 4] = half(m.b[part], i);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int part = 0; part < 4; ++part) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += A[l / 4 + part / 2 * 8][k] * B[k][l % 4 * 2 + part % 2];
        ((Mma*)given[l])->c[part] += sum;
      }
  });
}

struct Rows { u32* r; u32 address; };

inline void ldmatrix(const char* what, u32 (&r)[4], u32 address, bool transposed) {
  Rows mine{r, address};
  meet(what, ~0u, &mine, [&](void** given) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      u16 element[8][8];
      for (int row = 0; row < 8; ++row)
        std::memcpy(element[row], shared_pointer(((Rows*)given[matrix * 8 + row])->address, 16, what), 16);
      for (int l = 0; l < 32; ++l) {
        const int row = l / 4, column = l % 4 * 2;
        const u32 low = transposed ? element[column][row] : element[row][column];
        const u32 high = transposed ? element[column + 1][row] : element[row][column + 1];
        ((Rows*)given[l])->r[matrix] = low | high << 16;
      }
    }
  });
}

template <class T, class Source>
T shuffle(const char* what, u32 mask, T value, Source source_of) {
  struct Given { T value, result; int source; } mine{value, value, source_of((int)lane())};
  meet(what, mask, &mine, [&](void** given) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Given& g = *(Given*)given[l];
      if (g.source < 0 || g.source > 31) continue;  // keeps its own
      if (!(mask >> g.source & 1)) fail(std::string(what) + ": from a lane outside of its mask");
      g.result = ((Given*)given[g.source])->value;
    }
  });
  return mine.result;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

// Barrier number `id` for `count` threads.
inline void named_barrier(u32 id, u32 count) {
  emulator::Meeting& b = emulator::barriers[id];
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.generation;
  } else {
    emulator::wait_until_changed(&b.generation, "barrier");
  }
}
inline void __syncthreads() { named_barrier(0, emulator::live_threads()); }
inline void __syncwarp(u32 mask = ~0u) { emulator::meet("__syncwarp", mask, nullptr, [](void**) {}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __ldcg(const T* p) { return *p; }

template <class T> T __shfl_xor_sync(u32 mask, T x, int bits) {
  return emulator::shuffle("__shfl_xor_sync", mask, x, [=](int l) { return l ^ bits; });
}
template <class T> T __shfl_sync(u32 mask, T x, int source) {
  return emulator::shuffle("__shfl_sync", mask, x, [=](int) { return source & 31; });
}
template <class T> T __shfl_up_sync(u32 mask, T x, u32 by) {
  return emulator::shuffle("__shfl_up_sync", mask, x, [=](int l) { return l - (int)by; });
}
template <class T> T __shfl_down_sync(u32 mask, T x, u32 by) {
  return emulator::shuffle("__shfl_down_sync", mask, x, [=](int l) { return l + (int)by; });
}
inline u32 __ballot_sync(u32 mask, int predicate) {
  struct Given { int predicate; u32 result; } mine{predicate, 0};
  emulator::meet("__ballot_sync", mask, &mine, [=](void** given) {
    u32 result = 0;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) result |= (((Given*)given[l])->predicate ? 1u : 0u) << l;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) ((Given*)given[l])->result = result;
  });
  return mine.result;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T> T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
template <class T> T atomicExch(T* p, T x) { T old = *p; *p = x; return old; }
template <class T> T __ldg(const T* p) { return *p; }

using std::max;
using std::min;
inline float __uint_as_float(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
inline u32 __float_as_uint(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float((u32)x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline u32 shared_address(const void* p) { return (u32)((const u8*)p - emulator::shared); }

template <u32 SIZE>
void copy_later(const char* what, u32 to, const void* from, u32 bytes) {
  if (bytes != 0 && bytes != SIZE) emulator::fail(std::string(what) + ": reads nothing or all");
  if ((u64)from % SIZE) emulator::fail(std::string(what) + ": unaligned address in global memory");
  if (bytes) emulator::check_global(from, bytes, what);
  u8* target = emulator::shared_pointer(to, SIZE, what);
  std::vector<emulator::Copy> now{{target, (const u8*)from, bytes, SIZE}};
  if (emulator::eager) return emulator::land(now);
  std::memset(target, 0xff, SIZE);  // what was there may be gone from now on
  emulator::current->open.push_back(now[0]);
}
inline void cp_async_16(u32 to, const void* from, u32 bytes) { copy_later<16>("cp_async_16", to, from, bytes); }
inline void cp_async_4(u32 to, const void* from, u32 bytes) { copy_later<4>("cp_async_4", to, from, bytes); }
inline void cp_async_commit() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int N> void cp_async_wait() {
  auto& groups = emulator::current->groups;
  while (groups.size() > N) {
    emulator::land(groups.front());
    groups.pop_front();
  }
}

inline void ldmatrix_x4(u32 (&r)[4], u32 address) { emulator::ldmatrix("ldmatrix_x4", r, address, false); }
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 address) { emulator::ldmatrix("ldmatrix_x4_trans", r, address, true); }
inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::mma<emulator::from_bf16>("mma_bf16", c, a, b0, b1);
}
inline void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::mma<emulator::from_f16>("mma_f16", c, a, b0, b1);
}

inline u32 pack_bf16(float low, float high) { return emulator::to_bf16(low) | (u32)emulator::to_bf16(high) << 16; }
inline u32 pack_f16(float low, float high) { return emulator::to_f16(low) | (u32)emulator::to_f16(high) << 16; }
inline u32 e4m3_to_f16(u16 pair) {
  return pack_f16(emulator::from_e4m3((u8)pair), emulator::from_e4m3((u8)(pair >> 8)));
}
inline u16 pack_e4m3(float low, float high) { return emulator::to_e4m3(low) | (u16)emulator::to_e4m3(high) << 8; }
inline u32 multiply_bf16(u32 a, u32 b) {
  auto half = [](u32 x, int i) { return emulator::from_bf16((u16)(x >> 16 * i)); };
  return pack_bf16(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
}
inline u32 select_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = a | (u64)b << 32;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1.f / x; }
