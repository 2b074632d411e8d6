// out[T, F] = x[T, D] @ weight[F, D].T for few tokens: the weight is read once, at the speed of memory.
//
// Weights go from global memory straight into the registers that the tensor cores take them from, with no shared memory
// between. The weight is the left operand (16 rows x 16 inputs), tokens are the columns. A product may take its inputs in
// any order as long as both sides take the same: a lane reads 16 consecutive bytes of a row, which are its operands for
// two products, and the same inputs of its token. Four lanes read 64 bytes of a row, and go on with the next 64.
//
// What is under way is in a ring of registers, refilled as it is used, over the ends of tiles: with 16 warps, 8 groups of
// 64 bytes and 16 rows it is 128 KiB of a multiprocessor, which is what memory has to be asked for at a time to give all
// it can. A tile is ROWS rows of the weight. A cluster of CLUSTER blocks works on a tile, each block on its part of the
// inputs, and goes on to the tile that lies `clusters` further. The warps of a block split its part. All partial sums
// are added up in a fixed order, in float32, by the block of the cluster that has the row; they are written to one of
// two buffers in turn, so that a tile takes one barrier.
//
// Around the product, without any more kernels: RMSNorm of x before it, and after it act(gate) * up of the halves of
// the rows, or the addition of a residual. x is brought to shared memory, and normed there, while the first weights come.
//
//   TOKENS FEATURES INPUTS   T, F (both halves, where gated) and D
//   ROWS CLUSTER WARPS
//   GROUPS     groups of 64 bytes of each row that a warp has under way
//   WEIGHT     0: bf16; 1: e4m3, 2: int8, with a float32 scale of each row
//   NORM EPS   1: x becomes x * rsqrt(mean(x^2) + EPS) * norm, rounded to bf16
//   GATED      0: no; 1: silu; 2: gelu with tanh
//   RESIDUAL   1: is added to the result
//   OUT_FLOAT  1: float32 results; 0: bf16
//   AHEAD      bytes of `ahead`, the weight that is read next, that each block lets the second-level cache fetch
#include "cluster.cuh"
#include "stream.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int GROUP = WEIGHT == 0 ? 32 : 64;    // inputs in 64 bytes of a row
constexpr int VECTORS = GROUP / 32;             // of 8 inputs, that a lane has of a group
constexpr int PRODUCTS = GROUP / 16;            // of 16 inputs each
constexpr int ROW_GROUPS = INPUTS / GROUP;
constexpr int PART = (ROW_GROUPS + CLUSTER - 1) / CLUSTER;  // groups of a block
constexpr int ITERATIONS = (PART + WARPS * GROUPS - 1) / (WARPS * GROUPS);
constexpr bool WHOLE = ITERATIONS * WARPS * GROUPS * CLUSTER == ROW_GROUPS;
constexpr int BATCH = (GROUPS + 3) / 4;         // groups that are refilled together
constexpr int BATCHES = (GROUPS + BATCH - 1) / BATCH;
constexpr int MS = ROWS / 16;
constexpr int NS = (TOKENS + 7) / 8;
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS;
constexpr int OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = (OUT_FEATURES + OUT_ROWS - 1) / OUT_ROWS;
// x: [TOKENS, X_STRIDE bytes]. An odd number of 64 bytes: the 8 lanes that read at once, 64 bytes of 2 tokens, then touch
// all banks. What lies beyond the block's part is zero.
constexpr int PIECES = ITERATIONS * WARPS * GROUPS * GROUP / 8;  // of 8 inputs
constexpr int X_STRIDE = PIECES * 16 | 64;
// The sums of all warps of the cluster for the rows that a block adds up: 2 of [SOURCES, TOKENS, SUM_STRIDE].
constexpr int SOURCES = CLUSTER * WARPS;
constexpr int EIGHTH = 8 / CLUSTER;             // of 8 rows, those of a block
constexpr int SUM_STRIDE = ROWS / CLUSTER + (CLUSTER == 1 ? 4 : 0);
constexpr int SUMS = TOKENS * X_STRIDE;
constexpr int BUFFER = SOURCES * TOKENS * SUM_STRIDE * 4;
// Squares: [TOKENS, CLUSTER * TOKEN_WARPS]. A token is brought by TOKEN_WARPS warps.
constexpr int warps_of_token() {
  int count = WARPS;
  while (count > 1 && count * TOKENS > WARPS) count /= 2;
  return count;
}
constexpr int TOKEN_WARPS = warps_of_token();
constexpr int SQUARES = SUMS + 2 * BUFFER;
static_assert(SQUARES + (NORM ? TOKENS * CLUSTER * TOKEN_WARPS * 4 : 0) <= SHARED, "shared memory");
static_assert(ROWS % 16 == 0 && 8 % CLUSTER == 0 && INPUTS % GROUP == 0 && (CLUSTER - 1) * PART < ROW_GROUPS, "sizes");
// Results of a tile that a block adds up, each with SPREAD lanes.
constexpr int OUTPUTS = TOKENS * OUT_ROWS / CLUSTER;
constexpr int lanes_of_output() {
  int lanes = 1;
  while (lanes < 32 && lanes < SOURCES && lanes * 2 * OUTPUTS <= THREADS) lanes *= 2;
  return lanes;
}
constexpr int SPREAD = lanes_of_output();
constexpr int PER_THREAD = (OUTPUTS * SPREAD + THREADS - 1) / THREADS;

DEVICE float squared(u32 pair) {
  const float a = bf16_to_float((u16)pair), b = bf16_to_float((u16)(pair >> 16));
  return a * a + b * b;
}
DEVICE u32 normed(u32 pair, float factor, float a, float b) {
  return pack_bf16(bf16_to_float((u16)pair) * factor * a, bf16_to_float((u16)(pair >> 16)) * factor * b);
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

// The row of the weight at `row` of a tile. Gated: 8 rows of the gate, the same 8 of up, the next 8 of the gate.
DEVICE int weight_row(int tile, int row) {
  if (!GATED) return FEATURES % ROWS ? min(tile * ROWS + row, FEATURES - 1) : tile * ROWS + row;
  int out = tile * OUT_ROWS + row / 16 * 8 + row % 8;
  if (OUT_FEATURES % OUT_ROWS) out = min(out, OUT_FEATURES - 1);
  return row % 16 < 8 ? out : OUT_FEATURES + out;
}

// Where 16 bytes of a token lie in shared memory. Weights of 1 byte: the lane of a group has two, 64 bytes apart.
DEVICE int x_at(int token, int piece) {
  const int place = VECTORS == 1 ? piece : piece / 8 * 8 + piece % 2 * 4 + piece % 8 / 2;
  return token * X_STRIDE + place * 16;
}

// All threads of the cluster have come here, and see what the others wrote to shared memory.
DEVICE void sync_all() {
  if (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();
}
// Writes to the shared memory of one of the cluster's blocks, once all have started.
DEVICE void give(float* to, u32 rank, float value) {
  if (CLUSTER > 1)
    cluster_store(shared_address(to), rank, value);
  else
    *to = value;
}

#if OUT_FLOAT
typedef float Out;
#else
typedef u16 Out;
#endif

// scale, norm, residual and ahead are read where the macros say that there are any.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) skinny_gemm(
    const u16* __restrict__ x, const u8* __restrict__ weight, const float* __restrict__ scale,
    const float* __restrict__ norm, const u16* __restrict__ residual, const u8* __restrict__ ahead,
    Out* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  float* const squares = (float*)(shared + SQUARES);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, quarter = lane % 4;  // of a product: row of the weight and token; quarter of a group
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  const int first = rank * PART, groups = min(PART, ROW_GROUPS - first);

  uint4 ring[GROUPS][MS][2];
  auto load = [&](int batch, int tile, int iteration) {
    const int at = (iteration * WARPS + warp) * GROUPS;
#pragma unroll
    for (int m = 0; m < MS; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const size_t offset = (size_t)weight_row(tile, m * 16 + half * 8 + row) * (ROW_GROUPS * 64);
        const u8* from = weight + offset + (first + at) * 64 + quarter * 16;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          const int s = batch * BATCH + i;
          if (s >= GROUPS) continue;
          if (WHOLE || at + s < groups)
            ring[s][m][half] = load_streamed(from + s * 64);
          else
            ring[s][m][half] = make_uint4(0, 0, 0, 0);
        }
      }
  };
  int tile = cluster;
#pragma unroll
  for (int batch = 0; batch < BATCHES / 2; batch++)
    if (tile < TILES) load(batch, tile, 0);

  // The block's part of x. Each thread later works on what it brought itself.
  const int first_token = warp / TOKEN_WARPS, first_piece = warp % TOKEN_WARPS * 32 + lane;
  constexpr int TOKEN_STEP = WARPS / TOKEN_WARPS, PIECE_STEP = TOKEN_WARPS * 32;
  for (int token = first_token; token < TOKENS; token += TOKEN_STEP)
    for (int piece = first_piece; piece < PIECES; piece += PIECE_STEP) {
      const bool inside = WHOLE || piece < groups * (GROUP / 8);
      const u16* from = x + (size_t)token * INPUTS + (inside ? first * GROUP + piece * 8 : 0);
      cp_async_16(shared_address(shared + x_at(token, piece)), from, inside ? 16 : 0);
    }
  cp_async_commit();
#pragma unroll
  for (int batch = BATCHES / 2; batch < BATCHES; batch++)
    if (tile < TILES) load(batch, tile, 0);
  if (CLUSTER > 1) cluster_sync();  // all have started
  cp_async_wait<0>();

  if (NORM) {
    for (int token = first_token; token < TOKENS; token += TOKEN_STEP) {
      float sum = 0.f;
      for (int piece = first_piece; piece < PIECES; piece += PIECE_STEP) {
        const uint4 v = *(const uint4*)(shared + x_at(token, piece));
        sum += squared(v.x) + squared(v.y) + squared(v.z) + squared(v.w);
      }
#pragma unroll
      for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
      if (lane < CLUSTER) give(squares + (token * CLUSTER + rank) * TOKEN_WARPS + warp % TOKEN_WARPS, lane, sum);
    }
    sync_all();
  }
  if (NORM || WEIGHT)
    for (int token = first_token; token < TOKENS; token += TOKEN_STEP) {
      float factor = 0.f;
      if (NORM) {
        for (int i = 0; i < CLUSTER * TOKEN_WARPS; i++) factor += squares[token * CLUSTER * TOKEN_WARPS + i];
        factor = rsqrtf(factor / INPUTS + EPS);
      }
      for (int piece = first_piece; piece < PIECES; piece += PIECE_STEP) {
        uint4* const at = (uint4*)(shared + x_at(token, piece));
        uint4 v = *at;
        if (NORM && (WHOLE || piece < groups * (GROUP / 8))) {
          const float4* weights = (const float4*)(norm + first * GROUP + piece * 8);
          const float4 a = __ldg(weights), b = __ldg(weights + 1);
          v.x = normed(v.x, factor, a.x, a.y), v.y = normed(v.y, factor, a.z, a.w);
          v.z = normed(v.z, factor, b.x, b.y), v.w = normed(v.w, factor, b.z, b.w);
        }
        // Weights of 1 byte come out of `widen` in this order.
        if (WEIGHT)
          v = make_uint4(select_bytes(v.x, v.y, 0x5410), select_bytes(v.x, v.y, 0x7632),
                         select_bytes(v.z, v.w, 0x5410), select_bytes(v.z, v.w, 0x7632));
        *at = v;
      }
    }
  __syncthreads();

  // This thread's results of a tile: index in [0, OUTPUTS), token by token.
  auto output = [&](int i) { return thread / SPREAD + i * (THREADS / SPREAD); };
  auto feature_of = [&](int at) {
    const int r = at % (OUT_ROWS / CLUSTER);
    return tile * OUT_ROWS + r / EIGHTH * 8 + rank * EIGHTH + r % EIGHTH;
  };
  for (int buffer = 0; tile < TILES; tile += clusters, buffer ^= 1) {
#if RESIDUAL
    u16 added[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int at = output(i), feature = feature_of(at);
      if (at < OUTPUTS && feature < OUT_FEATURES)
        added[i] = __ldg(residual + (size_t)(at / (OUT_ROWS / CLUSTER)) * OUT_FEATURES + feature);
    }
#endif
    const int next_tile = tile + clusters;
    if (AHEAD && next_tile >= TILES && warp == 0) prefetch(ahead + ((size_t)blockIdx.x * 32 + lane) * (AHEAD / 32), AHEAD / 32);

    float acc[MS][NS][4] = {};
#pragma unroll 1
    for (int iteration = 0; iteration < ITERATIONS; iteration++) {
      const bool last = iteration + 1 == ITERATIONS, more = !last || next_tile < TILES;
#pragma unroll
      for (int batch = 0; batch < BATCHES; batch++) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          const int s = batch * BATCH + i;
          if (s >= GROUPS) continue;
          u32 b[NS][PRODUCTS][2];
#pragma unroll
          for (int n = 0; n < NS; n++)
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
              const int group = (iteration * WARPS + warp) * GROUPS + s;
              // Columns beyond the tokens are not used, whatever they are.
              const uint4 in = *(const uint4*)(shared + min(n * 8 + row, TOKENS - 1) * X_STRIDE +
                                               group * GROUP * 2 + v * 64 + quarter * 16);
              b[n][2 * v][0] = in.x, b[n][2 * v][1] = in.y, b[n][2 * v + 1][0] = in.z, b[n][2 * v + 1][1] = in.w;
            }
#pragma unroll
          for (int m = 0; m < MS; m++) {
            const uint4 top = ring[s][m][0], bottom = ring[s][m][1];
            const u32 tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++) {
              u32 a[4];
              if (WEIGHT == 0) {
                a[0] = tops[2 * p % 4], a[1] = bottoms[2 * p % 4];
                a[2] = tops[(2 * p + 1) % 4], a[3] = bottoms[(2 * p + 1) % 4];
              } else {
                a[0] = widen(tops[p % 4]), a[1] = widen(bottoms[p % 4]);
                a[2] = widen(tops[p % 4] >> 8), a[3] = widen(bottoms[p % 4] >> 8);
              }
#pragma unroll
              for (int n = 0; n < NS; n++) mma_bf16(acc[m][n], a, b[n][p][0], b[n][p][1]);
            }
          }
        }
        if (more) load(batch, last ? next_tile : tile, last ? 0 : iteration + 1);
      }
    }

    // The tile is done: each warp gives its sums to the blocks that have the rows.
    float* const sums = (float*)(shared + SUMS + buffer * BUFFER);
#pragma unroll
    for (int m = 0; m < MS; m++)
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int token = n * 8 + quarter * 2 + j % 2, r = (m * 2 + j / 2) * EIGHTH + row % EIGHTH;
          if (token < TOKENS)
            give(sums + ((rank * WARPS + warp) * TOKENS + token) * SUM_STRIDE + r, row / EIGHTH, acc[m][n][j]);
        }
    sync_all();
    auto total = [&](int token, int r) {
      float sum = 0.f;
#pragma unroll
      for (int source = 0; source < SOURCES; source += SPREAD)
        sum += sums[((source + lane % SPREAD) * TOKENS + token) * SUM_STRIDE + r];
#pragma unroll
      for (int bit = SPREAD / 2; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
      return sum;
    };
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int at = output(i), feature = feature_of(at);
      const int token = min(at / (OUT_ROWS / CLUSTER), TOKENS - 1), r = at % (OUT_ROWS / CLUSTER);
      const bool mine = at < OUTPUTS && feature < OUT_FEATURES && lane % SPREAD == 0;
#if GATED
      const int gate_row = r / EIGHTH * 2 * EIGHTH + r % EIGHTH;
      float gate = total(token, gate_row), up = total(token, gate_row + EIGHTH);
#else
      float value = total(token, r);
#endif
      if (!mine) continue;
#if WEIGHT > 0 && GATED
      gate *= __ldg(scale + feature), up *= __ldg(scale + OUT_FEATURES + feature);
#elif WEIGHT > 0
      value *= __ldg(scale + feature);
#endif
#if GATED
      float value = activation(gate) * up;
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
  }
}
