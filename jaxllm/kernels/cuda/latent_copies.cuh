// Latents brought into stages of shared memory by the tensor memory accelerator, panel by panel.
//
// Macros: CLUSTER; BOX; AHEAD; VALUES and those of latent.cuh. Constants of the includer: COPYING, warps that copy;
// BARRIERS_AT, READY_AT and FREED_AT, where barriers are; those of latent.cuh. A function of it: phase_ends(shared, which).
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

// The stage of block `count` of all that a CTA has, and its use of it.
DEVICE int stage_of(int count) { return count % STAGES; }
DEVICE u32 phase_of(int count) { return count / STAGES & 1; }

// Where the tokens that a lane copies of each block lie: a page, which may still be on its way, and the first of them there.
struct Box {
  int page, token;
};
struct Boxes {
  const Rows& rows;
  const int* pages;
  Walk walk;
  int first, row, last, token, blocks;  // first: of the lane's tokens in a block

  DEVICE Boxes(const Rows& rows, const Walk& walk, const int* pages, int first)
      : rows(rows), pages(pages), walk(walk), first(first), blocks(0) {}

  // Those of the next block; token -1: no block is left. Tokens that nobody sees are others of the row.
  DEVICE Box next() {
    if (blocks == 0) {
      const Run run = walk.take(rows, 0x7fffffff);
      if (run.blocks == 0) return {0, -1};
      row = run.row, last = run.last, token = run.token + first, blocks = run.blocks;
    }
    const int at = min(token, last / BOX * BOX);
    token += BLOCK;
    --blocks;
    return {pages[(size_t)row * W + at / O], at % O};
  }
};

// Warp `copier` of the COPYING that bring latents, each some of the panels: one warp's instructions for all of them take
// longer than the copies. What it does between blocks makes all wait.
DEVICE void bring(
    u8* shared, u32 smem, const Rows& rows, const Walk& walk, const u16* kv, const void* map, const int* pages, int rank,
    int copier, int lane
) {
  constexpr int MINE = BLOCK / BOX / CLUSTER;  // boxes of a block, one for a lane
  constexpr int AHEAD_ROWS = BOX / COPYING;
  const int box = (rank * MINE + min(lane, MINE - 1)) * BOX;
  Boxes boxes(rows, walk, pages, box);
  Box queue[AHEAD + 1];
#pragma unroll
  for (int i = 0; i <= AHEAD; ++i) queue[i] = boxes.next();
  phase_ends(shared, 0);
#pragma unroll 1
  for (int count = 0; queue[0].token >= 0; ++count) {
    const int stage = stage_of(count), token = queue[0].page * O + queue[0].token;
    const u32 phase = phase_of(count) ^ 1, to = smem + KV_AT + stage * STAGE + box * ROW;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const int half = part ^ (count & 1);  // first that of the warpgroup which wants it first
      phase_ends(shared, 7);
      barrier_wait(half_freed(smem, stage, half), phase);
      phase_ends(shared, 2);
#pragma unroll 1
      for (int i = copier; i < HALF + part; i += COPYING) {
        const int panel = i < HALF ? half * HALF + i : PANELS - 1;
        const u32 here = to + panel * PANEL, full = panel_full(smem, stage, panel);
        if (lane == 0) barrier_expect(full, PANEL);
        if (lane >= MINE) continue;
        if (CLUSTER == 1) copy_box(here, map, panel * 64, token, 0, 0, full);
        else copy_box_to_blocks(here, map, panel * 64, token, 0, 0, full, (1 << CLUSTER) - 1);
      }
      __syncwarp();
      phase_ends(shared, 6);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) queue[i] = queue[i + 1];
    if (AHEAD && lane < MINE && queue[AHEAD].token >= 0) {
      const int first = queue[AHEAD].page * O + queue[AHEAD].token + copier * AHEAD_ROWS;
      prefetch(kv + (size_t)first * H, AHEAD_ROWS * H * 2);
    }
    phase_ends(shared, 4);
    queue[AHEAD] = boxes.next();
  }
}
