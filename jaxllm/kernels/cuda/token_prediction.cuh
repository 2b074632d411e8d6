// Which experts a layer will probably choose, known before its attention: what the router says of the residual stream that
// the layer begins with, to which attention adds little. Nothing but what the second-level cache fetches depends on it, in
// the time in which memory has nothing to do because attention is awaited.
//
// Each block with products has one expert. Macros: PREDICTED: rows of gate and up, in pairs, that a warp fetches, those it
// would multiply first; 0: none. GO 1: they are fetched when all queries are made, and not when the block's own are.
#pragma once
#include "moe_layer.cuh"

#ifndef PREDICTED
#define PREDICTED 0
#endif
#ifndef GO
#define GO 1
#endif

constexpr bool PREDICTS = PREDICTED > 0 && EXPERTS % 4 == 0 && EXPERTS <= BLOCKS - IDLE;
constexpr bool GOES = PREDICTS && GO && IDLE > 0;
constexpr int FETCHED = PREDICTED < GateUp::ITEMS / WORKERS ? PREDICTED : GateUp::ITEMS / WORKERS;
constexpr int GUESSES = FETCHED * WORKERS / FFN + (FETCHED * WORKERS % FFN != 0);  // experts

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

// By all threads of the block that makes the queries of a KV head, when they are made.
DEVICE void tell_go(u32* words, int head, u32 mark) {
  if (GOES && threadIdx.x == 0) tell(words + TOLD_GO + 2 * head, make_uint2(mark, mark));
}

// By a warp that waits for heads: fetches the rows that it will probably multiply first.
DEVICE void fetch_predicted(const u32* words, const u16* gate_up, u32 mark) {
  constexpr int GROUPS = EXPERTS / 4, EACH = (GROUPS + 31) / 32;
  const int lane = threadIdx.x % 32;
  if (GOES) {
    uint2 go[1];
    collect(go, [&](int) { return words + TOLD_GO + 2 * (blockIdx.x % KV); }, mark);
  }
  uint4 told[EACH];
  collect(told, [&](int i) { return words + TOLD_PREDICTED + 4 * min(i * 32 + lane, GROUPS - 1); }, mark);
  u32 keys[EACH][4];  // that say which expert it is, so that all differ
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const u32 group = i * 32 + lane, of[4] = {told[i].x, told[i].y, told[i].z, told[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) keys[i][j] = group < GROUPS ? of[j] << 16 | 0xffff - (group * 4 + j) : 0;
  }
  int mine = 0;  // lane k has the expert with the k-th score
#pragma unroll 1
  for (int k = 0; k < GUESSES; ++k) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < EACH * 4; ++i) most = max(most, keys[i / 4][i % 4]);
    most = __reduce_max_sync(~0u, most);
#pragma unroll
    for (int i = 0; i < EACH * 4; ++i) keys[i / 4][i % 4] = keys[i / 4][i % 4] == most ? 0 : keys[i / 4][i % 4];
    if (lane == k) mine = 0xffff - (most & 0xffff);
  }
#pragma unroll
  for (int i = 0; i < FETCHED; ++i) {
    const int item = first_item() + i * WORKERS, expert = __shfl_sync(~0u, mine, item / FFN % 32);
    if (lane < 2) prefetch(gate_up + ((size_t)expert * (2 * FFN) + lane * FFN + item % FFN) * WIDTH, WIDTH * 2);
  }
}
