// A barrier of all blocks of a kernel, each of which must have a multiprocessor to itself: a grid of as many blocks as the
// GPU has multiprocessors, with so much shared memory that only one fits, while no other such kernel runs beside it.
// Under JAXLLM_EMULATE the same names come from the emulator of the tests.
//
// Each block has a word, which begins as 0. A block that comes to barrier n writes n there, and waits until all words are
// n or more: no atomics, which would be one after the other.
//
// What blocks tell one another must be read by `__ldcg`, from the second-level cache.
#pragma once
#include "barrier.cuh"

#ifndef PAUSE
#define PAUSE 0  // nanoseconds between looks at what is not told
#endif

#ifndef LITTLE
#define LITTLE 0
#endif

#ifdef JAXLLM_EMULATE
#include "grid_on_cpu.h"
#else

DEVICE void word_release(int* p, int x) { asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
DEVICE int word_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
// Of the multiprocessor's clock, modulo 2^32.
DEVICE u32 cycles() {
  u32 t;
  asm volatile("mov.u32 %0, %clock;" : "=r"(t)::"memory");
  return t;
}
// Waits for a word of at least x. After ten seconds the kernel fails, as barrier_wait; the clock is slow to read. It fails
// by a write to nowhere: beside a trap the assembler gives no warpgroup more registers than a block's threads begin with.
DEVICE void word_wait(const int* p, int x) {
  u64 began = 0;
  for (u32 polls = 1; word_acquire(p) < x; ++polls) {
    if (polls % 4096) continue;
    if (!began) began = nanoseconds();
    if (nanoseconds() - began > 10000000000ull) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory");
  }
}

// Words that blocks tell one another, each with 16 bits of what is told and a mark; they begin as zeros, and are written
// once with each mark, which grows. Who sees a mark has what was told, without a barrier or a fence.
DEVICE void tell(u32* p, u32 x) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
DEVICE void tell(u32* p, uint2 x) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
}
DEVICE void tell(u16* p, u16 x) { asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(x) : "memory"); }
DEVICE void look(const u32* p, uint2& x) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
}
DEVICE void look(const u32* p, uint4& x) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
}
DEVICE void add_relaxed(u64* p, u64 x) { asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory"); }
DEVICE u64 look(const u64* p) {
  u64 x;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
// After the last of `polls` that found nothing. After ten seconds the kernel fails.
DEVICE void look_again(u32 polls, u64& began) {
  if (PAUSE && polls > 1) __nanosleep(PAUSE);
  if (polls % 4096) return;
  if (!began) began = nanoseconds();
  if (nanoseconds() - began > 10000000000ull) asm volatile("trap;");
}

#endif

constexpr u32 TOLD = 0x10000;  // the first mark, and the difference between marks
DEVICE bool is_told(uint2 x, u32 mark) { return ((x.x ^ mark) | (x.y ^ mark)) < TOLD; }
DEVICE bool is_told(uint4 x, u32 mark) { return ((x.x ^ mark) | (x.y ^ mark) | (x.z ^ mark) | (x.w ^ mark)) < TOLD; }
// Two numbers of 16 bits as words, and the lower one of them.
DEVICE uint2 words_of(u32 two, u32 mark = TOLD) { return make_uint2(two & 0xffff | mark, two >> 16 | mark); }
DEVICE u32 word_of(u32 two, u32 mark = TOLD) { return two & 0xffff | mark; }
DEVICE u32 two_of(u32 x, u32 y) { return select_bytes(x, y, 0x5410); }
DEVICE u32 two_of(uint2 x) { return two_of(x.x, x.y); }

// Waits until N looks at words find something told with this mark. place(i): where.
template <int N, class Words, class Place>
DEVICE void collect(Words (&words)[N], Place place, u32 mark = TOLD) {
  u64 began = 0;
  for (u32 polls = 1;; ++polls) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) look(place(i), words[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) all = all && is_told(words[i], mark);
    if (all) break;
    look_again(polls, began);
  }
}

// By a whole warp: the same, and after each look that finds too little it does something else. LITTLE: one lane looks until its
// last words are told, and then all lanes do: what many look at, they find later.
template <int N, class Words, class Place, class Meanwhile>
DEVICE void collect(Words (&words)[N], Place place, u32 mark, Meanwhile meanwhile) {
  u64 began = 0;
  u32 polls = 1;
  if (LITTLE)
    for (;; ++polls) {
      const bool looks = threadIdx.x % 32 == 0;
      if (looks) look(place(N - 1), words[N - 1]);
      if (__all_sync(~0u, !looks || is_told(words[N - 1], mark))) break;
      meanwhile();
      look_again(polls, began);
    }
  for (;; ++polls) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) look(place(i), words[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) all = all && is_told(words[i], mark);
    if (__all_sync(~0u, all)) break;
    meanwhile();
    look_again(polls, began);
  }
}
struct Nothing {};
template <int N, class Words, class Place>
DEVICE void collect(Words (&words)[N], Place place, u32 mark, Nothing) { collect(words, place, mark); }

// A sum of what all blocks have, in 64 bits that begin as zeros: their low 8 count the blocks, so that who finds the count
// has the sum, and the others are in fixed point, whose sums do not depend on their order. x: under 2^21 in size, or it
// is taken for that, and NaN for the least.
constexpr float SUM_UNIT = 1.f / (1 << 26), MOST_ADDED = 1 << 21;
DEVICE void add_to_sum(u64* sum, float x) {
  const float within = fminf(fmaxf(x, -MOST_ADDED), MOST_ADDED);
  add_relaxed(sum, (u64)(long long)(within / SUM_UNIT) * 256 + 1);
}
// By a whole warp: waits until so many blocks have added to N sums. place(i): where. meanwhile(): after looks that find too few.
template <int N, class Place, class Meanwhile>
DEVICE void collect_sums(float (&sums)[N], Place place, u32 blocks, Meanwhile meanwhile) {
  u64 began = 0, x[N];
  for (u32 polls = 1;; ++polls) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = look(place(i));
#pragma unroll
    for (int i = 0; i < N; ++i) all = all && (x[i] & 255) == blocks;
    if (__all_sync(~0u, all)) break;
    meanwhile();
    look_again(polls, began);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = (float)((long long)x[i] >> 8) * SUM_UNIT;
}

// Barrier `number` (1, 2, ...) of all threads of `blocks` blocks; block i has words[i]. What any of them wrote before it,
// all see after it.
DEVICE void grid_sync(int* words, int number, int blocks, int threads) {
  __syncthreads();
  // A release has all that came before the block's own barrier, whichever thread did it.
  if (threadIdx.x == 0) word_release(words + blockIdx.x, number);
  for (int i = threadIdx.x; i < blocks; i += threads) word_wait(words + i, number);
  __syncthreads();
}
