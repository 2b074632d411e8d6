// The choice of experts by what a router says, of many tokens: a warp has one.
//
// Macros: TOKENS, and those of choice.cuh
#include "choice.cuh"

extern "C" __global__ void __launch_bounds__(256) moe_choose(
    const float* __restrict__ logits,  // [TOKENS, EXPERTS]
    const float* __restrict__ bias,    // [EXPERTS]
    int* __restrict__ chosen,          // [TOKENS, CHOSEN]
    float* __restrict__ weights        // [TOKENS, CHOSEN]
) {
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= TOKENS) return;
  float score[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    score[i] = __ldg(logits + (size_t)token * EXPERTS + min(i * 32 + lane, EXPERTS - 1));
  choose(score, bias, lane, chosen + (size_t)token * CHOSEN, weights + (size_t)token * CHOSEN);
}
