// out[T, F] = x[T, D] @ weight[F, D].T for few tokens: the weight is read once, at the speed of memory.
//
// A tile is ROWS rows of the weight. A cluster of CLUSTER blocks works on a tile, each block on its part of D, and goes
// on to the tile that lies `clusters` further. All blocks are on the chip from the start and have the same work, so
// that no wave of blocks is half empty. The copy engine brings rows into a ring of STAGES stages, which holds nearly
// all of the shared memory: that many bytes are under way at any time, also while a tile ends and the next one begins.
//
// The weight is the left operand of the tensor cores' products (16 rows x 16 inputs), tokens are the columns. A product
// may take its 16 inputs in any order as long as both sides take the same: a lane reads 16 consecutive bytes of a row,
// and the same inputs of its token. Every warp has its own inputs, so that no token is read twice by a block; the
// warps' and the blocks' partial sums are added up in a fixed order, in float32.
//
// Around the product, without any more kernels: RMSNorm of x before it, and after it act(gate) * up of the halves of
// the rows, or the addition of a residual.
//
//   TOKENS FEATURES INPUTS   T, F (both halves, where gated) and D
//   ROWS CLUSTER WARPS STAGES
//   GROUPS     groups of 64 bytes of each row in a stage; a multiple of WARPS
//   WEIGHT     0: bf16; 1: e4m3, 2: int8, with a float32 scale of each row
//   NORM EPS   1: x becomes x * rsqrt(mean(x^2) + EPS) * norm
//   GATED      0: no; 1: silu; 2: gelu with tanh
//   RESIDUAL   1: is added to the result
//   OUT_FLOAT  1: float32 results; 0: bf16
#include "bulk.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int GROUP = WEIGHT == 0 ? 32 : 64;    // inputs in 64 bytes of a row
constexpr int VECTORS = GROUP / 32;             // of 8 inputs, that a lane has of a group
constexpr int PRODUCTS = GROUP / 16;            // of 16 inputs each
constexpr int PER_WARP = GROUPS / WARPS;        // groups in a stage
constexpr int ROW_GROUPS = INPUTS / GROUP;
constexpr int MS = ROWS / 16;
constexpr int NS = (TOKENS + 7) / 8;
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS;
constexpr int OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = (OUT_FEATURES + OUT_ROWS - 1) / OUT_ROWS;
// 64 bytes more than the data: the 8 lanes that read at once, 64 bytes of 2 rows, then touch all banks.
constexpr int STRIDE = GROUPS * 64 + 64;
constexpr int STAGE = ROWS * STRIDE;
constexpr int SUM_STRIDE = ROWS + 4;            // floats; the lanes of a warp then write to all banks
constexpr int OUTPUTS = TOKENS * OUT_ROWS;      // of a tile
constexpr int PER_THREAD = ((OUTPUTS + CLUSTER - 1) / CLUSTER + THREADS - 1) / THREADS;
// Shared memory: the ring; the warps' sums [WARPS, TOKENS, SUM_STRIDE] and squares [WARPS, TOKENS]; for other blocks of
// the cluster, twice the block's sums [TOKENS, SUM_STRIDE] and once its squares [TOKENS]; full and empty barriers.
constexpr int SUMS = STAGES * STAGE;
constexpr int SQUARES = SUMS + WARPS * TOKENS * SUM_STRIDE * 4;
constexpr int SHARED_SUMS = SQUARES + WARPS * TOKENS * 4;
constexpr int SHARED_SQUARES = SHARED_SUMS + (CLUSTER > 1 ? 2 * TOKENS * SUM_STRIDE * 4 : 0);
constexpr int BARRIERS = (SHARED_SQUARES + (CLUSTER > 1 ? TOKENS * 4 : 0) + 7) / 8 * 8;
static_assert(ROWS % 16 == 0 && GROUPS % WARPS == 0 && GROUPS % 2 == 0 && INPUTS % GROUP == 0, "sizes");
static_assert(BARRIERS + 16 * STAGES <= SHARED, "shared memory");

// What a lane needs of the inputs for a stage: 16 bytes of a token for each half of a group, and of the norm's weight.
struct Inputs {
  uint4 x[PER_WARP][NS][VECTORS];
  float4 norm[NORM ? PER_WARP : 1][2 * VECTORS];
};

DEVICE u32 scaled(u32 pair, float a, float b) {
  return pack_bf16(bf16_to_float((u16)pair) * a, bf16_to_float((u16)(pair >> 16)) * b);
}
DEVICE float squared(u32 pair) {
  const float a = bf16_to_float((u16)pair), b = bf16_to_float((u16)(pair >> 16));
  return a * a + b * b;
}

// Bytes 0 and 2 (or 1 and 3, shifted down) of a word as two bf16. e4m3: sign, exponent and mantissa move to their places,
// and the exponents' bias is put right by a factor of 2^120. int8: the low 7 bits are the mantissa of 128 + low; of it
// 128 is taken, or 256 where the sign is set. Both are exact.
DEVICE u32 widen(u32 word) {
  if (WEIGHT == 1) {
    word <<= 8;
    return fma_bf16x2((word & 0x80008000u) | ((word & 0x7F007F00u) >> 4), 0x7B807B80u, 0x80008000u);
  }
  return fma_bf16x2((word & 0x007F007Fu) | 0x43004300u, 0x3F803F80u, (word & 0x00800080u) | 0xC300C300u);
}

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// The row of the weight that lies at `row` of a tile. Gated: 8 rows of the gate, the same 8 of up, the next 8 of the gate.
DEVICE int weight_row(int tile, int row) {
  if (!GATED) return min(tile * ROWS + row, FEATURES - 1);
  const int out = min(tile * OUT_ROWS + row / 16 * 8 + row % 8, OUT_FEATURES - 1);
  return row % 16 < 8 ? out : OUT_FEATURES + out;
}

#if OUT_FLOAT
typedef float Out;
#else
typedef u16 Out;
#endif

// scale, norm and residual are read where the macros say that there are any.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) skinny_gemm(
    const u16* __restrict__ x, const u8* __restrict__ weight, const float* __restrict__ scale,
    const float* __restrict__ norm, const u16* __restrict__ residual, Out* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  float* const sums = (float*)(shared + SUMS);
  float* const squares = (float*)(shared + SQUARES);
  const u32 ring = shared_address(shared), full = shared_address(shared + BARRIERS), empty = full + 8 * STAGES;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, quarter = lane % 4;  // of a product: row of the weight and token; quarter of a group
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  const int first_group = rank * ROW_GROUPS / CLUSTER;
  const int groups = (rank + 1) * ROW_GROUPS / CLUSTER - first_group;
  const int chunks = (groups + GROUPS - 1) / GROUPS;  // stages of a tile
  const int iterations = cluster < TILES ? (TILES - 1 - cluster) / clusters * chunks + chunks : 0;

  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const u64 policy = read_once();
  // Lets the copy engine fetch what iteration `it` works on; by one warp.
  auto issue = [&](int it, int slot) {
    const int tile = cluster + it / chunks * clusters, chunk = it % chunks;
    const u32 bytes = min(GROUPS, groups - chunk * GROUPS) * 64;
    const u8* from = weight + (size_t)(first_group + chunk * GROUPS) * 64;
    if (lane == 0) barrier_arrive_expect(full + 8 * slot, ROWS * bytes);
    __syncwarp();
    for (int r = lane; r < ROWS; r += 32) {
      const size_t offset = (size_t)weight_row(tile, r) * (ROW_GROUPS * 64);
      bulk_copy(ring + slot * STAGE + r * STRIDE, from + offset, bytes, full + 8 * slot, policy);
    }
  };
  for (int it = warp; it < min(STAGES, iterations); it += WARPS) issue(it, it);

  auto fetch = [&](Inputs& in, int chunk) {
#pragma unroll
    for (int i = 0; i < PER_WARP; i++) {
      const int group = chunk * GROUPS + warp * PER_WARP + i;
      const int k = (first_group + group) * GROUP + quarter * (GROUP / 4);
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
          in.x[i][n][v] = group < groups && n * 8 + row < TOKENS
                              ? __ldg((const uint4*)(x + (size_t)(n * 8 + row) * INPUTS + k + v * 8))
                              : make_uint4(0, 0, 0, 0);
#if NORM
#pragma unroll
      for (int v = 0; v < 2 * VECTORS; v++)
        in.norm[i][v] = group < groups ? __ldg((const float4*)(norm + k + v * 4)) : make_float4(0, 0, 0, 0);
#endif
    }
  };

  // This thread's results of a tile: index in [0, OUTPUTS), token by token.
  const int first_output = rank * OUTPUTS / CLUSTER, last_output = (rank + 1) * OUTPUTS / CLUSTER;
  auto output = [&](int i) { return first_output + thread + i * THREADS; };

  float acc[MS][NS][4] = {};
  float square[NS] = {};
  Inputs next;
  if (iterations > 0) fetch(next, 0);
  int slot = 0, phase = 0, chunk = 0, tile = cluster;
#if RESIDUAL
  u16 added[PER_THREAD];
#endif
  for (int it = 0; it < iterations; it++) {
#if RESIDUAL
    if (chunk == 0)
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) {
        const int at = output(i), feature = tile * OUT_ROWS + at % OUT_ROWS;
        if (at < last_output && feature < OUT_FEATURES)
          added[i] = __ldg(residual + (size_t)(at / OUT_ROWS) * OUT_FEATURES + feature);
      }
#endif
    // The stage before this one is refilled when all warps are done with it; the warps take turns.
    if (it > 0 && warp == it % WARPS && it - 1 + STAGES < iterations) {
      const int old = slot == 0 ? STAGES - 1 : slot - 1;
      barrier_wait(empty + 8 * old, slot == 0 ? phase ^ 1 : phase);
      issue(it - 1 + STAGES, old);
    }

    u32 b[PER_WARP][NS][PRODUCTS][2];
#pragma unroll
    for (int i = 0; i < PER_WARP; i++)
#pragma unroll
      for (int n = 0; n < NS; n++) {
        u32 pairs[4 * VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
          const uint4 in = next.x[i][n][v];
          pairs[4 * v] = in.x, pairs[4 * v + 1] = in.y, pairs[4 * v + 2] = in.z, pairs[4 * v + 3] = in.w;
        }
#if NORM
#pragma unroll
        for (int p = 0; p < 4 * VECTORS; p++) {
          const float4 factor = next.norm[i][p / 2];
          if (tile == cluster) square[n] += squared(pairs[p]);
          pairs[p] = p % 2 ? scaled(pairs[p], factor.z, factor.w) : scaled(pairs[p], factor.x, factor.y);
        }
#endif
#pragma unroll
        for (int p = 0; p < PRODUCTS; p++) {
          const u32 low = pairs[2 * p], high = pairs[2 * p + 1];
          b[i][n][p][0] = WEIGHT == 0 ? low : select_bytes(low, high, 0x5410);
          b[i][n][p][1] = WEIGHT == 0 ? high : select_bytes(low, high, 0x7632);
        }
      }
    const bool last = chunk == chunks - 1;
    if (it + 1 < iterations) fetch(next, last ? 0 : chunk + 1);

    barrier_wait(full + 8 * slot, phase);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PER_WARP; i++) {
      const int group = warp * PER_WARP + i;
      if (chunk * GROUPS + group < groups) {
        const u8* from = shared + slot * STAGE + row * STRIDE + group * 64 + quarter * 16;
#pragma unroll
        for (int m = 0; m < MS; m++) {
          const uint4 top = *(const uint4*)(from + m * 16 * STRIDE), bottom = *(const uint4*)(from + (m * 16 + 8) * STRIDE);
          const u32 tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
          for (int p = 0; p < PRODUCTS; p++) {
            u32 a[4];
            if (WEIGHT == 0) {
              a[0] = tops[2 * p % 4], a[1] = bottoms[2 * p % 4], a[2] = tops[(2 * p + 1) % 4], a[3] = bottoms[(2 * p + 1) % 4];
            } else {
              a[0] = widen(tops[p % 4]), a[1] = widen(bottoms[p % 4]);
              a[2] = widen(tops[p % 4] >> 8), a[3] = widen(bottoms[p % 4] >> 8);
            }
#pragma unroll
            for (int n = 0; n < NS; n++) mma_bf16(acc[m][n], a, b[i][n][p][0], b[i][n][p][1]);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * slot);
    if (++slot == STAGES) slot = 0, phase ^= 1;
    if (!last) {
      chunk++;
      continue;
    }

    // The tile is done: the warps' sums, then the blocks', in this order.
#pragma unroll
    for (int m = 0; m < MS; m++)
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int token = n * 8 + quarter * 2 + j % 2;
          if (token < TOKENS) sums[(warp * TOKENS + token) * SUM_STRIDE + m * 16 + row + j / 2 * 8] = acc[m][n][j];
          acc[m][n][j] = 0.f;
        }
    if (NORM && tile == cluster)
#pragma unroll
      for (int n = 0; n < NS; n++) {
        square[n] += __shfl_xor_sync(~0u, square[n], 1);
        square[n] += __shfl_xor_sync(~0u, square[n], 2);
        if (quarter == 0 && n * 8 + row < TOKENS) squares[warp * TOKENS + n * 8 + row] = square[n];
      }
    __syncthreads();
    auto sum_of_warps = [&](const float* of, int stride) {
      float sum = of[0];
#pragma unroll
      for (int w = 1; w < WARPS; w++) sum += of[w * stride];
      return sum;
    };
#if CLUSTER > 1
    // Two buffers in turn: nobody writes to one before the barrier of the next tile, after which nobody reads it.
    float* const ours = (float*)(shared + SHARED_SUMS) + ((tile - cluster) / clusters & 1) * TOKENS * SUM_STRIDE;
    float* const our_squares = (float*)(shared + SHARED_SQUARES);
    for (int i = thread; i < TOKENS * ROWS; i += THREADS) {
      const int at = i / ROWS * SUM_STRIDE + i % ROWS;
      ours[at] = sum_of_warps(sums + at, TOKENS * SUM_STRIDE);
    }
    if (NORM && tile == cluster && thread < TOKENS) our_squares[thread] = sum_of_warps(squares + thread, TOKENS);
    cluster_sync();
    auto total = [&](const float* of) {
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < CLUSTER; r++) sum += cluster_load(shared_address(of), r);
      return sum;
    };
    auto total_sum = [&](int token, int r) { return total(ours + token * SUM_STRIDE + r); };
    auto total_square = [&](int token) { return total(our_squares + token); };
#else
    auto total_sum = [&](int token, int r) {
      return sum_of_warps(sums + token * SUM_STRIDE + r, TOKENS * SUM_STRIDE);
    };
    auto total_square = [&](int token) { return sum_of_warps(squares + token, TOKENS); };
#endif
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int at = output(i), token = at / OUT_ROWS, r = at % OUT_ROWS, feature = tile * OUT_ROWS + r;
      if (at >= last_output || feature >= OUT_FEATURES) continue;
      float factor = NORM ? rsqrtf(total_square(token) / INPUTS + EPS) : 1.f;
      float value;
#if GATED
      float gate = total_sum(token, r / 8 * 16 + r % 8) * factor, up = total_sum(token, r / 8 * 16 + r % 8 + 8) * factor;
#if WEIGHT > 0
      gate *= __ldg(scale + feature), up *= __ldg(scale + OUT_FEATURES + feature);
#endif
      value = activation(gate) * up;
#else
      value = total_sum(token, r) * factor;
#if WEIGHT > 0
      value *= __ldg(scale + feature);
#endif
#endif
#if RESIDUAL
      value += bf16_to_float(added[i]);
#endif
      const size_t to = (size_t)token * OUT_FEATURES + feature;
#if OUT_FLOAT
      out[to] = value;
#else
      out[to] = (u16)pack_bf16(value, 0.f);
#endif
    }
    chunk = 0;
    tile += clusters;
#if CLUSTER == 1
    __syncthreads();  // the next tile's sums
#endif
  }
#if CLUSTER > 1
  cluster_sync();  // the other blocks still read this one's memory
#endif
}
