// Results of attention over latents by two warpgroups with half of the columns each: how they are written, and how two
// blocks of threads (CTAs) that have an item together merge theirs.
//
// Macros: VALUES. Constants of the includer: TILE; M; those of latent_halves.cuh.
#pragma once
#include "latent_halves.cuh"

// Writes 8 COUNT columns from `begin` on of result m, which four lanes have two of each 8 of, in o[4 i] and o[4 i + 1].
template <int COUNT>
DEVICE void write_columns(u16* out, size_t target, int begin, const float* o, float scale, int m, int lane) {
  u16* const to = out + (target + m) * VALUES + begin + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    u32 two[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) two[j] = pack_bf16(o[(i + j) * 4] * scale, o[(i + j) * 4 + 1] * scale);
    transpose_quad(two, lane);
    if (m < M) *(uint4*)(to + i * 8) = make_uint4(two[0], two[1], two[2], two[3]);
  }
}

// Two CTAs that have an item, half of its tokens each: each makes half of the columns of each warpgroup, for which it gets
// the other's results of them, and sends it its own of the others.
struct Pair {
  float *part_out, *part_lse;
  int* finished;
  u16* out;
  float* lse;
  size_t target;
  int cta, other;
  const float* sums;

  DEVICE float4* room(int of, int group) const {  // [VALUES / 32, 128 threads]
    return (float4*)(part_out + (size_t)of * 2 * M * VALUES) + group * (VALUES / 32 * 128);
  }
  DEVICE float* logs(int of) const { return part_lse + (size_t)of * 2 * M; }

  // SIDE: which half of its columns a warpgroup makes. Sums of rows are there.
  template <int SIDE>
  DEVICE void exchange(Attention& of) const {
    constexpr int EACH = VALUES / 32, MINE = SIDE * EACH, THEIRS = EACH - MINE;
    float inverse[2], log[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = of.row + half * 8;
      const float all = sums[m] + sums[TILE + m];
      inverse[half] = 1.f / all, log[half] = of.top[half] + fast_log2(all);
      if (of.group == 0 && of.lane % 4 == 0 && m < M) logs(cta)[m] = log[half];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float* const o = of.o + (THEIRS + i) * 4;
      room(cta, of.group)[i * 128 + of.thread] =
          make_float4(o[0] * inverse[0], o[1] * inverse[0], o[2] * inverse[1], o[3] * inverse[1]);
    }
    named_sync(3, 256);
    if (of.group == 0 && of.thread == 0) word_release(finished + cta, 1);  // all that came before the barrier, too
    if (of.lane == 0) word_wait(finished + other, 1);
    __syncwarp();
    float4 four[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) four[i] = __ldcg(room(other, of.group) + i * 128 + of.thread);
    float mine[2], theirs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = of.row + half * 8;
      const float there = m < M ? __ldcg(logs(other) + m) : log[half], high = fmaxf(log[half], there);
      mine[half] = fast_exp2(log[half] - high), theirs[half] = fast_exp2(there - high);
      const float all = mine[half] + theirs[half];
      if (SIDE == 0 && of.group == 0 && of.lane % 4 == 0 && m < M) lse[target + m] = (high + fast_log2(all)) * LN2;
      mine[half] *= inverse[half] / all, theirs[half] /= all;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      float* const o = of.o + (MINE + i) * 4;
      o[0] = o[0] * mine[0] + four[i].x * theirs[0], o[1] = o[1] * mine[0] + four[i].y * theirs[0];
      o[2] = o[2] * mine[1] + four[i].z * theirs[1], o[3] = o[3] * mine[1] + four[i].w * theirs[1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const o = of.o + MINE * 4 + half * 2;
      write_columns<EACH>(out, target, of.group * (VALUES / 2) + MINE * 8, o, 1.f, of.row + half * 8, of.lane);
    }
  }
};
