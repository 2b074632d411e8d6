// What is left of an RMSNorm where tokens come multiplied with its weight: a factor for each token, of the sum of its
// squares, which comes in parts.
#pragma once
#include "hopper.cuh"

// The factors of WIDTH tokens at `factors` in shared memory, from their sums of squares [COUNT, WIDTH] over so many
// inputs; by 128 threads, `thread` of them, each with four tokens of every TURN-th part. `added`: shared memory for a
// float4 of each thread. What they wrote is seen after a barrier; `barrier` is one that they use themselves.
template <int WIDTH, int COUNT>
DEVICE void make_factors(
    float* factors, float4* added, const float4* __restrict__ squares, int inputs, float eps, int thread, int barrier
) {
  constexpr int FOURS = WIDTH / 4, TURN = 128 / FOURS;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < (COUNT + TURN - 1) / TURN; i++) {
    const int part = i * TURN + thread / FOURS;
    if (COUNT % TURN && part >= COUNT) break;
    const float4 four = __ldg(squares + part * FOURS + thread % FOURS);
    sum.x += four.x, sum.y += four.y, sum.z += four.z, sum.w += four.w;
  }
  added[thread] = sum;
  named_sync(barrier, 128);
  if (thread >= WIDTH) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < TURN; i++) total += ((const float*)added)[i * WIDTH + thread];
  factors[thread] = rsqrtf(total / inputs + eps);
}
