// Attention of one query token per row over paged latents (multi-head latent attention, absorbed) for many query heads:
// all of them read the same H numbers of a token, of which the first VALUES are its value too (FlashMLA; FlashDecoding).
//
// What bounds it: a token is 2H bytes and, for each query head, 2 (H + VALUES) floating-point operations. With 128 heads
// that is 242 operations per byte, more than the 173 that an H200 does in the time of a byte: products decide. Results of
// 64 heads fill half of a multiprocessor's registers, so that two tiles cannot take turns at the tensor cores, as in
// FlashAttention-3: instead the two halves of one tile's results do ("seesaw", FlashMLA).
//
// A CTA has 64 query heads and two warpgroups, each with half of the VALUES numbers of the results. Each makes the
// weights of every other block of BLOCK tokens, for both: those of a block follow from the highest scores of the blocks
// before, so that they come in turn, and while one warpgroup has a softmax, the other has products. Two warps more let the
// tensor memory accelerator bring block b to stage b mod STAGES, as soon as its half of the block before there is free.
//
// CLUSTER CTAs have the heads of a row, 64 each; each brings its part of a block's tokens to the shared memory of all, so
// that latents are read once. They share the work as one: what shares.cuh calls a CTA is a cluster here.
//
// Macros: HEADS of queries; H; VALUES; O tokens of a page; W pages of a row; CLUSTER; CTAS: clusters; BOX tokens of a copy,
// which O is a multiple of; AHEAD: blocks that the second-level cache is told of before they are wanted; VALUES_FIRST: whether
// the values of a block come before the keys of the next, which gives room back sooner; TIMELINE; MIN_SHARE; WHOLE; SCALE;
// FIRST.
// Grid: CLUSTER * R, and then enough to have CTAS clusters; R is read from it, so that one program serves all.
#define GRID_BARRIER  // all CTAs run at once
#define BLOCK 64
#define ITEMS_IN_EQUAL_PARTS
#define COUNTED_BY_WARPS 1

constexpr int TILE = 64, STAGES = 2, Q = 1;
constexpr int ITEMS = (HEADS + TILE * CLUSTER - 1) / (TILE * CLUSTER), M = HEADS < TILE ? HEADS : TILE;
constexpr int WARPS = 12, THREADS = WARPS * 32, COPYING = 2, COPIERS = 32;
// Shared memory: queries, stages of latents, what blocks' weights go with, sums of rows, barriers, tables.
constexpr int QUERY_PANEL = TILE * 128, KV_AT = H / 64 * QUERY_PANEL;
#include "latent.cuh"

constexpr int TOLD_AT = KV_AT + STAGES * STAGE, SUMS_AT = TOLD_AT + STAGES * TILE * 8;
constexpr int BARRIERS_AT = SUMS_AT + 2 * TILE * 4, READY_AT = BARRIERS_AT + STAGES * PANELS * 8;
constexpr int FREED_AT = READY_AT + STAGES * 8, UNMERGED_AT = FREED_AT + STAGES * 16, TIMES_AT = UNMERGED_AT + 48;
constexpr int PHASES = 16, TABLES_AT = TIMES_AT + TIMELINE * WARPS * PHASES * 4;
constexpr float TO_EXPONENT = (float)(SCALE * LOG2E), NOTHING = (float)(MASKED / (SCALE * LOG2E));
static_assert(VALUES == 512 && H == 576 && HEADS % M == 0 && O % BOX == 0, "not what this kernel was written for");
static_assert(ITEMS * CLUSTER * M == HEADS && BLOCK % (BOX * CLUSTER) == 0, "not what this kernel was written for");

// Cycles of each warp's phases, of which the last slot has the clock at the end of the latest, and
// when the kernel ends, in the last two: nanoseconds, and those of the GPU's clock when it began; nothing without TIMELINE.
DEVICE void phase_ends(u8* shared, int which) {
  if (!TIMELINE || threadIdx.x % 32) return;
  u32* const times = (u32*)(shared + TIMES_AT) + threadIdx.x / 32 * PHASES;
  const u32 now = cycles();
  times[which] += now - times[PHASES - 1];
  times[PHASES - 1] = now;
}

#include "latent_copies.cuh"
#include "latent_pair.cuh"

// All that a warpgroup does; what is left to merge comes in `unmerged`.
DEVICE void attend(
    u8* shared, u32 smem, const Rows& rows, const Work& work, const u16* q, const int* first, u16* out, float* lse,
    float* part_out, float* part_lse, int* finished, int rank, int group, int thread
) {
  Attention attention(shared, smem, group, thread);
  const int lane = thread % 32, row = attention.row;
  float* const sums = (float*)(shared + SUMS_AT);
  Unmerged* const unmerged = (Unmerged*)(shared + UNMERGED_AT);
  Walk walk = work.walk;
  int blocks = 0;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
    const size_t target = (size_t)run.row * HEADS + (run.item * CLUSTER + rank) * TILE;
    phase_ends(shared, 0);
    attention.load_queries(q + target * H);
    phase_ends(shared, 1);
    attention.clear();
    attention.attend(blocks, run, FIRST ? first[run.row] : 0);
    blocks += run.blocks;
    phase_ends(shared, 3);
    float total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = total[half];
      sum = attention.sum[half] * fast_exp2(attention.own_top[half] - attention.top[half]);
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) sums[group * TILE + row + half * 8] = sum;
    }
    named_sync(3, 256);
    const Part part = work.part_of(rows, run);
    if (work.pairs && M >= 16) {
      const Pair pair = {part_out, part_lse, finished, out, lse, target, work.cta, part.from + part.to - work.cta, sums};
      if (part.from == work.cta) pair.exchange<0>(attention);
      else pair.exchange<1>(attention);
      phase_ends(shared, 8);
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row + half * 8;
      const bool real = m < M;
      const float all = sums[m] + sums[TILE + m], inverse = 1.f / all, log = attention.top[half] + fast_log2(all);
      const size_t slot = (size_t)part.slot * M + m;
      const float* const o = attention.o + half * 2;
      const int begin = group * (VALUES / 2);
      if (part.complete()) {
        write_columns<VALUES / 16>(out, target, begin, o, inverse, m, lane);
      } else if (real) {
        float* const to = part_out + slot * VALUES + begin + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < VALUES / 16; ++i) *(float2*)(to + i * 8) = make_float2(o[i * 4] * inverse, o[i * 4 + 1] * inverse);
      }
      if (group == 0 && lane % 4 == 0 && real) {
        if (part.complete()) lse[target + m] = log * LN2;
        else part_lse[slot] = log;
      }
    }
    phase_ends(shared, 8);
    if (part.complete()) continue;
    __threadfence();
    named_sync(3, 256);
    if (group == 0 && thread == 0) {
      atomicAdd(finished + part.from, 1);
      unmerged[unmerged[0].part.complete() ? 0 : 1] = {part, target};
    }
  }
  named_sync(3, 256);
#pragma unroll 1
  for (int i = 0; i < 2; ++i)
    merge_share<VALUES, M, 8>(
        part_out, part_lse, out, lse, finished, unmerged[i], work.cta, shared, group * 4 + thread / 32, lane,
        [] { named_sync(3, 256); }
    );
  phase_ends(shared, 9);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) latent_many(
    const u16* q,          // [R, HEADS, H]
    const u16* kv,         // [P, O, H]
    const int* pages,      // [R, W]
    const int* positions,  // [R]
    const int* first,      // [R]
    const int*,            // `finished`, which begins as zeros
    u16* out,              // [R, HEADS, VALUES]
    float* lse,            // [R, HEADS]
    float* part_out,       // [CLUSTER, 2 CTAS, M, VALUES]
    float* part_lse,       // [CLUSTER, 2 CTAS, M], to the base 2
    int* finished,         // [CLUSTER, CTAS], of the item that begins in the cluster and does not end there: parts
    u8* maps,              // [CLUSTER, CTAS, 128], of the latents
  u32* times             // [CLUSTER, CTAS, WARPS, PHASES]: see `phase_ends`
) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int block = blockIdx.y * gridDim.x + blockIdx.x, rank = block % CLUSTER, cluster = block / CLUSTER;
  if (cluster >= CTAS) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == WARPS - 2) {  // what is read first, or likely is
    constexpr int LINE = 32;  // numbers
    const int count = gridDim.x / CLUSTER;
    if (lane * LINE < count) prefetch_line(positions + lane * LINE);
    const int items = count * ITEMS, likely = min(cluster / max(CTAS / items, 1), items - 1);
    const int row = likely / ITEMS, from = row * HEADS + (likely % ITEMS * CLUSTER + rank) * TILE;
    if (lane == 0) prefetch(q + (size_t)from * H, M * H * 2);
    if (lane * LINE < W) prefetch_line(pages + (size_t)row * W + lane * LINE);
  }
  const u64 began = TIMELINE ? nanoseconds() : 0;
  u8* const map = maps + block * 128;
  if (TIMELINE && lane < PHASES) ((u32*)(shared + TIMES_AT))[warp * PHASES + lane] = lane < PHASES - 1 ? 0 : cycles();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      for (int panel = 0; panel < PANELS; ++panel) barrier_init(panel_full(smem, stage, panel), 1);
      barrier_init(weights_ready(smem, stage), 4);
      for (int half = 0; half < 2; ++half) barrier_init(half_freed(smem, stage, half), 4 * CLUSTER);  // warps
    }
    barrier_init_fence();
    Unmerged* const unmerged = (Unmerged*)(shared + UNMERGED_AT);
    unmerged[0] = unmerged[1] = {{0, 0, 0}, 0};
  }
  if (warp == WARPS - 1)  // the queries' room is scratch: they come after the barriers below
    make_map(smem, map, {kv, {H, 1 << 30, 1, 1}, {H * 2, H * 2, H * 2}, {64, BOX, 1, 1}}, lane);
  phase_ends(shared, 11);
  const Rows rows(shared + TABLES_AT, gridDim.x / CLUSTER);
  // Warps that neither multiply nor copy have no rows to count.
  const Work work(warp < 8 + COPYING ? rows : Rows(shared + TABLES_AT, 0), positions, first, cluster);
  phase_ends(shared, 12);
  if (CLUSTER > 1) cluster_sync();
  else __syncthreads();
  phase_ends(shared, 13);
#pragma unroll 1
  for (int r = cluster; r < rows.count; r += CTAS) {  // rows that see nothing
    if (rows.last[r] >= 0) continue;
#pragma unroll 1
    for (int i = rank * THREADS + threadIdx.x; i < HEADS * VALUES / 2; i += THREADS * CLUSTER)
      ((u32*)out)[(size_t)r * (HEADS * VALUES / 2) + i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS; i += THREADS) lse[r * HEADS + i] = MASKED;
  }
  if (warp >= 8) {
    registers_fewer<40>();
    see_map(map);
    if (warp < 8 + COPYING) bring(shared, smem, rows, work.walk, kv, map, pages, rank, warp - 8, lane);
  } else {
    registers_more<232>();
    attend(
        shared, smem, rows, work, q, first, out, lse, part_out + (size_t)rank * 2 * CTAS * M * VALUES,
        part_lse + rank * 2 * CTAS * M, finished + rank * CTAS, rank, warp / 4, threadIdx.x % 128
    );
  }
  if (CLUSTER > 1) cluster_sync();  // others still send to this one's shared memory
  if (TIMELINE && lane < PHASES)
    times[(block * WARPS + warp) * PHASES + lane] =
        lane < PHASES - 2 ? ((u32*)(shared + TIMES_AT))[warp * PHASES + lane] : lane < PHASES - 1 ? nanoseconds() - began : began;
}
