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
// before, so that they come in turn, and while one warpgroup has a softmax, the other has products. A warp more lets the
// tensor memory accelerator bring block b to stage b mod STAGES, as soon as its half of the block before there is free.
//
// CLUSTER CTAs have the heads of a row, 64 each; each brings its part of a block's tokens to the shared memory of all, so
// that latents are read once. They share the work as one: what shares.cuh calls a CTA is a cluster here.
//
// Macros: HEADS of queries; H; VALUES; O tokens of a page; W pages of a row; BLOCK: 64, or 32, of which more are under way;
// CLUSTER; CTAS: clusters; BOX tokens of a copy, which O is a multiple of; COPYING: warps that copy; AHEAD: blocks that the second-level cache is told
// of before they are wanted; ORDER of products: 0: keys of a block before values of the one before; 1: after them; 2: after
// them, and before their end where they are there already; TIMELINE;
// QUERIES_FIRST: whether no latents are fetched before a CTA's first queries are; EARLY: whether what a
// CTA likely reads first is fetched before it is known; COUNTED_BY_WARPS; MIN_SHARE; WHOLE; SCALE; FIRST.
// Grid: CLUSTER * R, and then enough to have CTAS clusters; R is read from it, so that one program serves all.
#define GRID_BARRIER  // all CTAs run at once
#define ITEMS_IN_EQUAL_PARTS

constexpr int TILE = 64, STAGES = 128 / BLOCK, Q = 1;
constexpr int ITEMS = (HEADS + TILE * CLUSTER - 1) / (TILE * CLUSTER), M = HEADS < TILE ? HEADS : TILE;
constexpr int WARPS = 12, THREADS = WARPS * 32, COPIERS = 32;
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

// A warpgroup: half of the results, and the weights of every other block.
struct Attention {
  u8* shared;
  u32 smem;
  int group, thread, lane, row;
  u64 query;
  float o[VALUES / 4], s[BLOCK / 2];
  u32 theirs[BLOCK / 16][4], mine[BLOCK / 16][4];  // weights
  float top[2], own_top[2], sum[2];                // own: of the last block whose weights this warpgroup made

  DEVICE Attention(u8* shared, u32 smem, int group, int thread)
      : shared(shared), smem(smem), group(group), thread(thread), lane(thread % 32), row(thread / 32 * 16 + lane / 4),
        query(matrix_descriptor(smem, ROW, 16, 8 * ROW)) {}

  DEVICE float2* told(int stage) const { return (float2*)(shared + TOLD_AT) + stage * TILE; }
  DEVICE uint4* weights(int stage) const { return (uint4*)(shared + KV_AT + stage * STAGE + WEIGHTS_IN_STAGE); }

  // With QUERIES_FIRST, `begins`: latents may be fetched from now on.
  DEVICE void load_queries(const u16* from, bool begins) {
    const int m = (group * 128 + thread) / 8, chunk = thread % 8;
    const u32 to = smem + m * ROW + ((chunk ^ m % 8) << 4);
#pragma unroll
    for (int i = 0; i < TILE; i += 32) {
      const bool real = m + i < M;
      const u16* const row = from + (real ? m + i : 0) * H + chunk * 8;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
        cp_async_16(to + panel * QUERY_PANEL + i * ROW, row + panel * 64, real ? 16 : 0);
    }
    cp_async_commit();
    if (QUERIES_FIRST && begins) named_sync(4, 256 + 32 * COPYING);
    cp_async_wait<0>();
    fence_products();
    named_sync(3, 256);
  }

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) o[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = own_top[i] = MASKED, sum[i] = 0.f;
  }

  // Begins the scores of this warpgroup's next block, panel by panel as they come. count: of all its CTA's blocks before.
  DEVICE void multiply_keys(int count) {
    const int stage = stage_of(count);
    const u32 phase = phase_of(count);
    const u64 keys = matrix_descriptor(smem + KV_AT + stage * STAGE, ROW, 16, 8 * ROW);
    wgmma_pin(s);
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
      const int panel = i < 2 * HALF ? i ^ group * HALF : i;
      barrier_wait(panel_full(smem, stage, panel), phase);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        Wgmma<BLOCK>::ss(
            s, query + (panel * QUERY_PANEL + k * 32) / 16, keys + (panel * PANEL + k * 32) / 16, i + k > 0
        );
    }
    wgmma_commit();
  }

  // Begins result += weights @ values.
  DEVICE void multiply_values(int stage, const u32 (&p)[BLOCK / 16][4]) {
    const u64 values = matrix_descriptor(smem + KV_AT + stage * STAGE + group * HALF * PANEL, ROW, PANEL, 8 * ROW);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i) Wgmma<VALUES / 2>::rs(o, p[i], values + i * 16 * ROW / 16);
    wgmma_commit();
  }

  // After products with values: this warpgroup's half of the stage may be overwritten.
  DEVICE void free(int stage) {
    wgmma_pin(o);
    if (lane < CLUSTER) {
      if (CLUSTER == 1) barrier_arrive(half_freed(smem, stage, group));
      else cluster_arrive(half_freed(smem, stage, group), lane);
    }
  }

  DEVICE void shrink(float first, float second) {
    if (!__any_sync(~0u, first != 1.f || second != 1.f)) return;
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) o[i] *= i / 2 % 2 ? second : first;
  }

  // The other warpgroup's weights of its block, `count`; results shrink to what goes with them.
  DEVICE void take_weights(int count) {
    const int stage = stage_of(count);
    barrier_wait(weights_ready(smem, stage), phase_of(count));
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i) {
      const uint4 four = weights(stage)[i * 128 + thread];
      theirs[i][0] = four.x, theirs[i][1] = four.y, theirs[i][2] = four.z, theirs[i][3] = four.w;
    }
    const float2 first = told(stage)[row], second = told(stage)[row + 8];
    top[0] = first.x, top[1] = second.x;
    shrink(first.y, second.y);
  }

  // Makes weights of the scores of tokens from `token` on, of which those from `lowest` to `last` are seen. keep: by how
  // much results shrink.
  DEVICE void make_weights(int token, int lowest, int last, float (&keep)[2]) {
    if (token + BLOCK - 1 > last || FIRST && token < lowest) {
#pragma unroll
      for (int i = 0; i < BLOCK / 2; ++i) {
        const int key = token + lane % 4 * 2 + i / 4 * 8 + i % 2;
        if (key > last || FIRST && key < lowest) s[i] = NOTHING;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = s[half * 2];
#pragma unroll
      for (int i = 0; i < BLOCK / 8; ++i) high = fmaxf(high, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      high = fmaxf(top[half], high * TO_EXPONENT);
      keep[half] = fast_exp2(top[half] - high);
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < BLOCK / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[i * 4 + half * 2 + j];
          x = fast_exp2(x * TO_EXPONENT - high);
          total += x;
        }
      sum[half] = sum[half] * fast_exp2(own_top[half] - high) + total;
      top[half] = own_top[half] = high;
    }
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mine[i][j] = pack_bf16(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1]);
  }

  // Tells the other warpgroup of them.
  DEVICE void tell_weights(int stage, int token, int last, const float (&keep)[2]) {
    const bool tail = token + BLOCK - 1 > last;
    named_sync(1 + group, 128);  // all have the scores: the last panel is read
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i)
      weights(stage)[i * 128 + thread] = make_uint4(mine[i][0], mine[i][1], mine[i][2], mine[i][3]);
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) told(stage)[row + half * 8] = make_float2(top[half], keep[half]);
    }
    if (tail) {  // what nobody sees may be anything, also NaNs
      const int seen = last - token + 1;
#pragma unroll 1
      for (int at = thread; at < (BLOCK - seen) * VALUES / 8; at += 128) {
        const int panel = at % (VALUES / 64), chunk = at / (VALUES / 64);
        *(uint4*)(shared + KV_AT + stage * STAGE + panel * PANEL + seen * ROW + chunk * 16) = make_uint4(0, 0, 0, 0);
      }
      fence_products();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(weights_ready(smem, stage));
    if (tail) named_sync(1 + group, 128);
  }

  // Block `block` of a run, of this warpgroup, and the values of the one before, of the other; BEFORE: whether there is one.
  template <bool BEFORE>
  DEVICE void step(int before, const Run& run, int block, int lowest) {
    const int count = before + block;
    if (BEFORE && ORDER) {
      multiply_their_values(count - 1);
      // Warps may differ in this: their products come in the same order.
      const u32 keys = panel_full(smem, stage_of(count), PANELS - 1);
      const bool there = ORDER == 2 && __all_sync(~0u, barrier_is_over(keys, phase_of(count)));
      if (!there) wgmma_wait<0>();  // not after the keys, which may be late
      if (!there) end_their_values(count - 1);
      multiply_keys(count);
      phase_ends(shared, 2);
      if (there) wgmma_wait<1>();
      if (there) end_their_values(count - 1);
      wgmma_wait<0>();
    } else {
      multiply_keys(count);
      phase_ends(shared, 2);
      if (BEFORE) {
        multiply_their_values(count - 1);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
    }
    wgmma_pin(s);
    phase_ends(shared, 4);
    float keep[2];
    make_weights(run.token + block * BLOCK, lowest, run.last, keep);
    phase_ends(shared, 5);
    if (BEFORE && ORDER == 0) {
      wgmma_wait<0>();
      end_their_values(count - 1);
    }
    tell_weights(stage_of(count), run.token + block * BLOCK, run.last, keep);
    phase_ends(shared, 10);
    shrink(keep[0], keep[1]);
    multiply_values(stage_of(count), mine);
    wgmma_wait<0>();
    keep_weights(mine);
    free(stage_of(count));
    phase_ends(shared, 7);
  }

  // Begins products of block `count`, of the other warpgroup; and what comes after their end.
  DEVICE void multiply_their_values(int count) {
    take_weights(count);
    phase_ends(shared, 3);
    multiply_values(stage_of(count), theirs);
  }
  DEVICE void end_their_values(int count) {
    keep_weights(theirs);
    free(stage_of(count));
    phase_ends(shared, 6);
  }

  // Products read registers behind the compiler's back: until here they hold the weights.
  DEVICE static void keep_weights(u32 (&p)[BLOCK / 16][4]) {
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i) wgmma_pin(p[i]);
  }

  // All blocks of a run. before: blocks of the runs before it.
  DEVICE void attend(int before, const Run& run, int lowest) {
    int block = (group ^ before) & 1;
    if (block == 0) {
      step<false>(before, run, block, lowest);
      block += 2;
    }
#pragma unroll 1
    for (; block < run.blocks; block += 2) step<true>(before, run, block, lowest);
    if (block > run.blocks) return;
    multiply_their_values(before + block - 1);  // the last block is the other's
    wgmma_wait<0>();
    end_their_values(before + block - 1);
  }
};

// Writes 8 COUNT columns from `begin` on of result m, which four lanes have two of each 8 of, in o[4 i] and o[4 i + 1].
template <int COUNT>
DEVICE void write_columns(u16* out, size_t target, int begin, const float* o, float scale, int m, int lane) {
  u16* const to = out + (target + m) * VALUES + begin + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    u32 two[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) two[j] = pack_bf16(o[(i + j) * 4] * scale, o[(i + j) * 4 + 1] * scale);
    transpose_quad(two, lane);
    if (m < M) *(uint4*)(to + i * 8) = make_uint4(two[0], two[1], two[2], two[3]);
  }
}

// Two CTAs that have an item, half of its tokens each: each makes half of the columns of each warpgroup, for which it gets
// the other's results of them, and sends it its own of the others.
struct Pair {
  float *part_out, *part_lse;
  int* finished;
  u16* out;
  float* lse;
  size_t target;
  int cta, other;
  const float* sums;

  DEVICE float4* room(int of, int group) const {  // [VALUES / 32, 128 threads]
    return (float4*)(part_out + (size_t)of * 2 * M * VALUES) + group * (VALUES / 32 * 128);
  }
  DEVICE float* logs(int of) const { return part_lse + (size_t)of * 2 * M; }

  // SIDE: which half of its columns a warpgroup makes. Sums of rows are there.
  template <int SIDE>
  DEVICE void exchange(Attention& of) const {
    constexpr int EACH = VALUES / 32, AT_ONCE = 8, MINE = SIDE * EACH, THEIRS = EACH - MINE;
    static_assert(EACH % AT_ONCE == 0, "not what this kernel was written for");
    float inverse[2], log[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = of.row + half * 8;
      const float all = sums[m] + sums[TILE + m];
      inverse[half] = 1.f / all, log[half] = of.top[half] + fast_log2(all);
      if (of.group == 0 && of.lane % 4 == 0 && m < M) logs(cta)[m] = log[half];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float* const o = of.o + (THEIRS + i) * 4;
      room(cta, of.group)[i * 128 + of.thread] =
          make_float4(o[0] * inverse[0], o[1] * inverse[0], o[2] * inverse[1], o[3] * inverse[1]);
    }
    __threadfence();
    named_sync(3, 256);
    if (of.group == 0 && of.thread == 0) word_release(finished + cta, 1);
    if (of.lane == 0) word_wait(finished + other, 1);
    __syncwarp();
    float mine[2], theirs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = of.row + half * 8;
      const float there = m < M ? __ldcg(logs(other) + m) : log[half], high = fmaxf(log[half], there);
      mine[half] = fast_exp2(log[half] - high), theirs[half] = fast_exp2(there - high);
      const float all = mine[half] + theirs[half];
      if (SIDE == 0 && of.group == 0 && of.lane % 4 == 0 && m < M) lse[target + m] = (high + fast_log2(all)) * LN2;
      mine[half] *= inverse[half] / all, theirs[half] /= all;
    }
#pragma unroll
    for (int from = 0; from < EACH; from += AT_ONCE) {
      float4 four[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) four[i] = __ldcg(room(other, of.group) + (from + i) * 128 + of.thread);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        float* const o = of.o + (MINE + from + i) * 4;
        o[0] = o[0] * mine[0] + four[i].x * theirs[0], o[1] = o[1] * mine[0] + four[i].y * theirs[0];
        o[2] = o[2] * mine[1] + four[i].z * theirs[1], o[3] = o[3] * mine[1] + four[i].w * theirs[1];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const o = of.o + MINE * 4 + half * 2;
      write_columns<EACH>(out, target, of.group * (VALUES / 2) + MINE * 8, o, 1.f, of.row + half * 8, of.lane);
    }
  }
};

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
    attention.load_queries(q + target * H, blocks == 0);
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
  if (EARLY && warp == 10) {
    constexpr int LINE = 32;  // pages
    const int count = gridDim.x / CLUSTER, items = count * ITEMS, likely = min(cluster / max(CTAS / items, 1), items - 1);
    const int row = likely / ITEMS, from = row * HEADS + (likely % ITEMS * CLUSTER + rank) * TILE;
    if (lane == 0) prefetch(q + (size_t)from * H, M * H * 2);
    if (lane * LINE < W) prefetch_line(pages + (size_t)row * W + lane * LINE);
  }
  if (warp == 8 + COUNTED_BY_WARPS)  // the queries' room is scratch: they come after the barriers below
    make_map(smem, map, {kv, {H, 1 << 30, 1, 1}, {H * 2, H * 2, H * 2}, {64, BOX, 1, 1}}, lane);
  phase_ends(shared, 11);
  const Rows rows(shared + TABLES_AT, gridDim.x / CLUSTER);
  const Work work(rows, positions, first, cluster);  // its barriers show the block what was written above, too
  phase_ends(shared, 12);
  if (COUNTED_BY_WARPS && CLUSTER == 1) __syncthreads();
  if (CLUSTER > 1) cluster_sync();
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
    if (COUNTED_BY_WARPS || COPYING > 1) see_map(map);
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
