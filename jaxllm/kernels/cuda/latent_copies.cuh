// Latents brought into stages of shared memory by the tensor memory accelerator, panel by panel, by one warp.
//
// Macros: CLUSTER; BOX; AHEAD; VALUES and those of latent.cuh. Constants of the includer: BARRIERS_AT, READY_AT and FREED_AT,
// where barriers are; those of latent.cuh.
#pragma once
#include "cluster.cuh"
#include "latent.cuh"
#include "tensor_map.cuh"

constexpr int HALF = VALUES / 128;  // panels of half of the values

// Barriers: panel `panel` of a stage is there; its block's weights are; warpgroup `half` needs its half no more.
DEVICE u32 panel_full(u32 smem, int stage, int panel) { return smem + BARRIERS_AT + (stage * PANELS + panel) * 8; }
DEVICE u32 weights_ready(u32 smem, int stage) { return smem + READY_AT + stage * 8; }
DEVICE u32 half_freed(u32 smem, int stage, int half) { return smem + FREED_AT + (stage * 2 + half) * 8; }
// Weights lie where the last panel was, which only scores need.
constexpr int WEIGHTS_IN_STAGE = (PANELS - 1) * PANEL;

// Uses of the stages by the runs before.
struct Uses {
  int even = 0, odd = 0;

  DEVICE u32 phase(int block) const { return ((block & 1 ? odd : even) + block / 2) & 1; }
  DEVICE void add(int blocks) { even += (blocks + 1) / 2, odd += blocks / 2; }
};

// Where the tokens that a lane copies of each block lie, some blocks ahead.
struct Boxes {
  const Rows& rows;
  const int* pages;
  Walk walk;
  Run run;
  int block, first;  // first: of the lane's tokens in a block

  DEVICE Boxes(const Rows& rows, const Walk& from, const int* pages, int first)
      : rows(rows), pages(pages), walk(from), block(-1), first(first) {
    run = walk.take(rows, 0x7fffffff);
  }
  // The page of the next block's box, and where it begins there. Where nobody sees them, tokens are others of the row.
  DEVICE int2 next() {
    if (++block >= run.blocks) {
      run = walk.take(rows, 0x7fffffff);
      block = 0;
    }
    if (!run.blocks) return {-1, 0};
    const int at = min(run.token + block * BLOCK + first, run.last / BOX * BOX);
    return {pages[(size_t)run.row * W + at / O], at % O};
  }
};

// The warp that brings latents.
DEVICE void bring(u32 smem, const Rows& rows, Walk walk, const u16* kv, const void* map, const int* pages, int rank, int lane) {
  constexpr int MINE = BLOCK / BOX / CLUSTER;  // boxes of a block, one for a lane
  const int box = (rank * MINE + min(lane, MINE - 1)) * BOX;
  Boxes boxes(rows, walk, pages, box);
  int2 queue[AHEAD + 1];
#pragma unroll
  for (int i = 0; i <= AHEAD; ++i) queue[i] = boxes.next();
  Uses uses;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
#pragma unroll 1
    for (int block = 0; block < run.blocks; ++block) {
      const int stage = block & 1;
      const int2 from = queue[0];
      const u32 phase = uses.phase(block) ^ 1, to = smem + KV_AT + stage * STAGE + box * ROW;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int half = part ^ stage;  // first that of the warpgroup which wants it first
        barrier_wait(half_freed(smem, stage, half), phase);
#pragma unroll
        for (int i = 0; i < HALF + part; ++i) {
          const int panel = i < HALF ? half * HALF + i : PANELS - 1;
          if (lane == 0) barrier_expect(panel_full(smem, stage, panel), PANEL);
          if (lane >= MINE) continue;
          const u32 here = to + panel * PANEL, full = panel_full(smem, stage, panel);
          if (CLUSTER == 1) copy_box(here, map, panel * 64, from.y, from.x, 0, full);
          else copy_box_to_blocks(here, map, panel * 64, from.y, from.x, 0, full, (1 << CLUSTER) - 1);
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) queue[i] = queue[i + 1];
      if (AHEAD && lane < MINE && queue[AHEAD].x >= 0)
        prefetch(kv + ((size_t)queue[AHEAD].x * O + queue[AHEAD].y) * H, BOX * H * 2);
      queue[AHEAD] = boxes.next();
    }
    uses.add(run.blocks);
  }
}
