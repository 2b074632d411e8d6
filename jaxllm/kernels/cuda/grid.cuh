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

#endif

// Barrier `number` (1, 2, ...) of all threads of `blocks` blocks; block i has words[i]. What any of them wrote before it,
// all see after it.
DEVICE void grid_sync(int* words, int number, int blocks, int threads) {
  __syncthreads();
  // A release has all that came before the block's own barrier, whichever thread did it.
  if (threadIdx.x == 0) word_release(words + blockIdx.x, number);
  for (int i = threadIdx.x; i < blocks; i += threads) word_wait(words + i, number);
  __syncthreads();
}
