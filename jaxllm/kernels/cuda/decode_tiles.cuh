// What a warp of decode attention does with 16 tokens in its stage of shared memory: products with queries and of weights
// with values, and a new token's rotation. Macros and layout are those of paged_decode.cuh.
#pragma once
#include "ptx.cuh"

constexpr int N = K * G, M = G * Q, ITEMS = K;
constexpr int TOKENS = 16, BLOCK = WARPS * TOKENS, THREADS = WARPS * 32;
constexpr int ROW = FP8 ? H : 2 * H;              // bytes of a token's key or value
constexpr int CHUNKS = ROW / 16;                  // of 16 bytes
constexpr int PLANE = TOKENS * ROW;               // a warp's keys, or values, of one block
constexpr int STAGE = 2 * PLANE;
constexpr int MAXIMA = WARPS * STAGES * STAGE;     // of each warp, and then their sums
constexpr int ANGLES = MAXIMA + 2 * WARPS * 16 * 4;  // cosines and sines of a row, for each stage of each warp
constexpr int TABLES = ANGLES + (ROPE ? WARPS * STAGES * H * 4 : 0);
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static_assert(M <= 16 && H % 32 == 0 && O % TOKENS == 0, "not what this kernel was written for");
static_assert(8 * H * 4 <= STAGE, "warps leave eight rows of results in a stage");
static_assert(!ROPE || (Q == 1 && !FP8 && !FIRST), "what is rotated here");
constexpr int HEADS_OF_ROW = ROPE ? N + 2 * K : N;  // of what queries are among

// Where a chunk of a token lies in its row of shared memory, so that 8 tokens' equal chunks lie in different banks.
DEVICE u32 chunk_at(int token, int chunk) {
  const int flip = CHUNKS % 8 == 0 ? token & 7 : CHUNKS % 4 == 0 ? token >> 1 & 3 : token >> 2 & 1;
  return token * ROW + ((chunk ^ flip) << 4);
}

// Where a dim of a row of a warp's results lies in its stage, in floats; four rows lie in different banks.
DEVICE int result_at(int m, int dim) { return m % 8 * H + (dim ^ (m & 3) << 3); }

// Rotates two dims of the first half of a head against those of the second.
DEVICE void rotate(u32& first, u32& second, float2 c, float2 s) {
  const float a = bf16_to_float((u16)first), b = bf16_to_float((u16)(first >> 16));
  const float x = bf16_to_float((u16)second), y = bf16_to_float((u16)(second >> 16));
  first = pack_bf16(a * c.x - x * s.x, b * c.y - y * s.y);
  second = pack_bf16(x * c.x + a * s.x, y * c.y + b * s.y);
}

// Rotates the new key in a warp's block in shared memory, that of `token`, which is as the projection has it, and brings
// it and the value to their page, at `to`. A lane has 16 bytes of both halves of the key. angles: cosines, then sines.
DEVICE void bring_new(u8* keys, const float* angles, u8* to, int token, int lane) {
  if (lane < H / 16) {
    uint4* const first = (uint4*)(keys + chunk_at(token, lane));
    uint4* const second = (uint4*)(keys + chunk_at(token, lane + H / 16));
    uint4 a = *first, b = *second;
    const float4* const c = (const float4*)angles + lane * 2;
    const float4* const s = (const float4*)(angles + H / 2) + lane * 2;
    rotate(a.x, b.x, make_float2(c[0].x, c[0].y), make_float2(s[0].x, s[0].y));
    rotate(a.y, b.y, make_float2(c[0].z, c[0].w), make_float2(s[0].z, s[0].w));
    rotate(a.z, b.z, make_float2(c[1].x, c[1].y), make_float2(s[1].x, s[1].y));
    rotate(a.w, b.w, make_float2(c[1].z, c[1].w), make_float2(s[1].z, s[1].w));
    *first = a;
    *second = b;
    ((uint4*)to)[lane] = a;
    ((uint4*)to)[lane + H / 16] = b;
  }
  for (int i = lane; i < CHUNKS; i += 32)
    ((uint4*)(to + (size_t)K * O * ROW))[i] = *(const uint4*)(keys + PLANE + chunk_at(token, i));
  __syncwarp();
}

// The words of the queries that a lane multiplies: of fragment rows lane / 4 and 8 further.
DEVICE void load_queries(
    u32 (&query)[H / 16][4], const u16* q, const float* cosine, const float* sine, int row, int head, int lane
) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = lane / 4 + half * 8;
    const u16* from = q + ((size_t)(row * Q + m / G) * HEADS_OF_ROW + head * G + m % G) * H;
#pragma unroll
    for (int step = 0; step < H / 16; ++step)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        // With e4m3 a lane has the keys' dims in fours: the order of dims in a product is free.
        const int dim = step * 16 + (FP8 ? lane % 4 * 4 + part * 2 : lane % 4 * 2 + part * 8);
        u32 two = m < M ? *(const u32*)(from + dim) : 0u;
        if (FP8) two = pack_f16(bf16_to_float((u16)two), bf16_to_float((u16)(two >> 16)));
        query[step][half + 2 * part] = two;
      }
  }
  if (!ROPE) return;
#pragma unroll
  for (int step = 0; step < H / 32; ++step)
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const size_t at = (size_t)row * (H / 2) + step * 16 + lane % 4 * 2 + part * 8;
      const float2 c = __ldg((const float2*)(cosine + at)), s = __ldg((const float2*)(sine + at));
#pragma unroll
      for (int half = 0; half < 2; ++half) rotate(query[step][half + 2 * part], query[step + H / 32][half + 2 * part], c, s);
    }
}

// Scores of 16 queries and 16 tokens, as accumulators of two products.
DEVICE void multiply_keys(float (&scores)[2][4], const u32 (&query)[H / 16][4], u32 keys, int lane) {
  float s[2][2][4] = {};  // of every second product: each waits for the one before
#if FP8
  const int token = lane & 15, right = lane >> 4;
#pragma unroll
  for (int step = 0; step < H / 16; step += 2) {
    u32 r[4];
    ldmatrix_x4(r, keys + chunk_at(token, step + right));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma_f16(s[i / 2][i & 1], query[step + i / 2], e4m3_to_f16((u16)r[i]), e4m3_to_f16((u16)(r[i] >> 16)));
  }
#else
  const int token = (lane >> 4) * 8 + (lane & 7), right = lane >> 3 & 1;
#pragma unroll
  for (int step = 0; step < H / 16; ++step) {
    u32 r[4];
    ldmatrix_x4(r, keys + chunk_at(token, 2 * step + right));
    mma_bf16(s[step % 2][0], query[step], r[0], r[1]);
    mma_bf16(s[step % 2][1], query[step], r[2], r[3]);
  }
#endif
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] = s[0][n][j] + s[1][n][j];
}

// out += weights @ values of 16 tokens.
DEVICE void multiply_values(float (&out)[H / 8][4], const float (&weights)[2][4], u32 values, int lane) {
  const int token = lane & 15, right = lane >> 4;
  u32 a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = weights[i / 2][i % 2 * 2], high = weights[i / 2][i % 2 * 2 + 1];
    a[i] = FP8 ? pack_f16(low, high) : pack_bf16(low, high);
  }
#if FP8
#pragma unroll
  for (int step = 0; step < H / 16; step += 2) {
    u32 r[4];
    ldmatrix_x4_trans(r, values + chunk_at(token, step + right));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Each word has dims 2n and 2n + 1 of two tokens: apart, they are columns of two products.
      const u32 top = select_bytes(r[2 * i], 0, 0x3120), bottom = select_bytes(r[2 * i + 1], 0, 0x3120);
      mma_f16(out[2 * (step + i)], a, e4m3_to_f16((u16)top), e4m3_to_f16((u16)bottom));
      mma_f16(out[2 * (step + i) + 1], a, e4m3_to_f16((u16)(top >> 16)), e4m3_to_f16((u16)(bottom >> 16)));
    }
  }
#else
#pragma unroll
  for (int step = 0; step < H / 16; ++step) {
    u32 r[4];
    ldmatrix_x4_trans(r, values + chunk_at(token, 2 * step + right));
    mma_bf16(out[2 * step], a, r[0], r[1]);
    mma_bf16(out[2 * step + 1], a, r[2], r[3]);
  }
#endif
}

// The dim of accumulator out[n][i] of a lane (i of 0 and 1).
DEVICE int dim_of(int n, int i, int lane) {
  return FP8 ? n / 2 * 16 + lane % 4 * 4 + i * 2 + n % 2 : n * 8 + lane % 4 * 2 + i;
}

DEVICE float score(float product) {
  if (SOFTCAP == 0) return product * (float)(SCALE * LOG2E);
  // tanh(x) = 1 - 2 / (1 + e^2x)
  const float power = fast_exp2(fminf(product * (float)(SCALE / (SOFTCAP ? SOFTCAP : 1) * 2 * LOG2E), 80.f));
  return (float)(SOFTCAP * LOG2E) * (1.f - 2.f * fast_reciprocal(1.f + power));
}
