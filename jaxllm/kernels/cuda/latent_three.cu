// Attention of one query token per row over paged latents (multi-head latent attention, absorbed): all query heads read
// the same H numbers of a token, of which the first VALUES are its value too (FlashMLA; FlashDecoding).
//
// What bounds it: a token is 2H bytes and, for each query head, 2 (H + VALUES) floating-point operations. With 128 heads
// that is 242 operations per byte, more than the 173 that an H200 does in the time of a byte: products decide. With 64
// and fewer, whose products are done 64 rows at a time all the same, memory decides.
//
// An item of work is a row's tile of 64 query heads; see shares.cuh. One CTA stays on each SM, of four warpgroups:
//   copy     brings blocks of BLOCK tokens into STAGES stages; each has warps of its own, so that none waits for others
//   scores   queries @ latents, softmax; leaves the weights, and by how much older results shrink
//   values   two of them: result = result * shrinking + weights @ latents, half of the VALUES numbers each
// so that the products of scores overlap with those of values of the block before, and the softmax with both.
//
// Macros: HEADS of queries; H; VALUES; O tokens of a page; W pages of a row; BLOCK: 64, or 32, which keeps more under way
// and makes more of the same reads of shared memory; CTAS; MIN_SHARE; WHOLE; SCALE; FIRST.
// Grid: R, and then enough to have CTAS; the number of rows R is read from it, so that one program serves all of them.
#define GRID_BARRIER  // all CTAs run at once
#define ITEMS_IN_EQUAL_PARTS
#define BLOCK 64

constexpr int TILE = 64, STAGES = 2, Q = 1;
constexpr int ITEMS = (HEADS + TILE * CLUSTER - 1) / (TILE * CLUSTER), M = HEADS < TILE ? HEADS : TILE;
constexpr int WARPS = 16, THREADS = WARPS * 32, COPIERS = 128;
// Shared memory: queries, stages of latents, weights, factors of rows, lse of rows, barriers, tables.
constexpr int QUERY_PANEL = TILE * 128, KV_AT = H / 64 * QUERY_PANEL;
#include "latent.cuh"

constexpr int WEIGHTS_AT = KV_AT + STAGES * STAGE;
constexpr int FACTORS_AT = WEIGHTS_AT + TILE * BLOCK * 2;
constexpr int LSE_AT = FACTORS_AT + TILE * 4, BARRIERS_AT = LSE_AT + TILE * 4;
constexpr int READY_AT = 0, FREED_AT = BARRIERS_AT + 8 * STAGES * PANELS;
constexpr int WEIGHTS_MADE = FREED_AT + 16 * STAGES, WEIGHTS_FREED = WEIGHTS_MADE + 8;
constexpr int UNMERGED_AT = WEIGHTS_FREED + 8, TABLES_AT = UNMERGED_AT + 48;
static_assert(VALUES == 512 && ITEMS * CLUSTER * M == HEADS, "not what this kernel was written for");
#include "latent_copies.cuh"

// A warpgroup that makes weights of scores.
DEVICE void make_weights(
    u8* shared, u32 smem, const Rows& rows, Walk walk, const u16* q, const int* first, int rank,
    int thread
) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  uint4* const weights = (uint4*)(shared + WEIGHTS_AT);
  float* const factors = (float*)(shared + FACTORS_AT);
  float* const logs = (float*)(shared + LSE_AT);
  const u64 query = matrix_descriptor(smem, ROW, 16, 8 * ROW);
  float s[BLOCK / 2];
  int blocks = 0, messages = 0;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
    named_sync(1, 128);  // all have used the queries before
    const u16* from = q + ((size_t)run.row * HEADS + (run.item * CLUSTER + rank) * TILE) * H;
#pragma unroll 4
    for (int i = 0; i < TILE * H / 8 / 128; ++i) {
      const int at = i * 128 + thread, m = at / (H / 8), chunk = at % (H / 8);
      const u32 to = smem + chunk / 8 * QUERY_PANEL + m * ROW + ((chunk % 8 ^ m % 8) << 4);
      cp_async_16(to, from + (m < M ? (size_t)at * 8 : 0), m < M ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_products();
    named_sync(1, 128);
    const int lowest = FIRST ? first[run.row] : 0;
    float top[2] = {MASKED, MASKED}, sum[2] = {0.f, 0.f};
#pragma unroll 1
    for (int block = 0; block < run.blocks; ++block, ++blocks) {
      const int stage = blocks % STAGES;
      const u64 keys = matrix_descriptor(smem + KV_AT + stage * STAGE, ROW, 16, 8 * ROW);
      wgmma_pin(s);
#pragma unroll
      for (int i = 0; i < H / 16; ++i) {
        const int inside = i % 4 * 32;
        if (i % 4 == 0) {
          barrier_wait(panel_full(smem, stage, i / 4), blocks / STAGES & 1);
          wgmma_fence();
        }
        Wgmma<BLOCK>::ss(s, query + (i / 4 * QUERY_PANEL + inside) / 16, keys + (i / 4 * PANEL + inside) / 16, i > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(s);
      const int token = run.token + block * BLOCK + lane % 4 * 2;
      if (token - lane % 4 * 2 + BLOCK > run.last || FIRST) {
#pragma unroll
        for (int i = 0; i < BLOCK / 2; ++i) {
          const int key = token + i / 4 * 8 + i % 2;
          s[i] = key <= run.last && (!FIRST || key >= lowest) ? s[i] * (float)(SCALE * LOG2E) : MASKED;
        }
      } else {
#pragma unroll
        for (int i = 0; i < BLOCK / 2; ++i) s[i] *= (float)(SCALE * LOG2E);
      }
      float keep[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = top[half], total = 0.f;
#pragma unroll
        for (int i = 0; i < BLOCK / 8; ++i) high = fmaxf(high, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        keep[half] = fast_exp2(top[half] - high);
        top[half] = high;
#pragma unroll
        for (int i = 0; i < BLOCK / 8; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[i * 4 + half * 2 + j];
            x = fast_exp2(x - high);
            total += x;
          }
        sum[half] = sum[half] * keep[half] + total;
      }
      const int seen = run.last - (run.token + block * BLOCK) + 1;
      if (seen < BLOCK) {  // what nobody sees may be anything, also NaNs
#pragma unroll 1
        for (int at = thread; at < (BLOCK - seen) * VALUES / 8; at += 128) {
          const int panel = at % (VALUES / 64), chunk = at / (VALUES / 64);
          *(uint4*)(shared + KV_AT + stage * STAGE + panel * PANEL + seen * ROW + chunk * 16) = make_uint4(0, 0, 0, 0);
        }
        fence_products();
      }
      barrier_wait(smem + WEIGHTS_FREED, messages & 1 ^ 1);
#pragma unroll
      for (int i = 0; i < BLOCK / 16; ++i)
        weights[i * 128 + thread] =
            make_uint4(pack_bf16(s[i * 8], s[i * 8 + 1]), pack_bf16(s[i * 8 + 2], s[i * 8 + 3]),
                       pack_bf16(s[i * 8 + 4], s[i * 8 + 5]), pack_bf16(s[i * 8 + 6], s[i * 8 + 7]));
      if (lane % 4 == 0) {
        factors[row] = keep[0];
        factors[row + 8] = keep[1];
      }
      barrier_arrive(smem + WEIGHTS_MADE);
      ++messages;
    }
    // At the end, what remains to be multiplied.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
    barrier_wait(smem + WEIGHTS_FREED, messages & 1 ^ 1);
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factors[row + half * 8] = 1.f / sum[half];
        logs[row + half * 8] = top[half] < UNSEEN ? MASKED : top[half] + fast_log2(sum[half]);
      }
    }
    barrier_arrive(smem + WEIGHTS_MADE);
    ++messages;
  }
}

// A warpgroup that has columns group * VALUES / 2 and so on of the results.
DEVICE void multiply_values(
    u8* shared, u32 smem, const Rows& rows, const Work& work, u16* out, float* lse,
    float* part_out, float* part_lse, int* finished, int rank, int group, int thread
) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  const uint4* const weights = (const uint4*)(shared + WEIGHTS_AT);
  const float* const factors = (const float*)(shared + FACTORS_AT);
  const float* const logs = (const float*)(shared + LSE_AT);
  Walk walk = work.walk;
  Unmerged* const unmerged = (Unmerged*)(shared + UNMERGED_AT);
  // Two halves: one product of 256 columns wants more registers than a thread has when it begins.
  float o[2][VALUES / 8];
  int blocks = 0, messages = 0;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
#pragma unroll
    for (int i = 0; i < VALUES / 8; ++i) o[0][i] = o[1][i] = 0.f;
#pragma unroll 1
    for (int block = 0; block < run.blocks; ++block, ++blocks) {
      barrier_wait(smem + WEIGHTS_MADE, messages & 1);
      u32 p[BLOCK / 16][4];
#pragma unroll
      for (int i = 0; i < BLOCK / 16; ++i) {
        const uint4 four = weights[i * 128 + thread];
        p[i][0] = four.x, p[i][1] = four.y, p[i][2] = four.z, p[i][3] = four.w;
      }
      const float keep[2] = {factors[row], factors[row + 8]};
      const bool shrinks = __any_sync(~0u, keep[0] != 1.f || keep[1] != 1.f);
      if (lane == 0) barrier_arrive(smem + WEIGHTS_FREED);
      ++messages;
      if (shrinks) {
#pragma unroll
        for (int i = 0; i < VALUES / 8; ++i) {
          o[0][i] *= keep[i / 2 % 2];
          o[1][i] *= keep[i / 2 % 2];
        }
      }
      const int stage = blocks % STAGES;
      const u64 values =
          matrix_descriptor(smem + KV_AT + stage * STAGE + group * (VALUES / 2 / 64) * PANEL, ROW, PANEL, 8 * ROW);
      wgmma_pin(o[0]);
      wgmma_pin(o[1]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < BLOCK / 16; ++i)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          Wgmma<VALUES / 4>::rs(o[side], p[i], values + (side * (VALUES / 4 / 64) * PANEL + i * 16 * ROW) / 16);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(o[0]);
      wgmma_pin(o[1]);
      if (lane < CLUSTER) {
        if (CLUSTER == 1) barrier_arrive(half_freed(smem, stage, group));
        else cluster_arrive(half_freed(smem, stage, group), lane);
      }
    }
    barrier_wait(smem + WEIGHTS_MADE, messages & 1);
    const float inverse[2] = {factors[row], factors[row + 8]}, log[2] = {logs[row], logs[row + 8]};
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + WEIGHTS_FREED);
    ++messages;
    const Part part = work.part_of(rows, run);
    const size_t target = (size_t)run.row * HEADS + (run.item * CLUSTER + rank) * TILE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row + half * 8;
      if (m >= M) continue;
      const size_t slot = (size_t)part.slot * M + m;
#pragma unroll
      for (int i = 0; i < VALUES / 16; ++i) {
        const int dim = group * (VALUES / 2) + i * 8 + lane % 4 * 2;
        const float* const two = &o[i / (VALUES / 32)][i % (VALUES / 32) * 4 + half * 2];
        const float x = two[0] * inverse[half], y = two[1] * inverse[half];
        if (part.complete()) *(u32*)(out + (target + m) * VALUES + dim) = pack_bf16(x, y);
        else *(float2*)(part_out + slot * VALUES + dim) = make_float2(x, y);
      }
      if (group == 0 && lane % 4 == 0) {
        if (part.complete()) lse[target + m] = log[half] < UNSEEN ? MASKED : log[half] * LN2;
        else part_lse[slot] = log[half];
      }
    }
    if (part.complete()) continue;
    __threadfence();
    named_sync(2, 256);
    if (group == 0 && thread == 0) {
      atomicAdd(finished + part.from, 1);
      unmerged[unmerged[0].part.complete() ? 0 : 1] = {part, target};
    }
  }
  named_sync(2, 256);
  // All else that uses shared memory has been done: the last weights were.
#pragma unroll 1
  for (int i = 0; i < 2; ++i)
    merge_share<VALUES, M, 8>(
        part_out, part_lse, out, lse, finished, unmerged[i], work.cta, shared, group * 4 + thread / 32, lane,
        [] { named_sync(2, 256); }
    );
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) CLUSTER_OF(CLUSTER) latent_three(
    const u16* q,          // [R, HEADS, H]
    const u16* kv,         // [P, O, H]
    const int* pages,      // [R, W]
    const int* positions,  // [R]
    const int* first,      // [R]
    const int*,            // `finished`, which begins as zeros
    u16* out,              // [R, HEADS, VALUES]
    float* lse,            // [R, HEADS]
    float* part_out,       // [2 CTAS, M, VALUES]
    float* part_lse,       // [2 CTAS, M], to the base 2
    int* finished,         // [CLUSTER, CTAS], of the item that begins in the CTA and does not end there: parts that are there
  u8* maps               // [CLUSTER, CTAS, 128], of the latents
) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int index = blockIdx.y * gridDim.x + blockIdx.x, group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int cta = index / CLUSTER, rank = index % CLUSTER;
  if (cta >= CTAS) return;
  u8* const map = maps + index * 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      for (int panel = 0; panel < PANELS; ++panel) barrier_init(panel_full(smem, stage, panel), 1);
      for (int half = 0; half < 2; ++half) barrier_init(half_freed(smem, stage, half), 4 * CLUSTER);  // warps
    }
    barrier_init(smem + WEIGHTS_MADE, 128);
    barrier_init(smem + WEIGHTS_FREED, 8);
    barrier_init_fence();
    Unmerged* const unmerged = (Unmerged*)(shared + UNMERGED_AT);
    unmerged[0] = unmerged[1] = {{0, 0, 0}, 0};
  }
  if (threadIdx.x < 32)
    make_map(smem, map, {kv, {H, 1 << 30, 1, 1}, {H * 2, H * 2, H * 2}, {64, BOX, 1, 1}}, threadIdx.x);
  const Rows rows(shared + TABLES_AT, gridDim.x / CLUSTER);
  const Work work(rows, positions, first, cta);  // its barriers show those above, too
  if (CLUSTER > 1) cluster_sync();
#pragma unroll 1
  for (int r = cta; r < rows.count; r += CTAS) {  // rows that see nothing
    if (rows.last[r] >= 0) continue;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS * VALUES / 2; i += THREADS)
      ((u32*)out)[(size_t)r * (HEADS * VALUES / 2) + i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS; i += THREADS) lse[r * HEADS + i] = MASKED;
  }
  if (group == 0) {
    registers_fewer<40>();
    if (thread < 32) bring(smem, rows, work.walk, kv, map, pages, rank, thread);
  } else if (group == 1) {
    registers_fewer<104>();
    make_weights(shared, smem, rows, work.walk, q, first, rank, thread);
  } else {
    registers_more<184>();
    multiply_values(
        shared, smem, rows, work, out, lse, part_out + (size_t)rank * 2 * CTAS * M * VALUES,
        part_lse + rank * 2 * CTAS * M, finished + rank * CTAS, rank, group - 2, thread
    );
  }
  if (CLUSTER > 1) cluster_sync();  // others still send to this one's shared memory
}
