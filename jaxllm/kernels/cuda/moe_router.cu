// RMSNorm, the router of a mixture of experts, and its choice, in one kernel for few tokens.
//
// A cluster of CLUSTER blocks has 8 tokens; each block multiplies them with its part of the experts' rows, as
// grouped_skinny.cu does: every warp has its own inputs, of which it keeps the tokens in registers. Then one warp for each
// token collects the products of all blocks and takes the best expert CHOSEN times. Ties go to the lowest number.
//
//   TOKENS INPUTS, and those of choice.cuh
//   EPS          x becomes x * rsqrt(mean(x^2) + EPS) * norm, rounded, which is a result too
//   CLUSTER MS   blocks, each with MS * 16 experts
//   WARPS DEPTH  of a block; groups of 64 bytes of each row that a lane loads at a time
#include "choice.cuh"
#include "cluster.cuh"

constexpr int THREADS = WARPS * 32, ROWS = MS * 16, GROUP = 32;
constexpr int GROUPS = INPUTS / GROUP, PER_WARP = (GROUPS + WARPS - 1) / WARPS;
constexpr bool WHOLE = GROUPS % WARPS == 0;  // every warp has as many
constexpr int SUM_STRIDE = ROWS + 4;
// Shared memory: the warps' sums [WARPS, 8, SUM_STRIDE] and squares [WARPS, 8], the block's sums [8, ROWS].
constexpr int SQUARES_AT = WARPS * 8 * SUM_STRIDE * 4, OURS_AT = SQUARES_AT + WARPS * 8 * 4;
static_assert(INPUTS % GROUP == 0 && CLUSTER * ROWS >= EXPERTS, "sizes");

DEVICE float low_of(u32 two) { return bf16_to_float((u16)two); }
DEVICE float high_of(u32 two) { return bf16_to_float((u16)(two >> 16)); }
DEVICE float square(u32 two) { return low_of(two) * low_of(two) + high_of(two) * high_of(two); }
DEVICE u32 normed(u32 two, float factor, float a, float b) {
  return pack_bf16(low_of(two) * factor * a, high_of(two) * factor * b);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) moe_router(
    const u16* __restrict__ x,        // [TOKENS, INPUTS]
    const float* __restrict__ norm,   // [INPUTS]
    const u16* __restrict__ weight,   // [EXPERTS, INPUTS]
    const float* __restrict__ bias,   // [EXPERTS]
    u16* __restrict__ y,              // [TOKENS, INPUTS]
    int* __restrict__ chosen,         // [TOKENS, CHOSEN]
    float* __restrict__ weights       // [TOKENS, CHOSEN]
) {
  DYNAMIC_SHARED(shared);
  float* const sums = (float*)shared;
  float* const squares = (float*)(shared + SQUARES_AT);
  float* const ours = (float*)(shared + OURS_AT);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, quarter = lane % 4;
  const int rank = blockIdx.x % CLUSTER, first_token = blockIdx.x / CLUSTER * 8;
  const int first = warp * GROUPS / WARPS, count = WHOLE ? PER_WARP : (warp + 1) * GROUPS / WARPS - first;
  const bool real = first_token + row < TOKENS;
  const size_t at = (size_t)(first_token + row) * INPUTS + first * GROUP + quarter * 8;

  const u16* rows[MS][2];
#pragma unroll
  for (int m = 0; m < MS; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int expert = min(rank * ROWS + m * 16 + half * 8 + row, EXPERTS - 1);
      rows[m][half] = weight + (size_t)expert * INPUTS + first * GROUP + quarter * 8;
    }
  const uint4 zero = make_uint4(0, 0, 0, 0);
  uint4 b[PER_WARP];
#pragma unroll
  for (int i = 0; i < PER_WARP; i++) {
    b[i] = zero;
    if (real && i < count) b[i] = load_kept(x + at + i * GROUP);
  }
  uint4 a[DEPTH][MS][2];
  auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
#pragma unroll
      for (int m = 0; m < MS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          a[i][m][half] = zero;
          if (from + i < count) a[i][m][half] = load_kept(rows[m][half] + (from + i) * GROUP);
        }
  };
  fetch(0);

  float squared = 0.f;
#pragma unroll
  for (int i = 0; i < PER_WARP; i++) squared += square(b[i].x) + square(b[i].y) + square(b[i].z) + square(b[i].w);
  squared += __shfl_xor_sync(~0u, squared, 1);
  squared += __shfl_xor_sync(~0u, squared, 2);
  if (quarter == 0) squares[warp * 8 + row] = squared;
  __syncthreads();
  squared = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) squared += squares[w * 8 + row];
  const float factor = rsqrtf(squared / INPUTS + EPS);
#pragma unroll
  for (int i = 0; i < PER_WARP; i++) {
    if (!real || i >= count) continue;
    const float4* const factors = (const float4*)(norm + (first + i) * GROUP + quarter * 8);
    const float4 p = __ldg(factors), q = __ldg(factors + 1);
    b[i].x = normed(b[i].x, factor, p.x, p.y);
    b[i].y = normed(b[i].y, factor, p.z, p.w);
    b[i].z = normed(b[i].z, factor, q.x, q.y);
    b[i].w = normed(b[i].w, factor, q.z, q.w);
    if ((first + i) % CLUSTER == rank) *(uint4*)(y + at + i * GROUP) = b[i];
  }

  float acc[MS][4] = {};
#pragma unroll
  for (int from = 0; from < PER_WARP; from += DEPTH) {
    if (from > 0) fetch(from);
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      if (from + i >= PER_WARP) continue;
      const uint4 in = b[min(from + i, PER_WARP - 1)];
#pragma unroll
      for (int m = 0; m < MS; m++) {
        const uint4 top = a[i][m][0], bottom = a[i][m][1];
        const u32 low[4] = {top.x, bottom.x, top.y, bottom.y}, high[4] = {top.z, bottom.z, top.w, bottom.w};
        mma_bf16(acc[m], low, in.x, in.y);
        mma_bf16(acc[m], high, in.z, in.w);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MS; m++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      sums[(warp * 8 + quarter * 2 + j % 2) * SUM_STRIDE + m * 16 + row + j / 2 * 8] = acc[m][j];
  __syncthreads();
  for (int i = thread; i < 8 * ROWS; i += THREADS) {
    const float* const of = sums + i / ROWS * SUM_STRIDE + i % ROWS;
    float sum = of[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum += of[w * 8 * SUM_STRIDE];
    ours[i] = sum;
  }
  cluster_sync();

  for (int own = rank + warp * CLUSTER; own < 8; own += WARPS * CLUSTER) {
    const int token = first_token + own;
    if (token >= TOKENS) break;
    float score[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int expert = min(i * 32 + lane, EXPERTS - 1);
      score[i] = cluster_load(shared_address(ours + own * ROWS + expert % ROWS), expert / ROWS);
    }
    choose(score, bias, lane, chosen + token * CHOSEN, weights + token * CHOSEN);
  }
  cluster_sync();  // the other blocks still read this one's memory
}
