// out[T, F / 2] = act(gate) * up of the halves of x[T, D] @ weight[F, D].T for many tokens, with wgmma. A tile is 128 tokens
// by 256 rows of the weight, 128 of the gate and the same 128 of up, so that a thread has both of a number of the result.
//
// One block stays on each multiprocessor and takes tile after tile. One warp lets tokens and weight be copied by the tensor
// memory accelerator, by maps that each block makes; two warpgroups multiply 64 tokens each. While they make the result of
// a tile, the copies for the next one come. Blocks of a cluster have tiles of other tokens by the same rows of the weight: each fetches its
// part of these for all of them, because the second-level cache could not give them so often.
//
//   OUT_FEATURES INPUTS    F / 2, a multiple of 128; D, a multiple of 64
//   CLUSTER                2
//   ACROSS                 clusters' tiles of tokens that are done side by side, with the same rows
//   STAGES                 of 64 inputs
//   GATED                  1: silu; 2: gelu with tanh
#include "cluster.cuh"
#include "hopper.cuh"
#include "tensor_map.cuh"

constexpr int GROUPS = 2, WARPS = GROUPS * 4, THREADS = (1 + GROUPS) * 128, STEPS = INPUTS / 64;
constexpr int ROWS = GROUPS * 64, COLUMNS = 256, TILE = COLUMNS / 2;
// Shared memory: the ring of tokens and rows of the weight, results on their way out, barriers.
constexpr int X_BYTES = ROWS * 128, W_BYTES = COLUMNS * 128, STAGE = X_BYTES + W_BYTES;
constexpr int PITCH = TILE * 2 + 16, OUT_AT = STAGES * STAGE, BARRIERS_AT = OUT_AT + WARPS * 16 * PITCH;
constexpr int W_BOX = TILE / 8 / CLUSTER;  // eights of rows of both halves, which one block copies to all
constexpr int MAPS = 2;
constexpr u32 ALL = (1 << CLUSTER) - 1;  // blocks of the cluster
static_assert(OUT_FEATURES % TILE == 0 && INPUTS % 64 == 0, "tiles");
static_assert(BARRIERS_AT + STAGES * 16 <= SHARED && STAGES > 1 && STEPS > 1, "shared memory, steps");

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// Tokens, and the rows of the weight: 8 of the gate, the same 8 of up, the next 8.
DEVICE Array4 tokens_of(const u8* x, u32 tokens) {
  const u64 row = INPUTS * 2;
  return {x, {INPUTS, tokens, 1, 1}, {row, row, row}, {64, ROWS, 1, 1}};
}
DEVICE Array4 rows_of(const u8* weight) {
  const u64 row = INPUTS * 2;
  return {weight, {INPUTS, 8, 2, OUT_FEATURES / 8}, {row, row * OUT_FEATURES, row * 8}, {64, 8, 2, W_BOX}};
}

// The work of this block's cluster, one tile of each block after another: those that run at the same time need few tokens
// and few rows of the weight, which the second-level cache then has.
struct Work {
  int across, down, item, rank;  // units of a cluster: of tokens, of rows of the weight

  DEVICE explicit Work(int tokens)
      : across((tokens + CLUSTER * ROWS - 1) / (CLUSTER * ROWS)), down(OUT_FEATURES / TILE),
        item(blockIdx.x / CLUSTER), rank(blockIdx.x % CLUSTER) {}
  DEVICE bool more() const { return item < across * down; }
  DEVICE void advance() { item += gridDim.x / CLUSTER; }
  DEVICE int width() const { return min(ACROSS, across - item / (ACROSS * down) * ACROSS); }
  DEVICE int unit_across() const { return item / (ACROSS * down) * ACROSS + item % (ACROSS * down) % width(); }
  DEVICE int unit_down() const { return item % (ACROSS * down) / width(); }
  // First token and first column of the result of this block's tile.
  DEVICE int token() const { return (unit_across() * CLUSTER + rank) * ROWS; }
  DEVICE int column() const { return unit_down() * TILE; }
};

// The ring: of each stage two barriers, `full` of what is copied here and `freed` by the warps of all blocks.
struct Stage {
  u32 barriers;
  int slot;
  u32 phase;

  DEVICE u32 full() const { return barriers + slot * 16; }
  DEVICE u32 freed() const { return barriers + slot * 16 + 8; }
  DEVICE void advance() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// One thread of a block lets everything be copied.
DEVICE void copy(u32 smem, Stage stage, const u8* maps, Work work) {
  const u8 *x_map = maps, *w_map = maps + 128;
  for (; work.more(); work.advance()) {
    const int token = work.token(), eight = work.column() / 8 + work.rank * W_BOX;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
      const u32 x = smem + stage.slot * STAGE, w = x + X_BYTES, full = stage.full();
      cluster_barrier_wait(stage.freed(), stage.phase ^ 1);
      barrier_expect(full, STAGE);
      copy_box(x, x_map, step * 64, token, 0, 0, full);
      copy_box_to_blocks(w + work.rank * (W_BYTES / CLUSTER), w_map, step * 64, 0, 0, eight, full, ALL);
      stage.advance();
    }
  }
}

DEVICE void multiply(u8* shared, u32 smem, Stage stage, Work work, int tokens, u16* __restrict__ out, int warp, int lane) {
  const u64 x_matrices = matrix_descriptor(smem + warp / 4 * 64 * 128, 128, 16, 1024);
  const u64 w_matrices = matrix_descriptor(smem + X_BYTES, 128, 16, 1024);
  u8* const mine = shared + OUT_AT + warp * 16 * PITCH;  // for 16 tokens, which go out in pieces of 16 bytes
  constexpr int PIECES = TILE / 8;
  float d[COLUMNS / 2];
  auto free_stage = [&](u32 freed) {
    if (lane < CLUSTER) cluster_arrive(freed, lane);
    __syncwarp();
  };
  for (; work.more(); work.advance()) {
    u32 before = 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
      barrier_wait(stage.full(), stage.phase);
      wgmma_pin(d);
      wgmma_fence();
      const u64 x = x_matrices + stage.slot * (STAGE / 16), w = w_matrices + stage.slot * (STAGE / 16);
#pragma unroll
      for (int i = 0; i < 4; i++) Wgmma<COLUMNS>::ss(d, x + i * 2, w + i * 2, step > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) free_stage(before);
      before = stage.freed();
      stage.advance();
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    free_stage(before);

    const int row = lane / 4, token = work.token() + warp * 16;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const float* const v = d + i * 8;
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(u32*)(mine + (row + half * 8) * PITCH + i * 16 + lane % 4 * 4) =
            pack_bf16(activation(v[half * 2]) * v[half * 2 + 4], activation(v[half * 2 + 1]) * v[half * 2 + 5]);
    }
    __syncwarp();
    u16* const to = out + (size_t)token * OUT_FEATURES + work.column();
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; i++) {
      const int of = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
      if (token + of < tokens)
        *(uint4*)(to + (size_t)of * OUT_FEATURES + piece * 8) = *(const uint4*)(mine + of * PITCH + piece * 16);
    }
    __syncwarp();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) tall_gemm(
    const u8* __restrict__ x, const u8* __restrict__ weight,
    const int* __restrict__ count,  // of tokens: T
    u16* __restrict__ out, u8* __restrict__ maps) {
  DYNAMIC_SHARED(shared);
  const u32 smem = __shfl_sync(0xffffffffu, shared_address(shared), 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, tokens = count[0];
  const Stage stage{smem + BARRIERS_AT, 0, 0};
  u8* const own = maps + blockIdx.x * (MAPS * 128);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(smem + BARRIERS_AT + i * 16, 1);
      barrier_init(smem + BARRIERS_AT + i * 16 + 8, CLUSTER * WARPS);
    }
    barrier_init_fence();
  }
  if (warp == 0) {
    make_map(smem, own, tokens_of(x, tokens), lane);
    make_map(smem + 128, own + 128, rows_of(weight), lane);
  }
  __syncthreads();
  cluster_sync();
  if (warp < 4) {
    registers_fewer<40>();
    if (threadIdx.x == 0) copy(smem, stage, own, Work(tokens));
  } else {
    registers_more<232>();
    multiply(shared, smem, stage, Work(tokens), tokens, out, warp - 4, lane);
  }
  cluster_sync();  // a block ends once the other needs nothing of it
}
