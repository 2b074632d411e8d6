// What lies between the QKV projection and attention: norms of the heads of queries and keys, rotation by position, and
// the writing of keys and values into their pages, in one pass. A group of lanes takes a head of a token; each of them
// has 8 neighbouring dims of both halves of the head, which rotate against each other. The projection may come
// unfinished, see rows.cuh.
//
// Macros: those of rows.cuh (COLUMNS are (HEADS + 2K) H); HEADS of queries; K KV heads; H head dim; O tokens of a page;
// FP8 (pages are e4m3); NORM, EPS. Grid: T, and enough for N + 2K heads.
#include "rows.cuh"

constexpr int N = HEADS, UNITS = H / 16;  // of a half
constexpr int LANES = UNITS > 8 ? 16 : UNITS > 4 ? 8 : 4;
static_assert(H % 16 == 0 && UNITS <= 16 && COLUMNS == (N + 2 * K) * H, "sizes");

extern "C" __global__ void __launch_bounds__(THREADS) rope_write(
    const void* qkv,            // [SPLITS, T, N + 2K, H]
    const float* row_scale,     // [T]
    const float* column_scale,  // [N + 2K, H]
    const float* cosine,        // [T, H / 2]
    const float* sine,          // [T, H / 2]
    const int* page, const int* slot,          // [T]
    const float* q_norm, const float* k_norm,  // [H]
    const u8*,                  // the pool, which is written in place
    u16* q,                     // [T, N, H]
    u8* kv                      // [P, 2, K, O, H]
) {
  const int token = blockIdx.x, part = threadIdx.x % LANES;
  const int head = blockIdx.y * (THREADS / LANES) + threadIdx.x / LANES;
  const bool mine = head < N + 2 * K && part < UNITS, is_value = head >= N + K;
  float a[8], b[8], c[8], s[8], p[8], r[8];  // the halves; cosine and sine; the halves' norm
#pragma unroll
  for (int j = 0; j < 8; ++j) a[j] = b[j] = 0.f;
  size_t place = 0;
  if (mine) {
    load_product(qkv, row_scale, column_scale, gridDim.x, token, head * 2 * UNITS + part, a);
    load_product(qkv, row_scale, column_scale, gridDim.x, token, (head * 2 + 1) * UNITS + part, b);
    if (!is_value) {
      load_floats(cosine, (size_t)token * UNITS + part, c);
      load_floats(sine, (size_t)token * UNITS + part, s);
      if (NORM) {
        load_floats(head < N ? q_norm : k_norm, part, p);
        load_floats(head < N ? q_norm : k_norm, UNITS + part, r);
      }
    }
    if (head >= N) place = (((size_t)page[token] * 2 + is_value) * K + (head - N) % K) * O + slot[token];
  }
  if (NORM) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += a[j] * a[j] + b[j] * b[j];
#pragma unroll
    for (int by = LANES / 2; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    const float factor = rsqrtf(sum / H + (float)EPS);
    if (mine && !is_value) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        a[j] = a[j] * factor * p[j];
        b[j] = b[j] * factor * r[j];
      }
      round_unit(a);  // the norm's result has the dtype of what it norms
      round_unit(b);
    }
  }
  if (!mine) return;
  if (!is_value)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float first = a[j] * c[j] - b[j] * s[j];
      b[j] = b[j] * c[j] + a[j] * s[j];
      a[j] = first;
    }
  const size_t to = (head < N ? (size_t)token * N + head : place) * 2 * UNITS + part;
  if (head < N) {
    store_unit(q, to, a);
    store_unit(q, to + UNITS, b);
  } else if (FP8) {
    round_unit(a);  // pages of eight bits have what bfloat16 rounds to
    round_unit(b);
    store_e4m3(kv, to, a, 1.f);
    store_e4m3(kv, to + UNITS, b, 1.f);
  } else {
    store_unit(kv, to, a);
    store_unit(kv, to + UNITS, b);
  }
}
