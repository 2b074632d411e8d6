// Norms of the residual stream and the choice of experts for one token, in moe_layer.cu.
#pragma once
#include "moe_layer.cuh"

// Waits for the stream after attention; what its norm makes of it goes to shared memory, and this block's scores are told.
// route: the router's rows of them, as NormWeight has a norm's.
DEVICE void score_experts(
    u8* shared, u32* words, const NormWeight& weight, const uint4 (&route)[ROUTED][NormWeight::EACH],
    const Timeline& timeline
) {
  constexpr int EACH = NormWeight::EACH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  float* const parts = (float*)(shared + RESULTS_AT);  // [ROUTED, WARPS]
  uint4 told[2 * EACH], x[EACH];
  collect(told, [&](int i) {
    return words + TOLD_STREAM + 8 * min((int)threadIdx.x + i / 2 * THREADS, WIDTH / 8 - 1) + i % 2 * 4;
  });
  timeline.mark(8);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint4 a = told[2 * i], b = told[2 * i + 1];
    x[i] = make_uint4(two_of(a.x, a.y), two_of(a.z, a.w), two_of(b.x, b.y), two_of(b.z, b.w));
    if (threadIdx.x + i * THREADS >= WIDTH / 8) x[i] = make_uint4(0, 0, 0, 0);
  }
  const float by = norm_factor((float*)(shared + SQUARES_AT), x);
  float score[ROUTED] = {};
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = threadIdx.x + i * THREADS;
    const uint4 y = normed(x[i], weight, i, by);
    if (at < WIDTH / 8) inputs[at] = y;
#pragma unroll
    for (int r = 0; r < ROUTED; ++r) score[r] += dot(route[r][i], y);
  }
  timeline.mark(9);
#pragma unroll
  for (int r = 0; r < ROUTED; ++r) {
#pragma unroll
    for (int by = 16; by; by /= 2) score[r] += __shfl_xor_sync(~0u, score[r], by);
    if (lane == 0) parts[r * WARPS + warp] = score[r];
  }
  __syncthreads();
  const int expert = blockIdx.x + threadIdx.x * BLOCKS;
  if (threadIdx.x < ROUTED && expert < EXPERTS) {
    float all = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += parts[threadIdx.x * WARPS + w];
    tell(words + TOLD_SCORES + 2 * expert, words_of(__float_as_uint(all)));
  }
  timeline.mark(10);
}

// Waits for the scores, and chooses as `choose` does: an expert's place is the number of those before it. All threads have
// `chosen` afterwards; weights are what weigh_experts makes weights of.
DEVICE void choose_by_block(
    u8* shared, const u32* words, const float* __restrict__ bias, int* chosen, float* weights, const Timeline& timeline
) {
  constexpr int SHARES = shares_of(THREADS / EXPERTS), GROUPS = (EXPERTS + 3) / 4;  // of four experts
  u32* const keys = (u32*)(shared + RESULTS_AT + (ROUTED * WARPS * 4 + 15) / 16 * 16);
  float* const scores = (float*)(keys + GROUPS * 4);
  for (int expert = threadIdx.x; expert < GROUPS * 4; expert += THREADS) {
    if (expert >= EXPERTS) {
      keys[expert] = 0;
      continue;
    }
    uint2 halves[1];
    collect(halves, [&](int) { return words + TOLD_SCORES + 2 * expert; });
    const float told = __uint_as_float(two_of(halves[0])), score = SIGMOID ? 1.f / (1.f + exponential(-told)) : told;
    scores[expert] = score;
    keys[expert] = ordered(BIAS ? score + __ldg(bias + expert) : score);
  }
  __syncthreads();
  timeline.mark(11);
  const int share = threadIdx.x % SHARES;
  for (int first = 0; first < EXPERTS; first += THREADS / SHARES) {
    const int expert = min(first + (int)threadIdx.x / SHARES, EXPERTS - 1);
    const u32 key = keys[expert];
    int place = 0;
#pragma unroll 8
    for (int group = share; group < GROUPS; group += SHARES) {
      const uint4 others = ((const uint4*)keys)[group];
      const u32 above = group < expert / 4 ? key - 1 : key;  // those before it win a tie
      place += (others.x > above) + (others.y > above) + (others.z > above) + (others.w > above);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i)  // and those of its own group
      if (share == 0 && i < expert % 4 && keys[expert / 4 * 4 + i] == key) ++place;
#pragma unroll
    for (int by = SHARES / 2; by; by /= 2) place += __shfl_xor_sync(~0u, place, by);
    if (share == 0 && place < CHOSEN && first + threadIdx.x / SHARES < EXPERTS) {
      chosen[place] = expert;
      weights[place] = scores[expert];
    }
  }
  __syncthreads();
}

// By a warp: the weight of the chosen expert `lane`, by what choose_by_block left.
DEVICE float weigh_expert(const u8* shared, const float* weights) {
  const int lane = threadIdx.x % 32;
  float weight = lane < CHOSEN ? weights[lane] : 0.f;
  if (!SIGMOID) {
    const float most = weights[0];
    weight = lane < CHOSEN ? exponential(weight - most) : 0.f;
    if (!NORMALISE) {  // of all
      const float* const scores =
          (const float*)(shared + RESULTS_AT + (ROUTED * WARPS * 4 + 15) / 16 * 16 + (EXPERTS + 3) / 4 * 16);
      float sum = 0.f;
      for (int expert = lane; expert < EXPERTS; expert += 32) sum += exponential(scores[expert] - most);
#pragma unroll
      for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      weight /= sum;
    }
  }
  if (NORMALISE) {
    float sum = weight;
#pragma unroll
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    weight /= sum + 1e-20f;
  }
  return weight * SCALE;
}
