// What lies between the QKV projection and attention: norms of the heads of queries and keys, rotation by position, and
// the writing of keys and values into their pages, in one pass. A warp takes a head of a token; its lanes hold pairs of
// neighbouring dims of both halves of the head, which rotate against each other.
//
// With few tokens neither this nor attention keeps the memory busy: more blocks let the second-level cache fetch AHEAD
// bytes of `ahead`, the weight that is read after attention.
//
// Macros: HEADS of queries; K KV heads; H head dim; O tokens of a page; WARPS; FP8 (pages are e4m3); NORM, EPS; AHEAD.
// Grid: T, and enough for N + 2K heads, and for AHEAD_PIECE bytes of AHEAD for each thread.
#include "cluster.cuh"

constexpr int N = HEADS, HALF = H / 2, PAIRS = (HALF + 63) / 64, BLOCKS = (N + 2 * K + WARPS - 1) / WARPS;
constexpr u32 AHEAD_PIECE = 2048;

DEVICE float low_of(u32 two) { return bf16_to_float((u16)two); }
DEVICE float high_of(u32 two) { return bf16_to_float((u16)(two >> 16)); }

extern "C" __global__ void __launch_bounds__(WARPS * 32) rope_write(
    const u16* qkv,       // [T, N + 2K, H]
    const float* cosine,  // [T, H / 2]
    const float* sine,    // [T, H / 2]
    const int* page, const int* slot,  // [T]
    const float* q_norm, const float* k_norm,  // [H]
    const u8* ahead,      // [AHEAD] and more
    const u8*,            // the pool, which is written in place
    u16* q,               // [T, N, H]
    u8* kv                // [P, 2, K, O, H]
) {
  const int token = blockIdx.x, head = blockIdx.y * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (AHEAD && blockIdx.y >= BLOCKS) {
    const size_t at = (((blockIdx.y - BLOCKS) * (size_t)gridDim.x + token) * WARPS * 32 + threadIdx.x) * AHEAD_PIECE;
    if (at < AHEAD) prefetch(ahead + at, AHEAD - at < AHEAD_PIECE ? AHEAD - at : AHEAD_PIECE);
    return;
  }
  if (head >= N + 2 * K) return;
  const u32* from = (const u32*)(qkv + ((size_t)token * (N + 2 * K) + head) * H);
  const bool is_value = head >= N + K;
  float x[PAIRS][2][2];  // of a pair of dims, of a half
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool mine = i * 64 + 2 * lane < HALF;
      const u32 two = mine ? from[half * HALF / 2 + i * 32 + lane] : 0u;
      x[i][half][0] = low_of(two);
      x[i][half][1] = high_of(two);
    }
  if (NORM && !is_value) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += x[i][j / 2][j % 2] * x[i][j / 2][j % 2];
#pragma unroll
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    const float factor = rsqrtf(sum / H + (float)EPS);
    const float* const weight = head < N ? q_norm : k_norm;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (i * 64 + 2 * lane >= HALF) continue;
        const float2 w = *(const float2*)(weight + half * HALF + i * 64 + 2 * lane);
        // The norm's result has the dtype of what it norms.
        const u32 two = pack_bf16(x[i][half][0] * factor * w.x, x[i][half][1] * factor * w.y);
        x[i][half][0] = low_of(two);
        x[i][half][1] = high_of(two);
      }
  }
  const size_t place = (((size_t)page[token] * 2 + is_value) * K + (head - N) % K) * O + slot[token];
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const int dim = i * 64 + 2 * lane;
    if (dim >= HALF) continue;
    if (!is_value) {
      const float2 c = *(const float2*)(cosine + (size_t)token * HALF + dim);
      const float2 s = *(const float2*)(sine + (size_t)token * HALF + dim);
      const float a[2] = {x[i][0][0], x[i][0][1]}, b[2] = {x[i][1][0], x[i][1][1]};
      x[i][0][0] = a[0] * c.x - b[0] * s.x;
      x[i][0][1] = a[1] * c.y - b[1] * s.y;
      x[i][1][0] = b[0] * c.x + a[0] * s.x;
      x[i][1][1] = b[1] * c.y + a[1] * s.y;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = x[i][half][0], high = x[i][half][1];
      const int at = half * HALF + dim;
      const u32 two = pack_bf16(low, high);
      if (head < N) *(u32*)(q + ((size_t)token * N + head) * H + at) = two;
      else if (FP8) *(u16*)(kv + place * H + at) = pack_e4m3(low_of(two), high_of(two));
      else *(u32*)((u16*)kv + place * H + at) = two;
    }
  }
}
