// Which experts a layer will probably choose, known before its attention: what the router says of the residual stream that
// the layer begins with, to which attention adds little. Nothing but what the second-level cache fetches depends on it, in
// times in which nobody waits for what others tell, for that comes late behind many copies.
//
// Each block with products has one expert. Macros: WITH_OUTPUT: rows of gate and up, in pairs, that a warp fetches when it
// begins with the output product; WITH_NORM: and with the second norm.
#pragma once
#include "moe_layer.cuh"

#ifndef WITH_OUTPUT
#define WITH_OUTPUT 0
#endif
#ifndef WITH_NORM
#define WITH_NORM 0
#endif

constexpr bool PREDICTS = WITH_OUTPUT + WITH_NORM > 0 && EXPERTS % 4 == 0 && EXPERTS <= BLOCKS - IDLE;
constexpr int ROUNDS_OF_EXPERTS = (GateUp::ITEMS + WORKERS - 1) / WORKERS, HALF_OF_THEM = (ROUNDS_OF_EXPERTS + 1) / 2;

struct Prediction {
  static constexpr int EACH = NormWeight::EACH;
  int expert;       // of this block, or none: -1
  uint4 row[EACH];  // this thread's part of the router's row

  DEVICE explicit Prediction(const u16* router) {
    expert = PREDICTS && (int)blockIdx.x >= IDLE && (int)blockIdx.x - IDLE < EXPERTS ? (int)blockIdx.x - IDLE : -1;
    if (!PREDICTS) return;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = min((int)threadIdx.x + i * THREADS, WIDTH / 8 - 1);
      row[i] = load_kept((const uint4*)(router + (size_t)max(expert, 0) * WIDTH) + at);
    }
  }
  // A thread's part of the score. x: of the stream, zeros where there is none.
  DEVICE float part(const uint4 (&x)[EACH], const NormWeight& weight) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float4 a = weight.low[i], b = weight.high[i];
      auto add = [&](u32 two, u32 by, float low, float high) {
        sum += low_of(two) * low_of(by) * low + high_of(two) * high_of(by) * high;
      };
      add(x[i].x, row[i].x, a.x, a.y);
      add(x[i].y, row[i].y, a.z, a.w);
      add(x[i].z, row[i].z, b.x, b.y);
      add(x[i].w, row[i].w, b.z, b.w);
    }
    return sum;
  }
  // sum: of all threads' parts, times what the norm multiplies with. Told are the upper 16 bits of the order of scores.
  DEVICE void tell_score(u32* words, float sum, const float* __restrict__ bias, u32 mark) const {
    if (expert < 0 || threadIdx.x) return;
    const float score = SIGMOID ? 1.f / (1.f + exponential(-sum)) : sum;
    tell(words + TOLD_PREDICTED + expert, word_of(ordered(BIAS ? score + __ldg(bias + expert) : score) >> 16, mark));
  }
};

// Of a warp: lane k has the expert with the k-th score.
struct Predicted {
  int experts = 0;

  // Waits for the scores.
  DEVICE void choose(const u32* words, u32 mark) {
    constexpr int GROUPS = EXPERTS / 4, EACH = (GROUPS + 31) / 32;
    const int lane = threadIdx.x % 32;
    uint4 told[EACH];
    collect(told, [&](int i) { return words + TOLD_PREDICTED + 4 * min(i * 32 + lane, GROUPS - 1); }, mark);
    u32 keys[EACH][4];  // that say which expert it is, so that all differ
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const u32 group = i * 32 + lane, of[4] = {told[i].x, told[i].y, told[i].z, told[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) keys[i][j] = group < GROUPS ? of[j] << 16 | 0xffff - (group * 4 + j) : 0;
    }
#pragma unroll 1
    for (int k = 0; k < CHOSEN; ++k) {
      u32 most = 0;
#pragma unroll
      for (int i = 0; i < EACH * 4; ++i) most = max(most, keys[i / 4][i % 4]);
      most = __reduce_max_sync(~0u, most);
#pragma unroll
      for (int i = 0; i < EACH * 4; ++i) keys[i / 4][i % 4] = keys[i / 4][i % 4] == most ? 0 : keys[i / 4][i % 4];
      if (lane == k) experts = 0xffff - (most & 0xffff);
    }
  }
  // Pairs of rows from number `first` on: those of every second item of this warp, and then the others, so that what is in the
  // second-level cache and what memory has are read at the same time.
  template <int COUNT>
  DEVICE void fetch(const u16* gate_up, int first) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = first; i < first + COUNT; ++i) {
      const int item = first_item() + (i < HALF_OF_THEM ? 2 * i : 2 * (i - HALF_OF_THEM) + 1) * WORKERS;
      if (item >= GateUp::ITEMS) continue;
      const int expert = __shfl_sync(~0u, experts, item / FFN);
      if (lane < 2) prefetch(gate_up + ((size_t)expert * (2 * FFN) + lane * FFN + item % FFN) * WIDTH, WIDTH * 2);
    }
  }
};
