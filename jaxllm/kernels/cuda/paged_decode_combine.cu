// Merges what several CTAs of paged_decode.cu left of one row's head. Block x looks at the border before CTA x, and does
// the work if it is the first border in a row's head; y is one of its queries. Its warps take the parts in turns.
//
// Macros: H, G, Q, K as there. Grid: CTAS, M = G * Q.
#include "ptx.cuh"

constexpr int N = K * G, M = G * Q, WARPS = 8, PAIRS = (H + 63) / 64;
constexpr float LN2 = 0.6931471805599453f, MASKED = -1e30f, UNSEEN = -1e29f;

extern "C" __global__ void __launch_bounds__(WARPS * 32) paged_decode_combine(
    const float* part_out,     // [2 CTAS, M, H]
    const float* part_lse,     // [2 CTAS, M], to the base 2
    const int* split,          // [CTAS, 4]: row and head (-1: nothing to do), first CTA, last CTA
    const u16*, const float*,  // out and lse, which are written in place
    u16* out,                  // [R, Q, N, H]
    float* lse                 // [R, Q, N]
) {
  __shared__ float sums[WARPS * H], weights[WARPS];
  const int item = split[blockIdx.x * 4], from = split[blockIdx.x * 4 + 1], to = split[blockIdx.x * 4 + 2];
  if (item < 0) return;
  const int m = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = item / K, head = item % K;
  auto slot = [&](int cta) { return (size_t)(2 * cta + (cta == from)) * M + m; };
  float high = MASKED;
  for (int cta = from + lane; cta <= to; cta += 32) high = fmaxf(high, part_lse[slot(cta)]);
#pragma unroll
  for (int by = 16; by; by /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, by));
  float weight = 0.f, x[PAIRS][2] = {};
#pragma unroll 4
  for (int cta = from + warp; cta <= to; cta += WARPS) {
    const float w = fast_exp2(part_lse[slot(cta)] - high);
    weight += w;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
      if (i * 64 + 2 * lane < H) {
        const float2 part = *(const float2*)(part_out + slot(cta) * H + i * 64 + 2 * lane);
        x[i][0] += w * part.x;
        x[i][1] += w * part.y;
      }
  }
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    if (i * 64 + 2 * lane < H) {
      sums[warp * H + i * 64 + 2 * lane] = x[i][0];
      sums[warp * H + i * 64 + 2 * lane + 1] = x[i][1];
    }
  if (lane == 0) weights[warp] = weight;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += weights[w];
  const size_t target = (size_t)(row * Q + m / G) * N + head * G + m % G;
  for (int d = 2 * threadIdx.x; d < H; d += WARPS * 64) {
    float y[2] = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      y[0] += sums[w * H + d];
      y[1] += sums[w * H + d + 1];
    }
    *(u32*)(out + target * H + d) = pack_bf16(y[0] / total, y[1] / total);
  }
  if (threadIdx.x == 0) lse[target] = high < UNSEEN ? MASKED : (high + fast_log2(total)) * LN2;
}
