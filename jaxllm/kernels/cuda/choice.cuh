// The choice of experts by what a router says of one token. Ties go to the lowest number.
//
//   EXPERTS CHOSEN
//   SIGMOID          scores are 0: softmax, 1: sigmoid of the products
//   BIAS             1: is added to the scores for the choice, and only for it
//   NORMALISE SCALE  1: the scores of the chosen are divided by their sum; then multiplied with SCALE
#pragma once
#include "stream.cuh"

constexpr int PER_LANE = (EXPERTS + 31) / 32;
static_assert(CHOSEN <= 32 && CHOSEN <= EXPERTS, "sizes");

DEVICE float exponential(float x) { return fast_exp2(x * 1.4426950408889634f); }
// A number that is the larger, the larger x is; 0 is below all.
DEVICE u32 ordered(float x) {
  const u32 bits = __float_as_uint(x);
  return max(bits >> 31 ? ~bits : bits | 0x80000000u, 1u);
}

// By a warp. score: lane l has the products of experts l, l + 32, ...; beyond the last one any of them.
DEVICE void choose(float (&score)[PER_LANE], const float* __restrict__ bias, int lane, int* __restrict__ chosen,
                   float* __restrict__ weights) {
  u32 key[PER_LANE];
  if (SIGMOID) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) score[i] = 1.f / (1.f + exponential(-score[i]));
  } else {
    float most = score[0], sum = 0.f;  // those beyond the last expert are the last expert once more
#pragma unroll
    for (int i = 1; i < PER_LANE; i++) most = fmaxf(most, score[i]);
#pragma unroll
    for (int by = 16; by; by /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, by));
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      score[i] = exponential(score[i] - most);
      if (i * 32 + lane < EXPERTS) sum += score[i];
    }
#pragma unroll
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) score[i] /= sum;
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int expert = i * 32 + lane;
    key[i] = expert < EXPERTS ? ordered(BIAS ? score[i] + __ldg(bias + expert) : score[i]) : 0u;
  }
  int my_expert = 0;
  float my_score = 0.f;
#pragma unroll 1
  for (int k = 0; k < CHOSEN; k++) {
    u32 best = key[0];
    int place = 0;
    float found = score[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; i++)
      if (key[i] > best) best = key[i], place = i, found = score[i];
    const u32 most = __reduce_max_sync(~0u, best);
    const int expert = (int)__reduce_min_sync(~0u, best == most ? (u32)(place * 32 + lane) : ~0u);
    const int taken = lane == expert % 32 ? place : -1;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) key[i] = i == taken ? 0u : key[i];
    found = __shfl_sync(~0u, found, expert % 32);
    if (lane == k) my_expert = expert, my_score = found;
  }
  if (NORMALISE) {
    float sum = my_score;
#pragma unroll
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    my_score /= sum + 1e-20f;
  }
  if (lane < CHOSEN) {
    chosen[lane] = my_expert;
    weights[lane] = my_score * SCALE;
  }
}
