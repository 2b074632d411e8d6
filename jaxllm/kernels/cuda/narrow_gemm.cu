// out[T, F] = x[T, D] @ weight[F, D].T for up to 128 tokens, with wgmma: the weight, read once, is its left operand, of
// 64 rows at a time, and tokens are the columns.
//
// A tile is ROWS rows of the weight. A cluster of CLUSTER blocks works on it, each block on its part of the inputs, and
// goes on to the tile that lies CLUSTERS further. The first warpgroup of a block copies PANELS times 64 inputs of the
// rows and of the tokens at a time into a ring of STAGES stages, which it keeps full, over the ends of tiles; a stage's
// barrier is told by the copies themselves. The other warpgroups multiply, each 64 rows.
//
// What bounds it is the weight's way from memory; what it must not cost is twofold. Tokens are read again for every tile,
// from the second-level cache: COLUMNS / ROWS of the weight's bytes. And the more blocks share a tile, the more sums they
// exchange at its end: 4 * COLUMNS * ROWS bytes each, through the shared memory of the block that adds them up, which is
// another one for each 16 rows. Sums of blocks are added in the order of their ranks: the result depends on no timing.
//
//   TOKENS COLUMNS FEATURES INPUTS   T; the least of 8, 16, 32, 64, 128 that holds it; F (both halves, if gated); D
//   ROWS PANELS STAGES CLUSTER CLUSTERS
//   FETCH      256: the second-level cache is told to fetch the 256 bytes around what is copied; 128: it is not
//   STAGGER    1: each cluster begins elsewhere in its inputs, so that not all read the same tokens at the same time
//   GATED      0: no; 1: silu; 2: gelu with tanh; the result is act(gate) * up of the halves of the rows
//   RESIDUAL   1: is added to the result
//   OUT_FLOAT  1: float32 results; 0: bf16
//   PARTS EPS  an RMSNorm before the product, of tokens that were multiplied with its weight already: what is left is one
//              factor for each token, of the sum of its squares, which comes in PARTS parts [PARTS, COLUMNS]; 0: none
//   SCALED     1: what the norm after the product needs is a result too: the (rounded) result times its weight, and sums
//              of squares for each token, [blocks, COLUMNS], of what each block has; only without a gate, for bf16
//   BLOCKED    how the first of these lies: 0: as the result; else as `BlockedTokens` of product.py, in so many rows
#include "cluster.cuh"
#include "factors.cuh"

constexpr int GROUPS = ROWS / 64, WARPS = GROUPS * 4, THREADS = 128 + ROWS * 2;  // that multiply; all threads
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS, OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = (OUT_FEATURES + OUT_ROWS - 1) / OUT_ROWS;
constexpr int DEPTH = PANELS * 64, STEPS = INPUTS / DEPTH;
// Shared memory: stages, of which each is PANELS times the rows, then PANELS times the tokens, 128 bytes of each with the
// hardware's swizzle; buffers for sums, two where a block has several tiles; and barriers.
constexpr int WEIGHT_PANEL = ROWS * 128, X_PANEL = COLUMNS * 128, X_AT = PANELS * WEIGHT_PANEL;
constexpr int STAGE = X_AT + PANELS * X_PANEL;
constexpr int BUFFERS = CLUSTER == 1 ? 0 : TILES > CLUSTERS ? 2 : 1, BUFFER = ROWS * COLUMNS * 4;
constexpr int SUMS_AT = STAGES * STAGE, FACTORS_AT = SUMS_AT + BUFFERS * BUFFER;
// The tokens' factors, and what 128 threads add up for them; sums of squares of each 16 rows that a block finishes.
constexpr int ADDED_AT = FACTORS_AT + (PARTS ? COLUMNS * 4 : 0), SQUARES_AT = ADDED_AT + (PARTS ? 128 * 16 : 0);
constexpr int BARRIERS_AT = SQUARES_AT + (SCALED ? ROWS / 16 / CLUSTER * COLUMNS * 4 : 0);
// A unit of the result is 16 rows by 8 tokens, 4 numbers of each lane. Block `rank` adds up those of row groups rank,
// rank + CLUSTER and so on.
constexpr int ACROSS = COLUMNS / 8, UNITS = ROWS / 16 / CLUSTER * ACROSS, PER_WARP = (UNITS + WARPS - 1) / WARPS;
constexpr bool EARLY = (RESIDUAL || SCALED) && PER_WARP <= 4;  // what is around is fetched while the weight comes
static_assert(ROWS % 64 == 0 && ROWS / 16 % CLUSTER == 0 && TOKENS <= COLUMNS && COLUMNS % 8 == 0, "tiles");
static_assert(INPUTS % DEPTH == 0 && STEPS >= CLUSTER && OUT_FEATURES % 8 == 0 && STAGES > 1, "sizes");
static_assert(BARRIERS_AT + STAGES * 16 + 16 <= SHARED, "shared memory");
static_assert(!SCALED || (!GATED && !OUT_FLOAT), "what a norm comes after");
static_assert(!BLOCKED || (OUT_FEATURES % 64 == 0 && BLOCKED >= TOKENS), "blocks");

#if OUT_FLOAT
typedef float2 Two;
#else
typedef u32 Two;
#endif

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// The row of the weight at `row` of a tile. Gated: 8 rows of the gate, the same 8 of up, the next 8 of the gate.
DEVICE int weight_row(int tile, int row) {
  int out = tile * OUT_ROWS + (GATED ? row / 16 * 8 + row % 8 : row);
  if (OUT_FEATURES % OUT_ROWS) out = min(out, OUT_FEATURES - 1);
  return GATED && row % 16 >= 8 ? OUT_FEATURES + out : out;
}
// How far row `first + by` of the weight lies after row `first` of a tile, where first and by have no bit in common.
constexpr int rows_between(int by) {
  return GATED ? by / 16 * 8 + by % 8 + (by % 16 >= 8 ? OUT_FEATURES : 0) : by;
}

// Where in the ring a thread is: the stage, and how often all have been used.
struct Place {
  u32 barriers;
  int slot, phase;

  DEVICE u32 full() const { return barriers + slot * 16; }
  DEVICE u32 freed() const { return barriers + slot * 16 + 8; }
  DEVICE void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// A block's part of the inputs, in steps.
DEVICE int first_step(int rank) { return STEPS * rank / CLUSTER; }

DEVICE void copy(
    u32 smem, const u16* __restrict__ x, const u16* __restrict__ weight, int cluster, int rank, int thread
) {
  constexpr int PIECES = PANELS * 8, AT_ONCE = 128 / PIECES;  // of 16 bytes in a row of a stage; rows of one turn
  const int first = thread / PIECES, piece = thread % PIECES;
  u32 to[2];  // turns of 4 rows have two ways to swizzle
#pragma unroll
  for (int i = 0; i < 2; i++) to[i] = (piece % 8 ^ (first + i * AT_ONCE) % 8) << 4;
  const u32 to_weight = piece / 8 * WEIGHT_PANEL + first * 128, to_x = X_AT + piece / 8 * X_PANEL + first * 128;
  const u16* const from_x = x + (size_t)first * INPUTS + piece * 8;
  Place place{smem + BARRIERS_AT, 0, 0};
  for (int tile = cluster; tile < TILES; tile += CLUSTERS) {
    const u16* const from = weight + (size_t)weight_row(tile, first) * INPUTS + piece * 8;
    const int begin = first_step(rank), end = first_step(rank + 1);
    int step = STAGGER ? begin + (end - begin) * cluster / CLUSTERS : begin;
#pragma unroll 1
    for (int left = end - begin; left > 0; left--) {
      barrier_wait(place.freed(), place.phase ^ 1);
      const u32 stage = smem + place.slot * STAGE;
#pragma unroll
      for (int i = 0; i < ROWS / AT_ONCE; i++) {
        const u16* row = from + (size_t)rows_between(i * AT_ONCE) * INPUTS;
        if (OUT_FEATURES % OUT_ROWS)
          row = weight + (size_t)weight_row(tile, first + i * AT_ONCE) * INPUTS + piece * 8;
        const u32 there = stage + to_weight + to[i % 2] + i * AT_ONCE * 128;
        if (FETCH == 256)
          cp_async_16_ahead(there, row + step * DEPTH, 16);
        else
          cp_async_16(there, row + step * DEPTH, 16);
      }
#pragma unroll
      for (int i = 0; i < (TOKENS + AT_ONCE - 1) / AT_ONCE; i++)
        if (first + i * AT_ONCE < TOKENS)
          cp_async_16(stage + to_x + to[i % 2] + i * AT_ONCE * 128, from_x + i * AT_ONCE * INPUTS + step * DEPTH, 16);
      cp_async_arrive(place.full());
      place.next();
      if (++step == end) step = begin;
    }
  }
  cp_async_wait<0>();
}

// Where a lane's numbers of a unit go: two neighbouring features of a token, `half` 1 being 8 rows further.
struct Target {
  int token, feature;

  DEVICE Target(int tile, int rows, int columns, int lane) {
    const int row = lane / 4;
    token = columns * 8 + lane % 4 * 2 + row % 2;
    feature = tile * OUT_ROWS + rows * (GATED ? 8 : 16) + row / 2 * 2;
  }
  DEVICE bool inside(int half) const { return token < TOKENS && feature + half * 8 < OUT_FEATURES; }
  DEVICE size_t at(int half) const { return ((size_t)token * OUT_FEATURES + feature + half * 8) / 2; }
  DEVICE size_t scaled_at(int half) const {
    const int first = feature + half * 8;
    if (!BLOCKED) return at(half);
    return (((size_t)(first / 64) * BLOCKED + token) * 64 + (first / 8 % 8 ^ token % 8) * 8 + first % 8) / 2;
  }
};

// What is added to a unit, and multiplied with afterwards, two numbers of each half.
struct Around {
  u32 added[2];
  float2 by[2];

  DEVICE void fetch(const Target& target, const u32* __restrict__ residual, const float* __restrict__ norm) {
#pragma unroll
    for (int half = 0; half < (GATED ? 1 : 2); half++) {
      if (RESIDUAL) added[half] = target.inside(half) ? __ldg(residual + target.at(half)) : 0;
      if (SCALED && target.inside(half)) by[half] = __ldg((const float2*)(norm + target.feature + half * 8));
    }
  }
};

// Writes a unit, of which a lane has row lane / 4 of two tokens, and the row 8 further; each gives its neighbour one
// token's. Returns the squares of what the lane wrote.
DEVICE float finish(
    const float (&v)[4], const Target& target, const Around& around, Two* __restrict__ out, u32* __restrict__ scaled,
    int lane
) {
  const bool odd = lane / 4 % 2;
  float squares = 0.f;
#pragma unroll
  for (int half = 0; half < (GATED ? 1 : 2); half++) {
    float low = v[half * 2], high = v[half * 2 + 1];
    if (GATED) low = activation(low) * v[2], high = activation(high) * v[3];
    const float other = __shfl_xor_sync(~0u, odd ? low : high, 4);
    float a = odd ? other : low, b = odd ? high : other;
    if (RESIDUAL) {
      const u32 two = around.added[half];
      a += bf16_to_float((u16)two), b += bf16_to_float((u16)(two >> 16));
    }
    if (!target.inside(half)) continue;
#if OUT_FLOAT
    out[target.at(half)] = make_float2(a, b);
#else
    const u32 two = pack_bf16(a, b);
    out[target.at(half)] = two;
    if (SCALED) {
      a = bf16_to_float((u16)two), b = bf16_to_float((u16)(two >> 16));
      squares += a * a + b * b;
      scaled[target.scaled_at(half)] = pack_bf16(a * around.by[half].x, b * around.by[half].y);
    }
#endif
  }
  return squares;
}

DEVICE void multiply(
    u8* shared, u32 smem, const u32* __restrict__ residual, const float4* __restrict__ squares,
    const float* __restrict__ norm, Two* __restrict__ out, u32* __restrict__ scaled, float* __restrict__ sums_of_squares,
    int cluster, int rank, int thread
) {
  const int lane = thread % 32, warp = thread / 32, group = thread / 128;
  Place place{smem + BARRIERS_AT, 0, 0};
  // The k-th unit that this warp finishes: its row group and its tokens.
  auto rows_of = [&](int k) { return CLUSTER == 1 ? warp : (warp + k * WARPS) / ACROSS * CLUSTER + rank; };
  auto columns_of = [&](int k) { return CLUSTER == 1 ? k : (warp + k * WARPS) % ACROSS; };
  auto is_unit = [&](int k) { return CLUSTER == 1 || UNITS % WARPS == 0 || warp + k * WARPS < UNITS; };
  float* const factors = (float*)(shared + FACTORS_AT);
  if (PARTS && thread < 128)
    make_factors<COLUMNS, PARTS>(factors, (float4*)(shared + ADDED_AT), squares, INPUTS, (float)EPS, thread, 2);
  if (PARTS) named_sync(1, GROUPS * 128);
  float* const sums_of_rows = (float*)(shared + SQUARES_AT);
  float d[COLUMNS / 2];
  for (int tile = cluster, turn = 0; tile < TILES; tile += CLUSTERS, turn++) {
    Around around[PER_WARP] = {};
    if (EARLY)
#pragma unroll
      for (int k = 0; k < PER_WARP; k++)
        if (is_unit(k)) around[k].fetch(Target(tile, rows_of(k), columns_of(k), lane), residual, norm);
    u32 before = 0;
    const int first = first_step(rank);
#pragma unroll 1
    for (int step = first; step < first_step(rank + 1); step++) {
      barrier_wait(place.full(), place.phase);
      fence_products();
      wgmma_pin(d);
      wgmma_fence();
      const u32 stage = smem + place.slot * STAGE;
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++) {
        const u64 a = matrix_descriptor(stage + panel * WEIGHT_PANEL + group * 64 * 128, 128, 16, 1024);
        const u64 b = matrix_descriptor(stage + X_AT + panel * X_PANEL, 128, 16, 1024);
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<COLUMNS>::ss(d, a + i * 2, b + i * 2, step > first || panel + i > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > first && lane == 0) barrier_arrive(before);
      before = place.freed();
      place.next();
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    if (lane == 0) barrier_arrive(before);

    const int buffer = BUFFERS > 1 ? turn % 2 : 0;
    const u32 sums = SUMS_AT + buffer * BUFFER, told = BARRIERS_AT + STAGES * 16 + buffer * 8;
    if (CLUSTER > 1) {
      if (thread == 0) barrier_expect(smem + told, BUFFER);
      if (turn == 0) cluster_wait();  // all have started
      // A block's sums of this tile say that it is done with the buffer of the tile before, which is written to next.
      else named_sync(1, GROUPS * 128);
      // The sums of a rank's units: [CLUSTER sources, ROWS / 16 / CLUSTER, ACROSS, 32 lanes, 4].
      const int unit = (rank * (ROWS / 16 / CLUSTER) + warp / CLUSTER) * ACROSS;
#pragma unroll
      for (int i = 0; i < ACROSS; i++)
        cluster_send_4(smem + sums + (unit + i) * 512 + lane * 16, smem + told, warp % CLUSTER,
                       make_float4(d[i * 4], d[i * 4 + 1], d[i * 4 + 2], d[i * 4 + 3]));
      cluster_barrier_wait(smem + told, (BUFFERS > 1 ? turn / 2 : turn) & 1);
    }
#pragma unroll
    for (int k = 0; k < PER_WARP; k++) {
      if (!is_unit(k)) continue;
      float v[4];
      if (CLUSTER == 1) {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = d[k * 4 + i];
      } else {
        const float4* const from = (const float4*)(shared + sums) + (warp + k * WARPS) * 32 + lane;
        float4 sum = from[0];
#pragma unroll
        for (int source = 1; source < CLUSTER; source++) {
          const float4 more = from[source * UNITS * 32];
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
      }
      const int rows = rows_of(k), columns = columns_of(k);
      if (PARTS) {
        const float2 factor = *(const float2*)(factors + columns * 8 + lane % 4 * 2);
        v[0] *= factor.x, v[1] *= factor.y, v[2] *= factor.x, v[3] *= factor.y;
      }
      const Target target(tile, rows, columns, lane);
      if ((RESIDUAL || SCALED) && !EARLY) around[k].fetch(target, residual, norm);
      float of_rows = finish(v, target, around[k], out, scaled, lane);
      if (SCALED) {
        of_rows += __shfl_xor_sync(~0u, of_rows, 8);
        of_rows += __shfl_xor_sync(~0u, of_rows, 16);
        // The lane that has the token has it in every tile.
        float* const sum = sums_of_rows + rows / CLUSTER * COLUMNS + columns * 8 + lane % 4 * 2 + lane / 4 % 2;
        if (lane < 8) *sum = turn == 0 ? of_rows : *sum + of_rows;
      }
    }
  }
  if (!SCALED) return;
  named_sync(1, GROUPS * 128);
  if (thread < COLUMNS) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < ROWS / 16 / CLUSTER; i++) total += sums_of_rows[i * COLUMNS + thread];
    sums_of_squares[blockIdx.x * COLUMNS + thread] = total;
  }
}

// What the macros say there is not is neither read nor written.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) narrow_gemm(
    const u16* __restrict__ x, const u16* __restrict__ weight, const u32* __restrict__ residual,
    const float4* __restrict__ squares, const float* __restrict__ norm, Two* __restrict__ out,
    u32* __restrict__ scaled, float* __restrict__ sums_of_squares) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(smem + BARRIERS_AT + i * 16, 128);        // full: all threads that copy
      barrier_init(smem + BARRIERS_AT + i * 16 + 8, WARPS);  // freed: the warps that multiply
    }
    for (int i = 0; i < 2; i++) barrier_init(smem + BARRIERS_AT + STAGES * 16 + i * 8, 1);  // sums have come
    barrier_init_fence();
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_started();
  if (threadIdx.x < 128) {
    copy(smem, x, weight, cluster, rank, threadIdx.x);
    if (CLUSTER > 1) cluster_wait();
  } else {
    multiply(
        shared, smem, residual, squares, norm, out, scaled, sums_of_squares, cluster, rank, threadIdx.x - 128);
  }
}
