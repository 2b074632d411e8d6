// What the kernels of decode attention over latents share: latents are brought into stages of shared memory, and what
// blocks of threads (CTAs) have of an item is merged.
//
// Latents lie in panels of 64 columns, rows of 128 bytes with the hardware's swizzle.
//
// Macros: H; O tokens of a page; W pages of a row; BLOCK tokens of a stage; AHEAD, blocks by which the second-level cache is
// told before they are copied (0: it is not), and those of shares.cuh.
// Constants of the includer: KV_AT, where stages begin; STAGES, and PARTS of one that are freed and filled one after the
// other; COPIERS, threads that fill them; those of shares.cuh.
#pragma once
#define EVEN_SHARES 1
#include "cluster.cuh"
#include "grid.cuh"
#include "hopper.cuh"
#include "shares.cuh"

constexpr int PANELS = H / 64, ROW = 128, PANEL = BLOCK * ROW, STAGE = PANELS * PANEL;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static_assert(H % 64 == 0 && O % 8 == 0, "not what these kernels were written for");

// Barriers of stages: full, and then one for each of PARTS parts, of BLOCK / PARTS tokens, that has been freed.
constexpr int BARRIERS_OF_STAGE = 8 * (1 + PARTS);
DEVICE u32 full_of(u32 barriers, int stage) { return barriers + stage * BARRIERS_OF_STAGE; }
DEVICE u32 freed_of(u32 barriers, int stage, int part) { return barriers + stage * BARRIERS_OF_STAGE + 8 * (1 + part); }
// To be called by one thread; freeing: warps that free a part.
DEVICE void init_stages(u32 barriers, int freeing) {
  for (int stage = 0; stage < STAGES; ++stage) {
    barrier_init(full_of(barriers, stage), COPIERS);
    for (int part = 0; part < PARTS; ++part) barrier_init(freed_of(barriers, stage, part), freeing);
  }
}

// What COPIERS threads do: they fill a part of a stage as soon as it has been freed, and do not wait for what is under way.
DEVICE void copy(u32 smem, u32 barriers, const Rows& rows, Walk walk, const u16* kv, const int* pages, int thread) {
  constexpr int AT_ONCE = COPIERS / 8;  // tokens of one turn
  static_assert(BLOCK / PARTS % AT_ONCE == 0, "a part has whole turns");
  Run run = walk.take(rows, 0x7fffffff);
  int block = 0;
  // A lane has the page of eight tokens.
  auto load_pages = [&]() {
    const int at = run.token + block * BLOCK + thread % (BLOCK / 8) * 8;
    return run.blocks && at <= run.last ? pages[(size_t)run.row * W + at / O] : 0;
  };
  // Of blocks ahead in the same run; -1: nothing to tell of.
  auto load_ahead = [&]() {
    const int at = run.token + (block + AHEAD) * BLOCK + thread * 8;
    return thread < BLOCK / 8 && block + AHEAD < run.blocks && at <= run.last ? pages[(size_t)run.row * W + at / O] : -1;
  };
  const int column = thread % 8, above = thread / 8;
  int next_page = load_pages(), ahead = AHEAD ? load_ahead() : -1;
#pragma unroll 1
  for (int blocks = 0; run.blocks; ++blocks) {
    if (AHEAD && ahead >= 0)
      prefetch(kv + ((size_t)ahead * O + (run.token + (block + AHEAD) * BLOCK + thread * 8) % O) * H, 16 * H);
    const int token = run.token + block * BLOCK + above, last = run.last, page = next_page, stage = blocks % STAGES;
    if (++block == run.blocks) {
      run = walk.take(rows, 0x7fffffff);
      block = 0;
    }
    next_page = load_pages();
    if (AHEAD) ahead = load_ahead();
    const u32 to = smem + KV_AT + stage * STAGE;
#pragma unroll
    for (int i = 0; i < BLOCK / AT_ONCE; ++i) {
      const int row = above + i * AT_ONCE, at = token + i * AT_ONCE;
      if (i * AT_ONCE % (BLOCK / PARTS) == 0)
        barrier_wait(freed_of(barriers, stage, i * AT_ONCE / (BLOCK / PARTS)), blocks / STAGES & 1 ^ 1);
      const u16* from = kv + ((size_t)__shfl_sync(~0u, page, row / 8) * O + at % O) * H + column * 8;
      const u32 here = to + row * ROW + ((column ^ row % 8) << 4), bytes = at <= last ? 16 : 0;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) cp_async_16(here + panel * PANEL, from + panel * 64, bytes);
    }
    cp_async_arrive(full_of(barriers, stage));
  }
  cp_async_wait<0>();
}

// Waits until products can read the stage that block number `blocks` is in.
DEVICE void wait_full(u32 barriers, int blocks) {
  barrier_wait(full_of(barriers, blocks % STAGES), blocks / STAGES & 1);
  fence_products();
}

// Frees the parts of a stage one after the other, as soon as their products, of which each part has a group, are done.
template <int PART = 0>
DEVICE void free_parts(u32 barriers, int stage, int lane) {
  wgmma_wait<PARTS - 1 - PART>();
  if (lane == 0) barrier_arrive(freed_of(barriers, stage, PART));
  if constexpr (PART + 1 < PARTS) free_parts<PART + 1>(barriers, stage, lane);
}

// A part that its CTA has not merged yet, and where the item's results go. None: one part is all of it.
struct Unmerged {
  Part part;
  size_t target;
};

// Tells others of a CTA's parts, once they are all there and every thread that wrote one has made that known.
DEVICE void announce(const Unmerged* unmerged, int* finished) {
  for (int i = 0; i < 2; ++i)
    if (!unmerged[i].part.complete()) atomicAdd(finished + unmerged[i].part.from, 1);
}

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
  const int teams = WARPS_HERE / split, team = warp / split, member = warp % split;
  float4* const sums = (float4*)room;
  float2* const scales = (float2*)(sums + 32 * WARPS_HERE);
  if (lane == 0) word_wait(finished + part.from, parts);
  __syncwarp();
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
      const float log = at < parts ? __ldcg(part_lse + (size_t)part.slot_of(at) * MROWS + m) : MASKED;
      float top = fmaxf(high, log);
#pragma unroll
      for (int by = 16; by; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
      scale(fast_exp2(high - top));
      high = top;
      const float weight = at < parts ? fast_exp2(log - high) : 0.f;
      total += weight;
#pragma unroll 1
      for (int i = 0; i < 32 && base + i * split < parts; i += AT_ONCE) {
        float4 four[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const size_t slot = part.slot_of(min(base + (i + j) * split, parts - 1));
          four[j] = __ldcg((const float4*)(part_out + (slot * MROWS + m) * DIMS + dim));
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) add(__shfl_sync(~0u, weight, i + j), four[j]);  // 0 past the end
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
