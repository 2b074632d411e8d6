// out[T, F] = x[T, D] @ weight[F, D].T for few tokens: the weight is read once, at the speed of memory.
//
// A warp has its own lines of 128 bytes of each row, and its own ring of STAGES stages in shared memory, which it fills by
// asynchronous copies of whole lines and empties by itself: no thread waits for another before the end of a tile, and
// STAGES - 1 stages of each warp are under way at any time, over the ends of tiles. (What a multiprocessor can have under
// way counts in lines of 128 bytes: loads of 64 bytes of a row reach 65 % of the bandwidth.)
//
// The weight is the left operand of the tensor cores' products (16 rows x 16 inputs), tokens are the columns. A tile is
// ROWS rows of the weight. A cluster of CLUSTER blocks works on a tile, each block on its part of the inputs, and goes on
// to the tile that lies `clusters` further. All partial sums are added up in a fixed order, in float32, by the block of
// the cluster that has the row; they are written to one of two buffers in turn, so that a tile takes one barrier.
//
// Around the product, without any more kernels: RMSNorm of x before it, and after it act(gate) * up of the halves of
// the rows, or the addition of a residual. x is brought to shared memory, and normed there, while the first weights come.
//
//   TOKENS FEATURES INPUTS   T, F (both halves, where gated) and D
//   ROWS CLUSTER WARPS STAGES
//   WEIGHT     0: bf16; 1: e4m3, 2: int8, with a float32 scale of each row
//   NORM EPS   1: x becomes x * rsqrt(mean(x^2) + EPS) * norm, rounded to bf16
//   GATED      0: no; 1: silu; 2: gelu with tanh
//   RESIDUAL   1: is added to the result
//   OUT_FLOAT  1: float32 results; 0: bf16
//   AHEAD      bytes of `ahead`, the weight that is read next, that each block lets the second-level cache fetch
#include "cluster.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int BYTES = WEIGHT == 0 ? 2 : 1;      // of a value of the weight
constexpr int LINE = 128 / BYTES;               // inputs in a line of 128 bytes of a row
constexpr int ROW_LINES = (INPUTS + LINE - 1) / LINE;
constexpr int PART = (ROW_LINES + CLUSTER - 1) / CLUSTER;   // lines of a block
constexpr int TURNS = (PART + WARPS - 1) / WARPS;           // lines of a warp, of each tile
constexpr bool WHOLE = TURNS * WARPS * CLUSTER * LINE == INPUTS;
constexpr int MS = ROWS / 16;
constexpr int NS = (TOKENS + 7) / 8;
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS;
constexpr int OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = (OUT_FEATURES + OUT_ROWS - 1) / OUT_ROWS;
// Shared memory: the warps' rings, [WARPS, STAGES, ROWS, 128 bytes], the 16 bytes at i of a row at i ^ row % 8; and x,
// [TOKENS, X_STRIDE bytes]. The 8 pieces of 16 bytes that are read at once, of 8 rows or tokens, then touch all banks.
// What lies beyond the block's inputs is zero.
constexpr int STAGE = ROWS * 128;
constexpr int X = WARPS * STAGES * STAGE;
constexpr int PIECES = TURNS * WARPS * LINE / 8;  // of 8 inputs
constexpr int X_STRIDE = PIECES * 16 + 16;
// Sums of a block's rows to be added up: of its warps, or of the cluster's blocks, which add up their warps' first. 2 of
// [SOURCES, TOKENS, SUM_STRIDE], and in a cluster the warps' [WARPS, TOKENS, ROWS + 4].
constexpr int SOURCES = CLUSTER == 1 ? WARPS : CLUSTER;
constexpr int EIGHTH = 8 / CLUSTER;             // of 8 rows, those of a block
constexpr int WARP_STRIDE = ROWS + 4;           // floats; the lanes of a warp then write to all banks
constexpr int SUM_STRIDE = CLUSTER == 1 ? WARP_STRIDE : ROWS / CLUSTER;
constexpr int SUMS = X + TOKENS * X_STRIDE;
constexpr int BUFFER = SOURCES * TOKENS * SUM_STRIDE * 4;
constexpr int OF_WARPS = SUMS + 2 * BUFFER;
// Squares: [TOKENS, CLUSTER * TOKEN_WARPS]. A token is brought by TOKEN_WARPS warps.
constexpr int warps_of_token() {
  int count = WARPS;
  while (count > 1 && count * TOKENS > WARPS) count /= 2;
  return count;
}
constexpr int TOKEN_WARPS = warps_of_token();
constexpr int SQUARES = OF_WARPS + (CLUSTER == 1 ? 0 : WARPS * TOKENS * WARP_STRIDE * 4);
static_assert(SQUARES + (NORM ? TOKENS * CLUSTER * TOKEN_WARPS * 4 : 0) <= SHARED, "shared memory");
static_assert(ROWS % 16 == 0 && 8 % CLUSTER == 0 && INPUTS % (16 / BYTES) == 0 && (CLUSTER - 1) * PART < ROW_LINES && STAGES > 1, "sizes");
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
  const int row = lane / 4, quarter = lane % 4;  // of a product's results: row, and pair of tokens
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  const int first = rank * PART * LINE, inputs = min(PART * LINE, INPUTS - first);  // of this block

  // The block's part of x. Each thread later works on what it brought itself, 1 or 2 pieces at a time.
  const int first_token = warp / TOKEN_WARPS, first_unit = warp % TOKEN_WARPS * 32 + lane;
  constexpr int TOKEN_STEP = WARPS / TOKEN_WARPS, UNIT_STEP = TOKEN_WARPS * 32, UNIT = WEIGHT ? 2 : 1;
  constexpr int OWN_TOKENS = (TOKENS + TOKEN_STEP - 1) / TOKEN_STEP;
  constexpr int UNITS = PIECES / UNIT, OWN_UNITS = (UNITS + UNIT_STEP - 1) / UNIT_STEP;
  auto token_at = [&](int i) { return first_token + i * TOKEN_STEP; };
  auto unit_at = [&](int i) { return first_unit + i * UNIT_STEP; };
  for (int t = 0; t < OWN_TOKENS; t++)
#pragma unroll 4
    for (int u = 0; u < OWN_UNITS; u++)
#pragma unroll
      for (int piece = unit_at(u) * UNIT; piece < unit_at(u) * UNIT + UNIT; piece++)
        if (token_at(t) < TOKENS && piece < PIECES) {
          const bool inside = WHOLE || piece * 8 < inputs;
          const u16* from = x + (size_t)token_at(t) * INPUTS + (inside ? first + piece * 8 : 0);
          cp_async_16(shared_address(shared + X + token_at(t) * X_STRIDE + piece * 16), from, inside ? 16 : 0);
        }
  cp_async_commit();

  // The next stage to be brought: its tile, its turn of that and its place in the ring; and where this lane's first 16
  // bytes of it are: of the row lane / 8. The others are of the 4th row after it, and so on.
  const u32 ring = shared_address(shared + warp * STAGES * STAGE);
  const int brought = lane / 8 * 128 + (lane % 8 ^ lane / 8) * 16, part = first * BYTES + (warp * 8 + lane % 8) * 16;
  constexpr size_t ROW = (size_t)INPUTS * BYTES;
  auto source_of = [&](int tile) { return weight + weight_row(tile, lane / 8) * ROW + part; };
  int next_tile = cluster, next_turn = 0, next_slot = 0;
  const u8* source = source_of(next_tile);
  auto bring = [&] {
    if (next_tile < TILES) {
      const int at = part - first * BYTES + next_turn * (WARPS * 128);  // bytes, in the block's part of a row
      const bool inside = WHOLE || at < inputs * BYTES;
#pragma unroll
      for (int i = 0; i < ROWS / 4; i++) {
        const u8* from;
        if (OUT_FEATURES % OUT_ROWS == 0)
          from = source + (GATED ? i / 4 * 8 + i % 2 * 4 + (i % 4 < 2 ? 0 : OUT_FEATURES) : i * 4) * ROW;
        else
          from = source + (weight_row(next_tile, i * 4 + lane / 8) - weight_row(next_tile, lane / 8)) * (long long)ROW;
        cp_async_16_ahead(ring + next_slot * STAGE + (brought ^ i % 2 * 64) + i * 512, inside ? from : weight,
                          inside ? 16 : 0);
      }
      source += WARPS * 128;
      if (++next_turn == TURNS) {
        next_turn = 0, next_tile += clusters;
        source = source_of(next_tile);
      }
      if (++next_slot == STAGES) next_slot = 0;
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) bring();
  if (CLUSTER > 1) cluster_sync();  // all have started
  cp_async_wait<STAGES - 1>();

  if (NORM) {
    for (int t = 0; t < OWN_TOKENS; t++) {
      float sum = 0.f;
#pragma unroll 8
      for (int u = 0; u < OWN_UNITS; u++)
#pragma unroll
        for (int piece = unit_at(u) * UNIT; piece < unit_at(u) * UNIT + UNIT; piece++)
          if (token_at(t) < TOKENS && piece < PIECES) {
            const uint4 v = *(const uint4*)(shared + X + token_at(t) * X_STRIDE + piece * 16);
            sum += squared(v.x) + squared(v.y) + squared(v.z) + squared(v.w);
          }
#pragma unroll
      for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
      if (lane < CLUSTER && token_at(t) < TOKENS)
        give(squares + (token_at(t) * CLUSTER + rank) * TOKEN_WARPS + warp % TOKEN_WARPS, lane, sum);
    }
    sync_all();
  }
  if (NORM || WEIGHT) {
    float factor[OWN_TOKENS] = {};
#pragma unroll
    for (int t = 0; t < OWN_TOKENS; t++)
      if (NORM && token_at(t) < TOKENS) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < CLUSTER * TOKEN_WARPS; i++) sum += squares[token_at(t) * CLUSTER * TOKEN_WARPS + i];
        factor[t] = rsqrtf(sum / INPUTS + EPS);
      }
#pragma unroll 4
    for (int u = 0; u < OWN_UNITS; u++) {
      if (unit_at(u) >= UNITS) continue;
      float4 weights[UNIT][2];
#pragma unroll
      for (int i = 0; i < UNIT; i++) {
        const int input = (unit_at(u) * UNIT + i) * 8;
        const bool inside = NORM && (WHOLE || input < inputs);
        const float4* from = (const float4*)(norm + first + input);
#pragma unroll
        for (int j = 0; j < 2; j++) weights[i][j] = inside ? __ldg(from + j) : make_float4(0.f, 0.f, 0.f, 0.f);
      }
#pragma unroll
      for (int t = 0; t < OWN_TOKENS; t++) {
        if (token_at(t) >= TOKENS) continue;
        uint4* const at = (uint4*)(shared + X + token_at(t) * X_STRIDE + unit_at(u) * UNIT * 16);
        uint4 v[UNIT];
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
          v[i] = at[i];
          if (NORM) {
            const float4 a = weights[i][0], b = weights[i][1];
            v[i].x = normed(v[i].x, factor[t], a.x, a.y), v[i].y = normed(v[i].y, factor[t], a.z, a.w);
            v[i].z = normed(v[i].z, factor[t], b.x, b.y), v[i].w = normed(v[i].w, factor[t], b.z, b.w);
          }
        }
        // Values of 1 byte come out of `widen` in this order: of 16, those at even places, then the others.
        if (WEIGHT) {
          const uint4 a = v[0], b = v[UNIT - 1];
          v[0] = make_uint4(select_bytes(a.x, a.y, 0x5410), select_bytes(a.z, a.w, 0x5410),
                            select_bytes(b.x, b.y, 0x5410), select_bytes(b.z, b.w, 0x5410));
          v[UNIT - 1] = make_uint4(select_bytes(a.x, a.y, 0x7632), select_bytes(a.z, a.w, 0x7632),
                                   select_bytes(b.x, b.y, 0x7632), select_bytes(b.z, b.w, 0x7632));
        }
#pragma unroll
        for (int i = 0; i < UNIT; i++) at[i] = v[i];
      }
    }
  }
  __syncthreads();

  // What this lane reads of a stage and of x for ldmatrix: a row or token of one of four matrices of 8 by 16 bytes.
  const int a_row = lane % 16;
  u32 x_rows[NS];  // columns beyond the tokens are not used, whatever they are
#pragma unroll
  for (int n = 0; n < NS; n++)
    x_rows[n] = shared_address(shared + X) + min(n * 8 + lane % 8, TOKENS - 1) * X_STRIDE + lane / 8 * 16;
  int slot = 0;

  int tile = cluster;
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
    if (AHEAD && tile + clusters >= TILES && warp == 0)
      prefetch(ahead + ((size_t)blockIdx.x * 32 + lane) * (AHEAD / 32), AHEAD / 32);

    float acc[MS][NS][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn++) {
      cp_async_wait<STAGES - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage before
      bring();
      const u32 stage = ring + slot * STAGE + a_row * 128;
      const int line = turn * WARPS + warp;
#pragma unroll
      for (int half = 0; half < 2 * 2 / BYTES; half++) {  // 32 inputs
        u32 b[NS][4];
#pragma unroll
        for (int n = 0; n < NS; n++) ldmatrix_x4(b[n], x_rows[n] + (line * (LINE / 32) + half) * 64);
#pragma unroll
        for (int m = 0; m < MS; m++)
#pragma unroll
          for (int k = half * BYTES; k < (half + 1) * BYTES; k++) {  // 32 bytes of a row
            u32 a[4];
            ldmatrix_x4(a, stage + m * 2048 + ((k * 2 + lane / 16 ^ a_row % 8) * 16));
            if (WEIGHT == 0) {
#pragma unroll
              for (int n = 0; n < NS; n++) mma_bf16(acc[m][n], a, b[n][k % 2 * 2], b[n][k % 2 * 2 + 1]);
            } else {
#pragma unroll
              for (int p = 0; p < 2; p++) {
                const u32 top = a[2 * p], bottom = a[2 * p + 1];
                const u32 wide[4] = {widen(top), widen(bottom), widen(top >> 8), widen(bottom >> 8)};
#pragma unroll
                for (int n = 0; n < NS; n++) mma_bf16(acc[m][n], wide, b[n][2 * p], b[n][2 * p + 1]);
              }
            }
          }
      }
      if (++slot == STAGES) slot = 0;
    }

    // The tile is done. In a cluster, each block adds up its warps' sums and gives them to the blocks that have the rows.
    float* const sums = (float*)(shared + SUMS + buffer * BUFFER);
    float* const of_warps = CLUSTER == 1 ? sums : (float*)(shared + OF_WARPS);
#pragma unroll
    for (int m = 0; m < MS; m++)
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int token = n * 8 + quarter * 2 + j % 2;
          if (token < TOKENS)
            of_warps[(warp * TOKENS + token) * WARP_STRIDE + m * 16 + j / 2 * 8 + row] = acc[m][n][j];
        }
    __syncthreads();
    if (CLUSTER > 1) {
      for (int i = thread; i < TOKENS * ROWS; i += THREADS) {
        const int token = i / ROWS, r = i % ROWS;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += of_warps[(w * TOKENS + token) * WARP_STRIDE + r];
        give(sums + (rank * TOKENS + token) * SUM_STRIDE + r / 8 * EIGHTH + r % EIGHTH, r % 8 / EIGHTH, sum);
      }
      cluster_sync();
    }
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
  cp_async_wait<0>();
}
