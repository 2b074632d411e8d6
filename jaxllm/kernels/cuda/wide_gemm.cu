// out[T, F / 2] = act(gate) * up of the halves of x[T, D] @ weight[F, D].T for up to 256 tokens, with wgmma: tokens are
// the left operand, 64 at a time, and COLUMNS rows of the weight, half gate and half up, the right one.
//
// A block has one tile: all tokens by COLUMNS rows. It is as large as the registers are, for two things bound such
// products beside the tensor cores. Shared memory is read for every product again: 64 tokens and the COLUMNS rows. And what
// the second-level cache gives: each block needs all tokens. So a cluster of two blocks shares them: each fetches one half
// for both. That takes copies of bytes that lie together, so x comes blocked: [D / 64, PADDED, 64], 64 inputs of all tokens
// after another, in each row of 128 bytes 16-byte piece c kept at c ^ (row mod 8), as products want it in shared memory.
//
// All threads multiply, and all copy the weight; one also lets the tokens be copied. There are two rings, for tokens and
// for the weight, whose stages are 64 inputs. A stage is filled again once both blocks have multiplied it, while the
// products of the next one run.
//
//   TOKENS PADDED          T; and a multiple of 64, rows of x; what is in those beyond T does not matter
//   OUT_FEATURES INPUTS    F / 2; D
//   COLUMNS                a multiple of 16; half of it divides F / 2
//   GROUPS BLOCKS_OF_GROUP warpgroups, and how often 64 tokens each has
//   CLUSTER                2
//   X_STAGES W_STAGES
//   GATED                  1: silu; 2: gelu with tanh
//   PARTS FACTORS EPS      an RMSNorm before the product, see factors.cuh: of sums of squares [PARTS, FACTORS], of which
//                          the first TOKENS count; 0 0: none
#include "cluster.cuh"
#include "factors.cuh"

constexpr int THREADS = GROUPS * 128, WARPS = GROUPS * 4, STEPS = INPUTS / 64, TILE = COLUMNS / 2;
// Shared memory: the ring of the weight, that of tokens, barriers.
constexpr int W_STAGE = COLUMNS * 128, X_STAGE = PADDED * 128, X_AT = W_STAGES * W_STAGE;
constexpr int BARRIERS_AT = X_AT + X_STAGES * X_STAGE, DONE_AT = BARRIERS_AT + (W_STAGES + X_STAGES) * 8;
constexpr int FACTORS_AT = (DONE_AT + 8 + 15) / 16 * 16, ADDED_AT = FACTORS_AT + FACTORS * 4;
constexpr int AT_ONCE = THREADS / 8, TURNS = (COLUMNS + AT_ONCE - 1) / AT_ONCE;  // rows of the weight of one turn; turns
constexpr int HALF = X_STAGE / CLUSTER;
// What a warp has of 64 tokens' results, 16 rows, on its way out.
constexpr int PITCH = TILE * 2 + 16, PIECES = TILE / 8;
static_assert(PADDED == GROUPS * BLOCKS_OF_GROUP * 64 && TOKENS <= PADDED, "tokens");
static_assert(INPUTS % 64 == 0 && COLUMNS % 16 == 0 && OUT_FEATURES % TILE == 0 && OUT_FEATURES % 8 == 0, "tiles");
static_assert(AT_ONCE % 16 == 0 && STEPS > W_STAGES && STEPS > X_STAGES && W_STAGES > 1 && X_STAGES > 1, "stages");
static_assert(W_STAGE % 1024 == 0 && WARPS * 16 * PITCH <= BARRIERS_AT, "shared memory");
static_assert(ADDED_AT + (PARTS ? 128 * 16 : 0) <= SHARED && (!PARTS || TOKENS <= FACTORS), "shared memory");

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// The row of the weight that is row `row` of a tile, from that tile's first: 8 of the gate, the same 8 of up, the next 8.
DEVICE int weight_row(int row) { return row / 16 * 8 + row % 8 + (row % 16 >= 8 ? OUT_FEATURES : 0); }

// Lets this thread's part of a stage of the weight be copied; `from` is the thread's first piece of it.
DEVICE void copy_weight(u32 to, u32 full, const u16* __restrict__ from, int first) {
#pragma unroll
  for (int i = 0; i < TURNS; i++)
    if ((i + 1) * AT_ONCE <= COLUMNS || first + i * AT_ONCE < COLUMNS)
      cp_async_16_ahead(to + i * AT_ONCE * 128, from + (size_t)(i * AT_ONCE / 2) * INPUTS, 16);
  cp_async_arrive(full);
}
// Lets this block's half of a stage of tokens be copied to both blocks.
DEVICE void copy_tokens(u32 to, u32 full, const u8* __restrict__ x, int step, int rank) {
  barrier_expect(full, X_STAGE);
  copy_to_blocks(to + rank * HALF, x + (size_t)step * X_STAGE + rank * HALF, HALF, full, (1 << CLUSTER) - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) wide_gemm(
    const u8* __restrict__ x, const u16* __restrict__ weight, const float4* __restrict__ squares,
    u16* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, rank = blockIdx.x % CLUSTER;
  const u32 w_full = smem + BARRIERS_AT, x_full = w_full + W_STAGES * 8, done = smem + DONE_AT;
  if (thread == 0) {
    for (int i = 0; i < W_STAGES; i++) barrier_init(w_full + i * 8, THREADS);
    for (int i = 0; i < X_STAGES; i++) barrier_init(x_full + i * 8, 1);
    barrier_init(done, CLUSTER * WARPS);  // a step's products, in both blocks
    barrier_init_fence();
  }
  __syncthreads();
  cluster_started();
  const int first = thread / 8;
  const u16* from = weight + ((size_t)blockIdx.x * TILE + weight_row(first)) * INPUTS + thread % 8 * 8;
  const u32 to = smem + first * 128 + ((thread % 8 ^ first % 8) << 4);
  for (int i = 0; i < W_STAGES; i++, from += 64) copy_weight(to + i * W_STAGE, w_full + i * 8, from, first);
  cluster_wait();
  if (thread == 0)
    for (int i = 0; i < X_STAGES; i++) copy_tokens(smem + X_AT + i * X_STAGE, x_full + i * 8, x, i, rank);
  __syncwarp();
  float* const factors = (float*)(shared + FACTORS_AT);
#if PARTS
  if (thread < 128)
    make_factors<FACTORS, PARTS>(factors, (float4*)(shared + ADDED_AT), squares, INPUTS, (float)EPS, thread, 1);
#endif

  float d[BLOCKS_OF_GROUP][COLUMNS / 2];
  const u32 tokens_at = smem + X_AT + warp / 4 * BLOCKS_OF_GROUP * 64 * 128;
  int w_slot = 0, w_phase = 0, x_slot = 0, x_phase = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++) {
    barrier_wait(w_full + w_slot * 8, w_phase);
    barrier_wait(x_full + x_slot * 8, x_phase);
    fence_products();
#pragma unroll
    for (int m = 0; m < BLOCKS_OF_GROUP; m++) wgmma_pin(d[m]);
    wgmma_fence();
    const u64 b = matrix_descriptor(smem + w_slot * W_STAGE, 128, 16, 1024);
#pragma unroll
    for (int m = 0; m < BLOCKS_OF_GROUP; m++) {
      const u64 a = matrix_descriptor(tokens_at + x_slot * X_STAGE + m * 64 * 128, 128, 16, 1024);
#pragma unroll
      for (int i = 0; i < 4; i++) Wgmma<COLUMNS>::ss(d[m], a + i * 2, b + i * 2, step > 0 || i > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    // What takes the place of the step before.
    const int next_x = step - 1 + X_STAGES, next_w = step - 1 + W_STAGES;
    if (step > 0 && (next_x < STEPS || next_w < STEPS)) {
      if (lane < CLUSTER) cluster_arrive(done, lane);
      barrier_wait(done, step - 1 & 1);
      if (thread == 0 && next_x < STEPS) {
        const int slot = x_slot == 0 ? X_STAGES - 1 : x_slot - 1;
        copy_tokens(smem + X_AT + slot * X_STAGE, x_full + slot * 8, x, next_x, rank);
      }
      if (next_w < STEPS) {
        const int slot = w_slot == 0 ? W_STAGES - 1 : w_slot - 1;
        copy_weight(to + slot * W_STAGE, w_full + slot * 8, from, first);
        from += 64;
      }
      __syncwarp();
    }
    if (++w_slot == W_STAGES) w_slot = 0, w_phase ^= 1;
    if (++x_slot == X_STAGES) x_slot = 0, x_phase ^= 1;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < BLOCKS_OF_GROUP; m++) wgmma_pin(d[m]);
  cluster_started();  // that is, done: what this block copies to the other has come there
  __syncthreads();    // nobody needs the rings any more

  // Rows of 16 tokens go through shared memory, and out in pieces of 16 bytes.
  const u32 row = lane / 4;
  u8* const mine = shared + warp * 16 * PITCH;
#pragma unroll
  for (int m = 0; m < BLOCKS_OF_GROUP; m++) {
    const int token = (warp / 4 * BLOCKS_OF_GROUP + m) * 64 + warp % 4 * 16;
    float by[2] = {1.f, 1.f};
    if (PARTS)
      for (int half = 0; half < 2; half++) by[half] = factors[min(token + (int)row + half * 8, FACTORS - 1)];
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) {
      float* const v = d[m] + i * 8;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (PARTS) v[half * 2] *= by[half], v[half * 2 + 1] *= by[half];
        if (PARTS) v[half * 2 + 4] *= by[half], v[half * 2 + 5] *= by[half];
        *(u32*)(mine + (row + half * 8) * PITCH + i * 16 + lane % 4 * 4) =
            pack_bf16(activation(v[half * 2]) * v[half * 2 + 4], activation(v[half * 2 + 1]) * v[half * 2 + 5]);
      }
    }
    __syncwarp();
    for (int i = lane; i < 16 * PIECES; i += 32) {
      const int of = token + i / PIECES;
      if (of < TOKENS)
        *(uint4*)(out + (size_t)of * OUT_FEATURES + blockIdx.x * TILE + i % PIECES * 8) =
            *(const uint4*)(mine + i / PIECES * PITCH + i % PIECES * 16);
    }
    __syncwarp();
  }
  cluster_wait();
}
