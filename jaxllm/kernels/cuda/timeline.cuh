// Where the time of a kernel goes whose blocks stay: each warp notes the clock of its multiprocessor at the end of a
// phase, and that of the whole GPU at both ends. Nothing without TIMELINE.
//
// Macros: TIMELINE 1; WARPS of a block.
#pragma once
#include "grid.cuh"

#ifndef TIMELINE
#define TIMELINE 0
#endif

constexpr int MARKS = 20;  // of each warp: ends of phases, and in the last two the GPU's nanoseconds
struct Timeline {
  u32* times;  // [blocks, WARPS, MARKS], each modulo 2^32

  DEVICE void mark(int which) const {
    if (TIMELINE && threadIdx.x % 32 == 0) times[(blockIdx.x * WARPS + threadIdx.x / 32) * MARKS + which] = cycles();
  }
  DEVICE void mark_end(int which) const {
    if (TIMELINE && threadIdx.x % 32 == 0)
      times[(blockIdx.x * WARPS + threadIdx.x / 32) * MARKS + MARKS - 2 + which] = (u32)nanoseconds();
  }
};
