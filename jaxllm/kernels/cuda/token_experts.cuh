// The residual stream, the scores of experts and the choice among them for one token, in moe_layers.cu.
#pragma once
#include "token_prediction.cuh"

// A thread's part of the residual stream: what is in memory, or what blocks tell.
struct Stream {
  static constexpr int EACH = NormWeight::EACH;
  uint4 x[EACH];

  DEVICE void load(const u16* stream) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = threadIdx.x + i * THREADS;
      x[i] = at < WIDTH / 8 ? load_kept((const uint4*)stream + at) : make_uint4(0, 0, 0, 0);
    }
  }
  template <class Meanwhile = Nothing>
  DEVICE void wait(const u32* words, u32 mark, Meanwhile meanwhile = {}) {
    uint4 told[2 * EACH];
    collect(told, [&](int i) {
      return words + 8 * min((int)threadIdx.x + i / 2 * THREADS, WIDTH / 8 - 1) + i % 2 * 4;
    }, mark, meanwhile);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const uint4 a = told[2 * i], b = told[2 * i + 1];
      x[i] = make_uint4(two_of(a.x, a.y), two_of(a.z, a.w), two_of(b.x, b.y), two_of(b.z, b.w));
      if (threadIdx.x + i * THREADS >= WIDTH / 8) x[i] = make_uint4(0, 0, 0, 0);
    }
  }
  // By all threads: the stream to shared memory, as it is and times the norm's weight. Returns what the norm multiplies it
  // with besides, which goes to the results of products: so there is one barrier, and not two.
  DEVICE float norm(u8* shared, const NormWeight& weight) const {
    float none = 0.f;
    return norm<false>(shared, weight, none);
  }
  // OTHER: with it comes the sum of what each thread has in `other`.
  template <bool OTHER>
  DEVICE float norm(u8* shared, const NormWeight& weight, float& other) const {
    float* const squares = (float*)(shared + SQUARES_AT);
    float* const others = (float*)(shared + RESULTS_AT);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = threadIdx.x + i * THREADS;
      const float4 a = weight.low[i], b = weight.high[i];
      sum += square(x[i].x) + square(x[i].y) + square(x[i].z) + square(x[i].w);
      if (at >= WIDTH / 8) continue;
      ((uint4*)(shared + STREAM_AT))[at] = x[i];
      ((uint4*)(shared + NORMED_AT))[at] = make_uint4(
          scaled(x[i].x, a.x, a.y), scaled(x[i].y, a.z, a.w), scaled(x[i].z, b.x, b.y), scaled(x[i].w, b.z, b.w)
      );
    }
#pragma unroll
    for (int by = 16; by; by /= 2) {
      sum += __shfl_xor_sync(~0u, sum, by);
      if (OTHER) other += __shfl_xor_sync(~0u, other, by);
    }
    if (threadIdx.x % 32 == 0) {
      squares[threadIdx.x / 32] = sum;
      if (OTHER) others[threadIdx.x / 32] = other;
    }
    __syncthreads();
    sum = 0.f;
    if (OTHER) other = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      sum += squares[w];
      if (OTHER) other += others[w];
    }
    return rsqrtf(sum / WIDTH + EPS);
  }
};

// A warp's part of the router's products, of the two numbers of the stream that it makes: so the scores are there as soon as
// the stream is, but for the factor of its norm. Lane l has experts l, l + 32, and so on.
struct Scores {
  const u16* router;
  const float* norm;
  int mine;  // the warp's first item, whose weights come ahead
  float2 weight;
  u32 route[PER_LANE];
  float sum[PER_LANE];

  DEVICE Scores(const u16* router, const float* norm) : router(router), norm(norm) {
    mine = first_item();
    const int item = min(mine, WIDTH / 2 - 1);
    weight = __ldg((const float2*)norm + item);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      route[i] = route_of(i, item);
      sum[i] = 0.f;
    }
  }
  DEVICE u32 route_of(int i, int item) const {
    const int expert = min(i * 32 + (int)threadIdx.x % 32, EXPERTS - 1);
    return __ldg((const u32*)(router + (size_t)expert * WIDTH) + item);
  }
  // x, y: numbers of the stream before they are rounded, for scores make much of small differences.
  DEVICE void add(int item, float x, float y) {
    const bool ahead = item == mine || WIDTH / 2 <= WORKERS;
    const float2 of = ahead ? weight : __ldg((const float2*)norm + item);
    x *= of.x, y *= of.y;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const u32 by = ahead ? route[i] : route_of(i, item);
      sum[i] += x * low_of(by) + y * high_of(by);
    }
  }
  // By all threads: adds what the block's warps have to the sums of all blocks.
  DEVICE void tell_all(u8* shared, u64* sums) const {
    float* const parts = (float*)(shared + RESULTS_AT);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) parts[(warp * PER_LANE + i) * 32 + lane] = sum[i];
    __syncthreads();
    if ((int)blockIdx.x < IDLE) return;  // it has none
    for (int expert = threadIdx.x; expert < EXPERTS; expert += THREADS) {
      float all = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) all += parts[w * PER_LANE * 32 + expert];
      add_to_sum(sums + sum_at(expert), all);
    }
  }
};

// By all threads: waits for the sums of scores, of which each warp looks at some, and multiplies them with `factor`; all have
// the scores afterwards. meanwhile(): of whole warps, while they wait.
template <class Meanwhile>
DEVICE void collect_scores(float* scores, const u64* sums, float factor, Meanwhile meanwhile) {
  constexpr int OF_WARP = (EXPERTS + WARPS - 1) / WARPS, EACH = (OF_WARP + 31) / 32;
  const int first = threadIdx.x / 32 * OF_WARP, lane = threadIdx.x % 32;
  auto number = [&](int i) { return min(first + min(i * 32 + lane, OF_WARP - 1), EXPERTS - 1); };
  float found[EACH];
  collect_sums(found, [&](int i) { return sums + sum_at(number(i)); }, BLOCKS - IDLE, meanwhile);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const float told = found[i] * factor;
    scores[number(i)] = SIGMOID ? 1.f / (1.f + exponential(-told)) : told;
  }
  __syncthreads();
}

// What a warp chooses, as `choose` does: lane k has the expert with the k-th score for k < CHOSEN, and the score.
struct Chosen {
  static constexpr int EACH = ((EXPERTS + 3) / 4 + 31) / 32 * 4;  // of a lane, next to one another
  int expert = 0;
  float score = 0.f, sum = 1.f;  // sum: of all experts' exponentials, if they are divided by that

  DEVICE Chosen(const float* scores, const float* __restrict__ bias) {
    const int lane = threadIdx.x % 32, first = lane * EACH;
    u32 keys[EACH];
    int number[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      number[i] = min(first + i, EXPERTS - 1);
      const float score = scores[number[i]];
      keys[i] = first + i < EXPERTS ? ordered(BIAS ? score + __ldg(bias + number[i]) : score) : 0u;
    }
#pragma unroll
    for (int last = EACH - 1; last; --last)  // the highest first, and of equal ones the first
#pragma unroll
      for (int i = 0; i < last; ++i) {
        const u32 key = keys[i], other = keys[i + 1];
        const int its = number[i], others = number[i + 1];
        keys[i] = other > key ? other : key, keys[i + 1] = other > key ? key : other;
        number[i] = other > key ? others : its, number[i + 1] = other > key ? its : others;
      }
#pragma unroll 1
    for (int k = 0; k < CHOSEN; ++k) {
      const u32 lanes = __ballot_sync(~0u, keys[0] == __reduce_max_sync(~0u, keys[0]));
      const int whose = __ffsll(lanes) - 1, found = __shfl_sync(~0u, number[0], whose);
      if (lane == k) expert = found;
      if (lane != whose) continue;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        keys[i] = i + 1 < EACH ? keys[min(i + 1, EACH - 1)] : 0u;
        number[i] = number[min(i + 1, EACH - 1)];
      }
    }
    score = scores[expert];
    if (!SIGMOID && !NORMALISE) {
      const float most = __shfl_sync(~0u, score, 0);
      sum = 0.f;
      for (int i = lane; i < EXPERTS; i += 32) sum += exponential(scores[i] - most);
#pragma unroll
      for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    }
  }
  // By the whole warp.
  DEVICE float weight() const {
    const int lane = threadIdx.x % 32;
    float weight = lane < CHOSEN ? score : 0.f;
    if (!SIGMOID) {
      const float most = __shfl_sync(~0u, score, 0);
      weight = lane < CHOSEN ? exponential(score - most) / (NORMALISE ? 1.f : sum) : 0.f;
    }
    if (NORMALISE) {
      float all = weight;
#pragma unroll
      for (int by = 16; by; by /= 2) all += __shfl_xor_sync(~0u, all, by);
      weight /= all + 1e-20f;
    }
    return weight * SCALE;
  }
};
