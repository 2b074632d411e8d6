// Which experts a layer will probably choose, known before its attention: what the router says of the residual stream that
// the layer begins with, to which attention adds little. The first rows of those come to the rings before the choice, while
// they would be empty; if others are chosen, the rings begin anew.
//
// Each block with products has one expert. Macro GUESS: stages of a ring that come before the choice, one after the other, at
// most SLOTS - 1.
#pragma once
#include "moe_layer.cuh"

#ifndef GUESS
#define GUESS 0
#endif

constexpr bool PREDICTS = GUESS > 0 && EXPERTS % 4 == 0 && EXPERTS <= BLOCKS - IDLE;
// Items of a warp that are guessed, and of how many experts all warps' are.
constexpr int GUESSED = (GUESS + stages_of<GateUp>() - 1) / stages_of<GateUp>();
constexpr int PLACES = GUESSED * WORKERS < GateUp::ITEMS ? (GUESSED * WORKERS + FFN - 1) / FFN : CHOSEN;
static_assert(GUESS < SLOTS, "room in a ring");

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

// By a warp, when the scores are told: the experts with the highest ones, in their order.
DEVICE void predict(const u32* words, int* experts, u32 mark) {
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
  int mine = 0;
#pragma unroll 1
  for (int k = 0; k < CHOSEN; ++k) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < EACH * 4; ++i) most = max(most, keys[i / 4][i % 4]);
    most = __reduce_max_sync(~0u, most);
#pragma unroll
    for (int i = 0; i < EACH * 4; ++i) keys[i / 4][i % 4] = keys[i / 4][i % 4] == most ? 0 : keys[i / 4][i % 4];
    if (lane == k) mine = 0xffff - (most & 0xffff);
  }
  if (lane < CHOSEN) experts[lane] = mine;
  __syncwarp();
}

// By a warp: the place of chosen expert `lane` among those that are multiplied. What is predicted for one of the first PLACES
// and is chosen stays there, and the others take what is left, in their order. Returns which places are right.
DEVICE u32 place_experts(const int* predicted, int expert, int& place) {
  const int lane = threadIdx.x % 32;
  u32 lanes = 0, places = 0;
  place = -1;
#pragma unroll
  for (int at = 0; at < PLACES; ++at) {
    const bool here = lane < CHOSEN && predicted[at] == expert;
    const u32 whose = __ballot_sync(~0u, here);
    if (here) place = at;
    lanes |= whose;
    if (whose) places |= 1u << at;
  }
  if (place >= 0) return places;
  const int before = __popc(~lanes & ((1u << lane) - 1));
#pragma unroll
  for (int at = 0; at < CHOSEN; ++at)
    if (!(places >> at & 1) && __popc(~places & ((1u << at) - 1)) == before) place = at;
  return places;
}
