// What the kernels of decode attention over latents share: latents are brought into stages of shared memory, and what
// blocks of threads (CTAs) have of an item is merged.
//
// Latents lie in panels of 64 columns, rows of 128 bytes with the hardware's swizzle.
//
// Macros: H; O tokens of a page; W pages of a row; BLOCK tokens of a stage, and those of shares.cuh.
// Constants of the includer: KV_AT, where stages begin; STAGES; COPIERS, threads that fill one of them; those of shares.cuh.
#pragma once
#include "grid.cuh"
#include "hopper.cuh"
#include "shares.cuh"

constexpr int PANELS = H / 64, ROW = 128, PANEL = BLOCK * ROW, STAGE = PANELS * PANEL;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static_assert(H % 64 == 0 && O % 8 == 0, "not what these kernels were written for");

// Barriers of stages: two for each, the first full and then freed.
DEVICE u32 full_of(u32 barriers, int stage) { return barriers + stage * 16; }
DEVICE u32 freed_of(u32 barriers, int stage) { return barriers + stage * 16 + 8; }

// Threads that fill stage `stage`: every STAGES-th block.
DEVICE void copy(
    u32 smem, u32 barriers, const Rows& rows, Walk walk, const u16* kv, const int* pages, int stage, int thread
) {
  constexpr int AT_ONCE = COPIERS / 8;  // tokens of one turn
  Run run = walk.take(rows, 0x7fffffff);
  int block = 0;
  auto step = [&]() {
    ++block;
    if (block >= run.blocks) {
      run = walk.take(rows, 0x7fffffff);
      block = 0;
    }
  };
  // A lane has the page of eight tokens.
  auto load_pages = [&]() {
    const int at = run.token + block * BLOCK + thread % (BLOCK / 8) * 8;
    return run.blocks && at <= run.last ? pages[(size_t)run.row * W + at / O] : 0;
  };
  const int column = thread % 8, above = thread / 8;
  const u32 to = smem + KV_AT + stage * STAGE;
  for (int i = 0; i < stage && run.blocks; ++i) step();
  int page = load_pages();
#pragma unroll 1
  for (int turn = 0; run.blocks; ++turn) {
    const int token = run.token + block * BLOCK + above, last = run.last;
    barrier_wait(freed_of(barriers, stage), turn & 1 ^ 1);
#pragma unroll
    for (int i = 0; i < BLOCK / AT_ONCE; ++i) {
      const int row = above + i * AT_ONCE, at = token + i * AT_ONCE;
      const u16* from = kv + ((size_t)__shfl_sync(~0u, page, row / 8) * O + at % O) * H + column * 8;
      const u32 here = to + row * ROW + ((column ^ row % 8) << 4), bytes = at <= last ? 16 : 0;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) cp_async_16(here + panel * PANEL, from + panel * 64, bytes);
    }
    cp_async_commit();
#pragma unroll 1
    for (int i = 0; i < STAGES && run.blocks; ++i) step();
    page = load_pages();
    cp_async_wait<0>();
    fence_products();
    barrier_arrive(full_of(barriers, stage));
  }
}

// Of four lanes: word i of lane j for word j of lane i. All lanes of a warp call it.
DEVICE void transpose_quad(u32 (&x)[4], int lane) {
#pragma unroll
  for (int by = 1; by < 4; by *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & by) continue;
      const bool upper = lane & by;
      const u32 other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + by], by);
      if (upper) x[i] = other;
      else x[i + by] = other;
    }
}

// A part that its CTA has not merged yet, and where the item's results go. None: one part is all of it.
struct Unmerged {
  Part part;
  size_t target;
};

// Slices of items of few parts, some at once, so that the loads of all are under way together.
constexpr int FEW_PARTS = 4, SLICES_AT_ONCE = 4;
template <int DIMS, int MROWS>
struct SliceMerge {
  const float *part_out, *part_lse;
  u16* out;
  float* lse;
  const Part& part;
  size_t target;
  int lane;

  // Slices first, first + step, ... of those before `end`; by a warp.
  DEVICE void run(int first, int step, int end) const {
    const int parts = part.count();
    float4 four[SLICES_AT_ONCE][FEW_PARTS];
    float log[SLICES_AT_ONCE];
#pragma unroll
    for (int i = 0; i < SLICES_AT_ONCE; ++i) {
      const int unit = min(first + i * step, end - 1), m = unit / (DIMS / 128), dim = unit % (DIMS / 128) * 128 + 4 * lane;
      log[i] = lane < parts ? __ldcg(part_lse + (size_t)part.slot_of(lane) * MROWS + m) : MASKED;
#pragma unroll
      for (int j = 0; j < FEW_PARTS; ++j) {
        four[i][j] = {0.f, 0.f, 0.f, 0.f};
        if (j < parts)
          four[i][j] = __ldcg((const float4*)(part_out + ((size_t)part.slot_of(j) * MROWS + m) * DIMS + dim));
      }
    }
#pragma unroll
    for (int i = 0; i < SLICES_AT_ONCE; ++i) {
      const int unit = first + i * step, m = unit / (DIMS / 128), dim = unit % (DIMS / 128) * 128 + 4 * lane;
      float high = log[i], x[4] = {}, total = 0.f;
#pragma unroll
      for (int by = FEW_PARTS / 2; by; by /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, by));
      high = __shfl_sync(~0u, high, 0);
      const float mine = lane < parts ? fast_exp2(log[i] - high) : 0.f;
#pragma unroll
      for (int j = 0; j < FEW_PARTS; ++j) {
        const float weight = __shfl_sync(~0u, mine, j);
        total += weight;
        x[0] += weight * four[i][j].x, x[1] += weight * four[i][j].y;
        x[2] += weight * four[i][j].z, x[3] += weight * four[i][j].w;
      }
      if (unit >= end) continue;
      const float inverse = 1.f / total;
      *(uint2*)(out + (target + m) * DIMS + dim) =
          make_uint2(pack_bf16(x[0] * inverse, x[1] * inverse), pack_bf16(x[2] * inverse, x[3] * inverse));
      if (dim == 0) lse[target + m] = high < UNSEEN ? MASKED : (high + fast_log2(total)) * LN2;
    }
  }
};

// Merges a CTA's share of an item that several CTAs have parts of, once all of them have theirs: each has some of the
// item's slices of 128 numbers. All CTAs run at once, so that they can wait for each other.
//   warp of WARPS_HERE; sync: their barrier; room: of shared memory, (16 * 32 + 8) WARPS_HERE bytes
//   finished: parts of the item that are there; others as in merge_parts
template <int DIMS, int MROWS, int WARPS_HERE, class Sync>
DEVICE void merge_share(
    const float* part_out, const float* part_lse, u16* out, float* lse, const int* finished, const Unmerged& of, int cta,
    u8* room, int warp, int lane, Sync sync
) {
  constexpr int SLICES = DIMS / 128, UNITS = MROWS * SLICES, AT_ONCE = 8;
  const Part& part = of.part;
  if (part.complete()) return;
  const int parts = part.count(), index = cta - part.from;
  const int mine = index < UNITS ? (UNITS - 1 - index) / parts + 1 : 0;
  if (mine == 0) return;
  const int split = mine >= WARPS_HERE ? 1 : min(WARPS_HERE / mine, parts);  // warps that merge a slice together
  if (lane == 0) word_wait(finished + part.from, parts);
  __syncwarp();
  if (split == 1 && parts <= FEW_PARTS) {
    const SliceMerge<DIMS, MROWS> merge = {part_out, part_lse, out, lse, part, of.target, lane};
#pragma unroll 1
    for (int i = warp; i < mine; i += WARPS_HERE * SLICES_AT_ONCE)
      merge.run(index + i * parts, WARPS_HERE * parts, UNITS);
    return;
  }
  const int teams = WARPS_HERE / split, team = warp / split, member = warp % split;
  float4* const sums = (float4*)room;
  float2* const scales = (float2*)(sums + 32 * WARPS_HERE);
#pragma unroll 1
  for (int first = 0; first < mine; first += teams) {
    const int unit = index + (first + team) * parts, m = unit / SLICES, dim = unit % SLICES * 128 + 4 * lane;
    const bool busy = team < teams && first + team < mine;
    float high = MASKED, total = 0.f;
    float4 x = {0.f, 0.f, 0.f, 0.f};
    auto scale = [&](float by) {
      total *= by;
      x.x *= by, x.y *= by, x.z *= by, x.w *= by;
    };
    auto add = [&](float by, const float4& four) {
      x.x += by * four.x, x.y += by * four.y, x.z += by * four.z, x.w += by * four.w;
    };
#pragma unroll 1
    for (int base = busy ? member : parts; base < parts; base += 32 * split) {
      const int at = base + lane * split;
      float4 four[AT_ONCE];
      auto load = [&](int i) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const int from = base + (i + j) * split;
          four[j] = {0.f, 0.f, 0.f, 0.f};
          if (from < parts)
            four[j] = __ldcg((const float4*)(part_out + ((size_t)part.slot_of(from) * MROWS + m) * DIMS + dim));
        }
      };
      load(0);
      const float log = at < parts ? __ldcg(part_lse + (size_t)part.slot_of(at) * MROWS + m) : MASKED;
      float top = fmaxf(high, log);
#pragma unroll
      for (int by = 16; by; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
      scale(fast_exp2(high - top));
      high = top;
      const float weight = at < parts ? fast_exp2(log - high) : 0.f;
      total += weight;
#pragma unroll 1
      for (int i = 0;;) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) add(__shfl_sync(~0u, weight, i + j), four[j]);
        i += AT_ONCE;
        if (i >= 32 || base + i * split >= parts) break;
        load(i);
      }
    }
#pragma unroll
    for (int by = 16; by; by /= 2) total += __shfl_xor_sync(~0u, total, by);
    if (split > 1) {
      sums[warp * 32 + lane] = x;
      if (lane == 0) scales[warp] = make_float2(high, total);
      sync();
      if (busy && member == 0) {
        float top = high;
#pragma unroll 1
        for (int other = warp + 1; other < warp + split; ++other) top = fmaxf(top, scales[other].x);
        scale(fast_exp2(high - top));
        high = top;
#pragma unroll 1
        for (int other = warp + 1; other < warp + split; ++other) {
          const float by = fast_exp2(scales[other].x - high);
          total += by * scales[other].y;
          add(by, sums[other * 32 + lane]);
        }
      }
      sync();
    }
    if (!busy || member) continue;
    const float inverse = 1.f / total;
    const size_t to = of.target + m;
    *(uint2*)(out + to * DIMS + dim) =
        make_uint2(pack_bf16(x.x * inverse, x.y * inverse), pack_bf16(x.z * inverse, x.w * inverse));
    if (dim == 0) lse[to] = high < UNSEEN ? MASKED : (high + fast_log2(total)) * LN2;
  }
}
