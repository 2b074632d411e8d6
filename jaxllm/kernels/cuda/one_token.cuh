// What kernels that take one token through a layer share: norms of the residual stream, activations, and what blocks tell
// one another.
//
// Macros: WIDTH of the model; EPS of the norms; GATED 1: silu(gate) * up; 2: gelu with tanh; those of row_pairs.cuh.
#pragma once
#define GRID_BARRIER
#include "grid.cuh"
#include "row_pairs.cuh"
#include "stream.cuh"
#include "timeline.cuh"

constexpr int larger(int a, int b) { return a > b ? a : b; }

DEVICE float activation(float x) {
  const float y = GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
  return x * fast_reciprocal(1.f + fast_exp2(y * -1.4426950408889634f));
}
DEVICE float square(u32 two) { return low_of(two) * low_of(two) + high_of(two) * high_of(two); }
DEVICE u32 scaled(u32 two, float a, float b) { return pack_bf16(low_of(two) * a, high_of(two) * b); }

// Issued where it stands.
DEVICE float4 load_float4(const float4* p) {
  const uint4 x = load_kept(p);
  return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
}
// A thread's part of a norm's weight, which can be on its way before anything else is known.
struct NormWeight {
  static constexpr int EACH = (WIDTH / 8 + THREADS - 1) / THREADS;
  float4 low[EACH], high[EACH];

  DEVICE explicit NormWeight(const float* __restrict__ weight) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = min((int)threadIdx.x + i * THREADS, WIDTH / 8 - 1);
      low[i] = load_float4((const float4*)weight + 2 * at);
      high[i] = load_float4((const float4*)weight + 2 * at + 1);
    }
  }
};

// By all threads: what a norm multiplies the stream with, of which each thread has a part.
// squares: WARPS floats in shared memory.
DEVICE float norm_factor(float* squares, const uint4 (&x)[NormWeight::EACH]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < NormWeight::EACH; ++i) sum += square(x[i].x) + square(x[i].y) + square(x[i].z) + square(x[i].w);
#pragma unroll
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += squares[w];
  return rsqrtf(sum / WIDTH + EPS);
}
DEVICE uint4 normed(uint4 x, const NormWeight& weight, int i, float by) {
  const float4 a = weight.low[i], b = weight.high[i];
  return make_uint4(scaled(x.x, by * a.x, by * a.y), scaled(x.y, by * a.z, by * a.w), scaled(x.z, by * b.x, by * b.y),
                    scaled(x.w, by * b.z, by * b.w));
}

// By all threads: what the norm makes of the residual stream, of which each has a part, to shared memory, where nobody reads
// any more when all are here.
DEVICE void normed_to(uint4* inputs, float* squares, const uint4 (&x)[NormWeight::EACH], const NormWeight& weight) {
  const float by = norm_factor(squares, x);
#pragma unroll
  for (int i = 0; i < NormWeight::EACH; ++i)
    if (threadIdx.x + i * THREADS < WIDTH / 8) inputs[threadIdx.x + i * THREADS] = normed(x[i], weight, i, by);
  __syncthreads();
}

// A thread's part of the residual stream.
struct StreamPart {
  uint4 x[NormWeight::EACH];

  DEVICE explicit StreamPart(const u16* stream) {
#pragma unroll
    for (int i = 0; i < NormWeight::EACH; ++i) {
      const int at = threadIdx.x + i * THREADS;
      x[i] = at < WIDTH / 8 ? load_kept((const uint4*)stream + at) : make_uint4(0, 0, 0, 0);
    }
  }
  // By all threads: what the norm makes of it, to shared memory.
  DEVICE void norm(uint4* inputs, float* squares, const NormWeight& weight) const { normed_to(inputs, squares, x, weight); }
};

// By all threads: COUNT bf16 that others tell, a multiple of 8, to shared memory. FREE: no thread of the block can still read
// what was there; otherwise they wait for one another before. meanwhile(): of whole warps, while they wait.
template <int COUNT, bool FREE = false, class Meanwhile = Nothing>
DEVICE void fetch_told(uint4* inputs, const u32* words, u32 mark = TOLD, Meanwhile meanwhile = {}) {
  constexpr int EACH = larger(1, (COUNT / 4 + THREADS - 1) / THREADS), AT_ONCE = EACH < 8 ? EACH : 8;
#pragma unroll 1
  for (int first = 0; first < COUNT / 4; first += AT_ONCE * THREADS) {
    const int at = first + threadIdx.x;
    uint4 x[AT_ONCE];
    collect(x, [&](int i) { return words + 4 * min(at + i * THREADS, COUNT / 4 - 1); }, mark, meanwhile);
    if (!FREE && first == 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (at + i * THREADS < COUNT / 4)
        ((uint2*)inputs)[at + i * THREADS] = make_uint2(two_of(x[i].x, x[i].y), two_of(x[i].z, x[i].w));
  }
  __syncthreads();
}

// Numbers told without a mark of their own, two in a word: inverted, for what a conversion to bf16 gives is never 0xffff,
// and a word, or half of one, that is still zero is not told.
DEVICE u32 zero_halves(u32 x) { return x - 0x10001u & ~x & 0x80008000u; }
DEVICE bool pairs_are_told(uint4 x) {
  return !(zero_halves(x.x) | zero_halves(x.y) | zero_halves(x.z) | zero_halves(x.w));
}
DEVICE uint4 inverted(uint4 x) { return make_uint4(~x.x, ~x.y, ~x.z, ~x.w); }
// Until these four words are told, one lane of the warp looks: what waits should take neither power nor bandwidth.
template <class Told>
DEVICE void wait_until(const u32* words, Told told) {
  if (threadIdx.x % 32 == 0) {
    u64 began = 0;
    uint4 x;
    for (u32 polls = 1; look(words, x), !told(x); ++polls) look_again(polls, began);
  }
  __syncwarp();
}
// A warp's first words of many that are told at about the same time.
DEVICE void wait_for_told(const u32* words) {
  wait_until(words + threadIdx.x / 32 * 4, [](uint4 x) { return is_told(x, TOLD); });
}
// Waits for N times 8 such numbers. place(i): where. What is much is first waited for with little.
template <int N, class Place>
DEVICE void collect_pairs(uint4 (&x)[N], Place place) {
  wait_until(place(N - 1), pairs_are_told);
  u64 began = 0;
  for (u32 polls = 1;; ++polls) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) look(place(i), x[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) all = all && pairs_are_told(x[i]);
    if (all) break;
    look_again(polls, began);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = inverted(x[i]);
}
