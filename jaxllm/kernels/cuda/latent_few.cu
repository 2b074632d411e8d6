// Attention of one query token per row over paged latents, as latent_many.cu has it, for few query heads (a tensor-
// parallel share of them): memory decides, and products must not take rows that hold no heads.
//
// So heads are the columns of both products, of which matrix instructions have as few as eight:
//   scores^T [BLOCK tokens, heads] = latents @ queries^T
//   result^T [VALUES, heads] = result^T * shrinking + latents^T @ weights^T
// One warpgroup does both; the others bring blocks of BLOCK tokens into STAGES stages. One CTA stays on each SM; how they
// share the work is in shares.cuh.
//
// Macros: HEADS of queries, at most HEADS_ROOM: 8 or 16; H; VALUES; O tokens of a page; W pages of a row; BLOCK: 64;
// STAGES; CTAS; MIN_SHARE; WHOLE; SCALE; FIRST.
// Grid: R, and then enough to have CTAS; the number of rows R is read from it, so that one program serves all of them.
#define GRID_BARRIER  // all CTAs run at once
#define ITEMS_IN_EQUAL_PARTS
#define COUNTED_BY_WARPS 1

constexpr int Q = 1, ITEMS = 1, N = HEADS_ROOM;
constexpr int WARPS = 12, THREADS = WARPS * 32, COPIERS = (THREADS - 128) / STAGES;
// Shared memory: queries, stages, weights, what warps tell each other, barriers, what is to be merged, tables.
constexpr int QUERY_PANEL = N * 128, KV_AT = H / 64 * QUERY_PANEL;
#include "latent.cuh"

constexpr int WEIGHTS_AT = KV_AT + STAGES * STAGE, TOLD_AT = WEIGHTS_AT + N * ROW;
constexpr int BARRIERS_AT = TOLD_AT + 4 * N * 4, UNMERGED_AT = BARRIERS_AT + 16 * STAGES, TABLES_AT = UNMERGED_AT + 48;
static_assert(BLOCK == 64 && VALUES == 512 && HEADS <= N && KV_AT % 1024 == 0, "not what this kernel was written for");

// The warpgroup that has products. A thread has heads 8 i + 2 (lane % 4) + j of scores and results, i < N / 8, j < 2, of
// which elements 4 i + j and 4 i + 2 + j are.
struct Attention {
  u8* shared;
  u32 smem;
  int thread, lane, warp, pair;
  float o[VALUES / 64][N / 2], s[N / 2], top[N / 4], sum[N / 4];

  DEVICE Attention(u8* shared, u32 smem, int thread)
      : shared(shared), smem(smem), thread(thread), lane(thread % 32), warp(thread / 32), pair(thread % 4 * 2) {}

  DEVICE void load_queries(const u16* from) {
    named_sync(1, 128);  // all have used those before
#pragma unroll 3
    for (int at = thread; at < N * H / 8; at += 128) {
      const int m = at / (H / 8), chunk = at % (H / 8);
      const u32 to = smem + chunk / 8 * QUERY_PANEL + m * ROW + ((chunk % 8 ^ m % 8) << 4);
      cp_async_16(to, from + (m < HEADS ? (size_t)at * 8 : 0), m < HEADS ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_products();
    named_sync(1, 128);
  }

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < VALUES / 64; ++i)
#pragma unroll
      for (int j = 0; j < N / 2; ++j) o[i][j] = 0.f;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) top[i] = MASKED, sum[i] = 0.f;
  }

  // Of what the four warps have for each head: all of it, in every thread.
  template <class Combine>
  DEVICE void over_warps(float (&x)[N / 4], Combine combine) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
#pragma unroll
      for (int by = 4; by < 32; by *= 2) x[i] = combine(x[i], __shfl_xor_sync(~0u, x[i], by));
    float* const told = (float*)(shared + TOLD_AT);
    if (lane < 4) {
#pragma unroll
      for (int i = 0; i < N / 8; ++i) *(float2*)(told + warp * N + i * 8 + pair) = make_float2(x[2 * i], x[2 * i + 1]);
    }
    named_sync(1, 128);
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      float2 all = *(float2*)(told + i * 8 + pair);
#pragma unroll
      for (int w = 1; w < 4; ++w) {
        const float2 other = *(float2*)(told + w * N + i * 8 + pair);
        all = make_float2(combine(all.x, other.x), combine(all.y, other.y));
      }
      x[2 * i] = all.x, x[2 * i + 1] = all.y;
    }
  }

  DEVICE void multiply_keys(u32 stage) {
    const u64 keys = matrix_descriptor(uniform(stage), ROW, 16, 8 * ROW);
    const u64 query = matrix_descriptor(uniform(smem), ROW, 16, 8 * ROW);
    wgmma_pin(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < H / 16; ++i) {
      const int inside = i % 4 * 32;
      const u64 key = descriptor_at(keys, i / 4 * PANEL + inside);
      Wgmma<N>::ss(s, key, descriptor_at(query, i / 4 * QUERY_PANEL + inside), i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
  }

  // Makes weights of scores of tokens from `token` on, of which those from `lowest` to `last` are seen.
  DEVICE void make_weights(int token, int lowest, int last) {
    const int key = warp * 16 + lane / 4;
    const bool all_seen = token + BLOCK - 1 <= last && (!FIRST || token >= lowest);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int at = token + key + i / 2 % 2 * 8;
      s[i] = all_seen || at <= last && (!FIRST || at >= lowest) ? s[i] * (float)(SCALE * LOG2E) : MASKED;
    }
    float high[N / 4], keep[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) high[i] = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]);
    over_warps(high, [](float a, float b) { return fmaxf(a, b); });
    bool shrinks = false;
    u16* const weights = (u16*)(shared + WEIGHTS_AT);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      high[i] = fmaxf(high[i], top[i]);
      keep[i] = fast_exp2(top[i] - high[i]);
      shrinks |= keep[i] != 1.f;
      top[i] = high[i];
      float& x = s[i / 2 * 4 + i % 2];
      float& y = s[i / 2 * 4 + 2 + i % 2];
      x = fast_exp2(x - high[i]);
      y = fast_exp2(y - high[i]);
      sum[i] = sum[i] * keep[i] + (x + y);
      const int head = i / 2 * 8 + pair + i % 2;
      const u32 two = pack_bf16(x, y);
      u16* const row = weights + head * 64 + key % 8;
      row[(key / 8 ^ head % 8) * 8] = (u16)two;
      row[(key / 8 + 1 ^ head % 8) * 8] = (u16)(two >> 16);
    }
    fence_products();
    if (__any_sync(~0u, shrinks)) {
#pragma unroll
      for (int i = 0; i < VALUES / 64; ++i)
#pragma unroll
        for (int j = 0; j < N / 2; ++j) o[i][j] *= keep[j / 4 * 2 + j % 2];
    }
    named_sync(1, 128);
  }

  DEVICE void multiply_values(u32 stage) {
    const u64 values = matrix_descriptor(uniform(stage), ROW, PANEL, 8 * ROW);
    const u64 weights = matrix_descriptor(uniform(smem) + WEIGHTS_AT, ROW, 16, 8 * ROW);
#pragma unroll
    for (int i = 0; i < VALUES / 64; ++i) wgmma_pin(o[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < VALUES / 64; ++i)
#pragma unroll
      for (int k = 0; k < BLOCK / 16; ++k)
        Wgmma<N>::ss_mn(o[i], descriptor_at(values, i * PANEL + k * 16 * ROW), descriptor_at(weights, k * 32));
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < VALUES / 64; ++i) wgmma_pin(o[i]);
  }
};

// All that the warpgroup does; what is left to merge comes in `unmerged`.
DEVICE void attend(
    u8* shared, u32 smem, const Rows& rows, const Work& work, const u16* q, const int* first, u16* out, float* lse,
    float* part_out, float* part_lse, int* finished, Unmerged* unmerged, int thread
) {
  Attention attention(shared, smem, thread);
  const int lane = thread % 32, pair = lane % 4 * 2;
  const u32 barriers = smem + BARRIERS_AT;
  Walk walk = work.walk;
  int blocks = 0;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
    const size_t target = (size_t)run.row * HEADS;
    attention.load_queries(q + target * H);
    attention.clear();
    const int lowest = FIRST ? first[run.row] : 0;
#pragma unroll 1
    for (int block = 0; block < run.blocks; ++block, ++blocks) {
      const int stage = blocks % STAGES;
      const u32 at = smem + KV_AT + stage * STAGE;
      barrier_wait(full_of(barriers, stage), blocks / STAGES & 1);
      attention.multiply_keys(at);
      attention.make_weights(run.token + block * BLOCK, lowest, run.last);
      attention.multiply_values(at);
      if (lane == 0) barrier_arrive(freed_of(barriers, stage));
    }
    attention.over_warps(attention.sum, [](float a, float b) { return a + b; });
    const Part part = work.part_of(rows, run);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int head = i / 2 * 8 + pair + i % 2;
      const float log = attention.top[i] < UNSEEN ? MASKED : attention.top[i] + fast_log2(attention.sum[i]);
      const float inverse = 1.f / attention.sum[i];
      if (head >= HEADS) continue;
      const size_t slot = (size_t)part.slot * HEADS + head;
      if (thread < 4) {
        if (part.complete()) lse[target + head] = log < UNSEEN ? MASKED : log * LN2;
        else part_lse[slot] = log;
      }
#pragma unroll
      for (int j = 0; j < VALUES / 32; ++j) {
        const int dim = j / 2 * 64 + thread / 32 * 16 + lane / 4 + j % 2 * 8;
        const float x = attention.o[j / 2][i / 2 * 4 + j % 2 * 2 + i % 2] * inverse;
        if (part.complete()) out[(target + head) * VALUES + dim] = (u16)pack_bf16(x, 0.f);
        else part_out[slot * VALUES + dim] = x;
      }
    }
    if (part.complete()) continue;
    __threadfence();
    named_sync(1, 128);
    if (thread == 0) {
      atomicAdd(finished + part.from, 1);
      unmerged[unmerged[0].part.complete() ? 0 : 1] = {part, target};
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) latent_few(
    const u16* q,          // [R, HEADS, H]
    const u16* kv,         // [P, O, H]
    const int* pages,      // [R, W]
    const int* positions,  // [R]
    const int* first,      // [R]
    const int*,            // `finished`, which begins as zeros
    u16* out,              // [R, HEADS, VALUES]
    float* lse,            // [R, HEADS]
    float* part_out,       // [2 CTAS, HEADS, VALUES]
    float* part_lse,       // [2 CTAS, HEADS], to the base 2
    int* finished          // [CTAS], of the item that begins in the CTA and does not end there: parts that are there
) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int cta = blockIdx.y * gridDim.x + blockIdx.x, thread = threadIdx.x;
  if (cta >= CTAS) return;
  const u32 barriers = smem + BARRIERS_AT;
  Unmerged* const unmerged = (Unmerged*)(shared + UNMERGED_AT);
  if (thread == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full_of(barriers, stage), COPIERS);
      barrier_init(freed_of(barriers, stage), 4);
    }
    barrier_init_fence();
    unmerged[0] = unmerged[1] = {{0, 0, 0}, 0};
  }
  const Rows rows(shared + TABLES_AT, gridDim.x);
  const Work work(rows, positions, first, cta);
  __syncthreads();
#pragma unroll 1
  for (int r = cta; r < rows.count; r += CTAS) {  // rows that see nothing
    if (rows.last[r] >= 0) continue;
#pragma unroll 1
    for (int i = thread; i < HEADS * VALUES / 2; i += THREADS) ((u32*)out)[(size_t)r * (HEADS * VALUES / 2) + i] = 0;
#pragma unroll 1
    for (int i = thread; i < HEADS; i += THREADS) lse[r * HEADS + i] = MASKED;
  }
  if (thread < 128) attend(shared, smem, rows, work, q, first, out, lse, part_out, part_lse, finished, unmerged, thread);
  else copy(smem, barriers, rows, work.walk, kv, pages, (thread - 128) / COPIERS, (thread - 128) % COPIERS);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 2; ++i)
    merge_share<VALUES, HEADS, WARPS>(
        part_out, part_lse, out, lse, finished, unmerged[i], cta, shared, thread / 32, thread % 32,
        [] { __syncthreads(); }
    );
}
