// The products of mixtures of experts with few tokens for each expert: of the weights, only those of experts that
// somebody chose are read, once, at the speed of memory.
//
// A pair is a token and one of its experts. A block has a tile of ROWS rows of one expert's weight and the expert's
// pairs, up to COLUMNS of them; an expert with more has several blocks for a tile. The rows are the left operand of the
// tensor cores' products (16 rows x 16 inputs) and go from memory straight to registers: a product may take its inputs
// in any order as long as both sides take the same, so a lane reads 16 consecutive bytes of a row, and the same inputs
// of its pair. Each warp has its own part of the inputs; their sums are added up in a fixed order, in float32. All loads
// of a warp are under way together, and there are more blocks than run at once: the chip does the rest.
//
// With SPAN = 1 a load of a warp reads 64 bytes of 8 rows. What a multiprocessor can have under way counts in lines of
// 128 bytes, so with SPAN = 2 it reads 128 bytes of 4 rows: the rows of a product are then the halves of 4 rows' lines,
// its columns the same halves of 4 pairs, and of the results those of unequal halves are thrown away.
//
// Weights in e4m3 are widened in registers, exactly: 16 bytes of a row are then 16 inputs, and x stays in bf16. Scales of
// whole rows multiply the results; scales of groups of inputs multiply the sums of 64 inputs, before these are added up.
//
//   PAIRS EXPERTS    pairs, and experts that are here; a pair with an expert outside of [0, EXPERTS) has no result
//   SHARED_BY        pairs that have one row of x: the X of a token, or 1
//   FEATURES INPUTS  rows of an expert's weight (of both halves, where gated), and their length
//   WEIGHT           0: bf16; 1: e4m3 with float32 scales
//   SCALED_BY        inputs of a row that share a scale, a multiple of 64; 0: all of them
//   GATED            0: no; 1: silu(first half) * second half; 2: gelu with tanh
//   LIST             1: `work` are records of 1 + COLUMNS integers, one for each blockIdx.y: an expert, or -1 for no work,
//                    and its pairs, or -1 (see grouped_list.cu). 0: `work` are the experts of all pairs, 64 at most, and
//                    the block of the first pair of each expert does the work
//   SPAN             see above
//   MS NS            products of a block in rows (ROWS = 16 / SPAN * MS) and columns (COLUMNS = 8 / SPAN * NS)
//   WARPS DEPTH      of a block; groups of 64 * SPAN bytes of each row that a warp loads at a time
//   BLOCKS           of a multiprocessor
//   AHEAD            bytes of `ahead`, the weight that is read next, that a block lets the second-level cache fetch, from
//   AHEAD_BYTES      of its expert: otherwise memory has nothing to do between two kernels
#include "cluster.cuh"
#include "e4m3.cuh"
#include "stream.cuh"

constexpr int HALF = 8 / SPAN;  // rows, and columns, of half of a product
constexpr int THREADS = WARPS * 32, ROWS = MS * 2 * HALF, COLUMNS = NS * HALF;
constexpr int BYTES = WEIGHT ? 1 : 2;     // of a value of the weight
constexpr int LOAD = 64 * SPAN;           // bytes of a row that a warp reads at a time
constexpr int GROUP = LOAD / BYTES;       // inputs in them
constexpr int PIECES = 2 / BYTES;         // of 16 bytes of x, for 16 of a row
constexpr int ROW_GROUPS = INPUTS / GROUP;
constexpr int INPUT_GROUP = SCALED_BY ? SCALED_BY : INPUTS, SCALES = (INPUTS + INPUT_GROUP - 1) / INPUT_GROUP;
constexpr size_t ROW = (size_t)INPUTS * BYTES;
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS, OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr bool WHOLE = ROW_GROUPS % (WARPS * DEPTH) == 0;  // every load of every warp is needed
constexpr int SUM_STRIDE = ROWS + 4;                       // floats; the lanes of a warp then write to all banks
// Shared memory: the warps' sums [WARPS, COLUMNS, SUM_STRIDE], and the pairs [COLUMNS].
constexpr int PAIRS_AT = WARPS * COLUMNS * SUM_STRIDE * 4;
static_assert(INPUTS % GROUP == 0 && SCALED_BY % 64 == 0 && (LIST || PAIRS <= 64) && (SPAN == 1 || SPAN == 2), "sizes");

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// The row of the weight that lies at `row` of a tile. Gated: half a product of the gate, the same rows of up, and so on.
DEVICE int weight_row(int tile, int row) {
  const int out = tile * OUT_ROWS + (GATED ? row / (2 * HALF) * HALF + row % HALF : row);
  const int inside = OUT_FEATURES % OUT_ROWS == 0 ? out : min(out, OUT_FEATURES - 1);
  return inside + (GATED && row % (2 * HALF) >= HALF ? OUT_FEATURES : 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) grouped_skinny(
    const u16* __restrict__ x,       // [PAIRS / SHARED_BY, INPUTS]
    const u8* __restrict__ weight,   // [EXPERTS, FEATURES, INPUTS], bf16 or e4m3
    const float* __restrict__ scale, // [EXPERTS, FEATURES, SCALES], where the weight is in e4m3
    const int* __restrict__ work,
    const u8* __restrict__ ahead,    // [EXPERTS, AHEAD_BYTES]
    u16* __restrict__ out            // [PAIRS, OUT_FEATURES]
) {
  DYNAMIC_SHARED(shared);
  float* const sums = (float*)shared;
  int* const pairs = (int*)(shared + PAIRS_AT);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4 / SPAN, part = lane / 4 % SPAN, quarter = lane % 4;  // 16 bytes of a row, or of a pair
  const int tile = blockIdx.x;

  int pair[NS];  // of this lane's columns, or -1
#if LIST
  const int* const record = work + blockIdx.y * (1 + COLUMNS);
  const int expert = __ldg(record);
#pragma unroll
  for (int n = 0; n < NS; n++) pair[n] = __ldg(record + 1 + n * HALF + row);
  if (expert < 0) return;
#else
  const int expert = __ldg(work + blockIdx.y);
  const int low = lane < PAIRS ? __ldg(work + lane) : -1, high = lane + 32 < PAIRS ? __ldg(work + lane + 32) : -1;
  u64 same = __ballot_sync(~0u, low == expert) | (u64)__ballot_sync(~0u, high == expert) << 32;
  if (expert < 0 || expert >= EXPERTS || __ffsll(same) - 1 != (int)blockIdx.y) return;
  for (int i = 0; i < row; i++) same &= same - 1;
#pragma unroll
  for (int n = 0; n < NS; n++) {
    pair[n] = __ffsll(same) - 1;
    for (int i = 0; i < HALF; i++) same &= same - 1;
  }
#endif

  const int offset = part * 64 + quarter * 16;  // bytes
  const u8* const own = weight + (size_t)expert * FEATURES * ROW + offset;
  const u8* rows[MS][2];
  int features[MS][2];
#pragma unroll
  for (int m = 0; m < MS; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      features[m][half] = weight_row(tile, (m * 2 + half) * HALF + row);
      rows[m][half] = own + features[m][half] * ROW;
    }
  const u16* inputs[NS];
#pragma unroll
  for (int n = 0; n < NS; n++) inputs[n] = x + (size_t)(max(pair[n], 0) / SHARED_BY) * INPUTS + offset / BYTES;
  if (warp == 0 && part == 0 && quarter == 0)
#pragma unroll
    for (int n = 0; n < NS; n++) pairs[n * HALF + row] = pair[n];

  float acc[MS][NS][4] = {};
  const int first = warp * ROW_GROUPS / WARPS, last = (warp + 1) * ROW_GROUPS / WARPS;
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int group = first; group < last; group += DEPTH) {
    uint4 a[DEPTH][MS][2], b[DEPTH][NS][PIECES];
    float by[DEPTH][MS][2];  // scales
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      const bool real = WHOLE || group + i < last;
#pragma unroll
      for (int m = 0; m < MS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          a[i][m][half] = zero, by[i][m][half] = 0.f;
          if (real) a[i][m][half] = load_streamed(rows[m][half] + (group + i) * LOAD);
#if SCALED_BY
          const size_t of = (size_t)expert * FEATURES + features[m][half];
          if (real) by[i][m][half] = __ldg(scale + of * SCALES + ((group + i) * GROUP + part * 64) / INPUT_GROUP);
#endif
        }
    }
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
          b[i][n][piece] = zero;
          if ((WHOLE || group + i < last) && pair[n] >= 0)
            b[i][n][piece] = load_kept(inputs[n] + (group + i) * GROUP + piece * 8);
        }
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
#pragma unroll
      for (int m = 0; m < MS; m++) {
        const uint4 top = a[i][m][0], bottom = a[i][m][1];
#if WEIGHT
        const u32 tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
        float sum[NS][4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const u32 wide[4] = {widen_e4m3(tops[k], 0), widen_e4m3(bottoms[k], 0), widen_e4m3(tops[k], 1),
                               widen_e4m3(bottoms[k], 1)};
#pragma unroll
          for (int n = 0; n < NS; n++) {
            const uint4 v = b[i][n][k / 2 % PIECES];
            mma_bf16(SCALED_BY ? sum[n] : acc[m][n], wide, k % 2 ? v.z : v.x, k % 2 ? v.w : v.y);
          }
        }
#pragma unroll
        for (int n = 0; n < NS && SCALED_BY; n++)
#pragma unroll
          for (int j = 0; j < 4; j++) acc[m][n][j] += sum[n][j] * by[i][m][j / 2];
#else
        const u32 low[4] = {top.x, bottom.x, top.y, bottom.y}, high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
        for (int n = 0; n < NS; n++) {
          mma_bf16(acc[m][n], low, b[i][n][0].x, b[i][n][0].y);
          mma_bf16(acc[m][n], high, b[i][n][0].z, b[i][n][0].w);
        }
#endif
      }
  }

  if (AHEAD > 0 && warp == 0) {
    const u32 at = tile * AHEAD + lane * (AHEAD / 32);
    if (at + AHEAD / 32 <= AHEAD_BYTES) prefetch(ahead + (size_t)expert * AHEAD_BYTES + at, AHEAD / 32);
  }
#pragma unroll
  for (int m = 0; m < MS; m++)
#pragma unroll
    for (int n = 0; n < NS; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float* const to = sums + (warp * COLUMNS + n * HALF) * SUM_STRIDE + (m * 2 + half) * HALF + row;
        const float even = acc[m][n][half * 2], odd = acc[m][n][half * 2 + 1];
        if (SPAN == 1) {
          to[(quarter * 2) * SUM_STRIDE] = even;
          to[(quarter * 2 + 1) * SUM_STRIDE] = odd;
        } else {  // columns 2i and 2i + 1 are the two parts of pair i
          const float mine = part ? odd : even, sum = mine + __shfl_xor_sync(~0u, mine, 4);
          if (part == 0) to[quarter * SUM_STRIDE] = sum;
        }
      }
  __syncthreads();
  auto total = [&](int column, int r) {
    const float* const of = sums + column * SUM_STRIDE + r;
    float sum = of[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum += of[w * COLUMNS * SUM_STRIDE];
    return sum;
  };
  for (int i = thread; i < COLUMNS * OUT_ROWS; i += THREADS) {
    const int column = i / OUT_ROWS, r = i % OUT_ROWS, feature = tile * OUT_ROWS + r, to = pairs[column];
    if (to < 0 || feature >= OUT_FEATURES) continue;
    float value, by = 1.f, by_up = 1.f;
#if WEIGHT && !SCALED_BY
    by = __ldg(scale + (size_t)expert * FEATURES + feature);
    if (GATED) by_up = __ldg(scale + (size_t)expert * FEATURES + OUT_FEATURES + feature);
#endif
    if (GATED) {
      const int gate = r / HALF * 2 * HALF + r % HALF;
      value = activation(total(column, gate) * by) * (total(column, gate + HALF) * by_up);
    } else {
      value = total(column, r) * by;
    }
    out[(size_t)to * OUT_FEATURES + feature] = (u16)pack_bf16(value, 0.f);
  }
}
