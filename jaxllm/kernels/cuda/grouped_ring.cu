// What grouped_skinny.cu computes, for lists of work: blocks that stay, and rings that never run dry.
//
// A tile is ROWS rows of one expert's weight and up to COLUMNS of its pairs. Blocks stay on their multiprocessor and take
// tile after tile. A warp has its own lines of 128 bytes of each row, and its own ring of STAGES stages in shared memory
// (a line of each row of the weight, and of each pair), which it fills by asynchronous copies and empties by itself:
// STAGES - 1 stages of each warp are under way at any time, over the ends of tiles. The warps' sums are added up in a
// fixed order, in float32, from one of two buffers in turn, so that a tile takes one barrier.
//
// Weights in e4m3 are widened on the way to the tensor cores: a line of theirs has 128 inputs, and goes with 256 bytes of
// each pair. Scales of groups of inputs, a multiple of 64, come with the lines.
//
//   EXPERTS SHARED_BY FEATURES INPUTS GATED WEIGHT SCALED_BY  as in grouped_skinny.cu
//   LIST RECORDS     1: of `work`, as it is there. 0: `work` are the experts of one token, and each a record of one pair
//   MS NS            ROWS = 16 * MS, COLUMNS = 8 * NS
//   WARPS STAGES BLOCKS  of a block; of a warp; of a multiprocessor
#include "e4m3.cuh"
#include "stream.cuh"

constexpr int BYTES = WEIGHT ? 1 : 2;  // of a value of the weight
constexpr int THREADS = WARPS * 32, ROWS = MS * 16, COLUMNS = NS * 8, RECORD = 1 + COLUMNS;
constexpr int LINE = 128 / BYTES, LINES = INPUTS / LINE, TURNS = (LINES + WARPS - 1) / WARPS;  // of a row; of a warp in a tile
constexpr bool WHOLE = LINES % WARPS == 0;
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS, OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = (OUT_FEATURES + OUT_ROWS - 1) / OUT_ROWS, ITEMS = RECORDS * TILES;
constexpr int PIECES = 2 / BYTES, X_LINE = PIECES * 128;  // of x: 16 bytes for 16 of the weight, and in all
constexpr int INPUT_GROUP = SCALED_BY ? SCALED_BY : INPUTS, SCALES = (INPUTS + INPUT_GROUP - 1) / INPUT_GROUP;
constexpr int PARTS = SCALED_BY == 64 ? 2 : 1;  // of a line, with scales of their own
// A stage: lines of the weight, of x, and scales [PARTS, ROWS].
constexpr int X_AT = ROWS * 128, SCALES_AT = X_AT + COLUMNS * X_LINE, STAGE = SCALES_AT + (SCALED_BY ? PARTS * ROWS * 4 : 0);
constexpr int SUM_STRIDE = ROWS + 4;
// Shared memory: the rings [WARPS, STAGES, STAGE], and twice sums [WARPS, COLUMNS, SUM_STRIDE] and pairs [COLUMNS].
constexpr int SUMS_AT = WARPS * STAGES * STAGE, SUMS = WARPS * COLUMNS * SUM_STRIDE, BUFFER = (SUMS + COLUMNS) * 4;
static_assert(INPUTS % LINE == 0 && (SCALED_BY == 64 || SCALED_BY % 128 == 0), "sizes");

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}
// The row of the weight that lies at `row` of a tile. Gated: 8 rows of the gate, the same 8 of up, and so on.
DEVICE int weight_row(int tile, int row) {
  const int out = tile * OUT_ROWS + (GATED ? row / 16 * 8 + row % 8 : row);
  const int inside = OUT_FEATURES % OUT_ROWS == 0 ? out : min(out, OUT_FEATURES - 1);
  return inside + (GATED && row % 16 >= 8 ? OUT_FEATURES : 0);
}

constexpr int END = -1, NOTHING = -2;
// The expert of an item. END: neither it nor those after it have work; NOTHING: it has none, for its expert is elsewhere.
DEVICE int expert_of(const int* __restrict__ work, int item) {
  if (item >= ITEMS) return END;
  if (LIST) return __ldg(work + item / TILES * RECORD);
  const int expert = __ldg(work + item / TILES);
  return expert >= 0 && expert < EXPERTS ? expert : NOTHING;
}
// The pair in a column of an item that is not at the END, or -1.
DEVICE int pair_of(const int* __restrict__ work, int item, int column) {
  if (LIST) return __ldg(work + item / TILES * RECORD + 1 + column);
  return column == 0 && expert_of(work, item) >= 0 ? item / TILES : -1;
}
// What a lane needs of an item: the expert, and the pairs of the columns that it copies, which are 4 apart.
struct Work {
  int expert, pair[COLUMNS / 4];

  DEVICE void fetch(const int* __restrict__ work, int item, int lane) {
    expert = expert_of(work, item);
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; i++) pair[i] = item < ITEMS ? pair_of(work, item, i * 4 + lane / 8) : -1;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) grouped_ring(
    const u8* __restrict__ x,        // [PAIRS / SHARED_BY, INPUTS], bf16
    const u8* __restrict__ weight,   // [EXPERTS, FEATURES, INPUTS]
    const float* __restrict__ scale, // [EXPERTS, FEATURES, SCALES], where the weight is in e4m3
    const int* __restrict__ work,    // [RECORDS, RECORD]
    u16* __restrict__ out            // [PAIRS, OUT_FEATURES]
) {
  DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = lane / 4, quarter = lane % 4;
  u8* const ring = shared + warp * STAGES * STAGE;
  const u32 ring_at = shared_address(ring);
  // Copies: 16 bytes at `piece` of rows `line`, line + 4, ...; odd rows have their halves swapped (neighbours, of lines of
  // 256 bytes), so that the 8 pieces of 16 bytes that are read at once touch all banks.
  const int line = lane / 8, piece = lane % 8;
  const u32 to = line * 128 + ((piece ^ (line % 2 * 4)) << 4);
  const u32 x_to = WEIGHT ? line * 256 + ((piece ^ line % 2) << 4) : to;
  constexpr size_t ROW = (size_t)INPUTS * BYTES, X_ROW = (size_t)INPUTS * 2;

  Work now, next;
  now.fetch(work, blockIdx.x, lane);
  next.fetch(work, blockIdx.x + gridDim.x, lane);
  int item = blockIdx.x, turn = 0, slot = 0;  // of the next copy
  const u8 *from = nullptr, *inputs[COLUMNS / 4];
  // Copies one stage; an empty one where there is no more work.
  auto issue = [&]() {
    if (now.expert != END) {
      if (turn == 0) {
        from = weight + (size_t)max(now.expert, 0) * FEATURES * ROW + warp * 128 + piece * 16;
#pragma unroll
        for (int i = 0; i < COLUMNS / 4; i++)
          inputs[i] = x + (size_t)(max(now.pair[i], 0) / SHARED_BY) * X_ROW + warp * X_LINE + piece * 16;
      }
      const u32 stage = ring_at + slot * STAGE;
      const int at = turn * WARPS * 128;
      const bool real = now.expert >= 0 && (WHOLE || turn * WARPS + warp < LINES);
#pragma unroll
      for (int i = 0; i < ROWS / 4; i++) {
        const size_t r = weight_row(item % TILES, i * 4 + line);
        cp_async_16(stage + to + i * 4 * 128, real ? from + r * ROW + at : from, real ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < COLUMNS / 4; i++) {
        const bool there = real && now.pair[i] >= 0;
#pragma unroll
        for (int half = 0; half < PIECES; half++)
          cp_async_16(stage + X_AT + x_to + i * 4 * X_LINE + half * 128, there ? inputs[i] + at * PIECES + half * 128 : x,
                      there ? 16 : 0);
      }
#if SCALED_BY
#pragma unroll
      for (int i = lane; i < PARTS * ROWS; i += 32) {
        const size_t r = (size_t)max(now.expert, 0) * FEATURES + weight_row(item % TILES, i % ROWS);
        const int group = ((turn * WARPS + warp) * LINE + i / ROWS * 64) / INPUT_GROUP;
        cp_async_4(stage + SCALES_AT + i * 4, real ? scale + r * SCALES + group : scale, real ? 4 : 0);
      }
#endif
      if (++turn == TURNS) {
        turn = 0;
        item += gridDim.x;
        now = next;
        next.fetch(work, item + gridDim.x, lane);
      }
    }
    if (++slot == STAGES) slot = 0;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) issue();

  int place = 0, buffer = 0;
  for (int done = blockIdx.x; done < ITEMS; done += gridDim.x) {
    const int expert = expert_of(work, done);
    if (expert == END) break;
    const int tile = done % TILES;
    float* const sums = (float*)(shared + SUMS_AT + buffer * BUFFER);
    int* const pairs = (int*)(sums + SUMS);
    if (thread < COLUMNS) pairs[thread] = pair_of(work, done, thread);
    float acc[MS][NS][4] = {};
#pragma unroll 1
    for (int i = 0; i < TURNS; i++) {
      cp_async_wait<STAGES - 2>();
      __syncwarp();  // all lanes' copies have landed, and nobody reads the stage before this one any more
      issue();
      const u8* const stage = ring + place * STAGE;
      if (++place == STAGES) place = 0;
#if SCALED_BY
      float sum[MS][NS][4] = {};
#else
      float(&sum)[MS][NS][4] = acc;
#endif
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int chunk = half * 4 + quarter, at = row * 128 + (chunk ^ (row % 2 * 4)) * 16;
        const u8* const of_x = stage + X_AT + (WEIGHT ? row * 256 : at);
        uint4 b[NS][PIECES];
#pragma unroll
        for (int n = 0; n < NS; n++)
#pragma unroll
          for (int i = 0; i < PIECES; i++)
            b[n][i] = *(const uint4*)(of_x + n * 8 * X_LINE + (WEIGHT ? (chunk * 2 + i ^ row % 2) * 16 : 0));
#pragma unroll
        for (int m = 0; m < MS; m++) {
          const uint4 top = *(const uint4*)(stage + m * 16 * 128 + at);
          const uint4 bottom = *(const uint4*)(stage + (m * 16 + 8) * 128 + at);
#if WEIGHT
          const u32 tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const u32 wide[4] = {widen_e4m3(tops[k], 0), widen_e4m3(bottoms[k], 0), widen_e4m3(tops[k], 1),
                                 widen_e4m3(bottoms[k], 1)};
#pragma unroll
            for (int n = 0; n < NS; n++) {
              const uint4 v = b[n][k / 2 % PIECES];
              mma_bf16(sum[m][n], wide, k % 2 ? v.z : v.x, k % 2 ? v.w : v.y);
            }
          }
#else
          const u32 low[4] = {top.x, bottom.x, top.y, bottom.y}, high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
          for (int n = 0; n < NS; n++) {
            mma_bf16(sum[m][n], low, b[n][0].x, b[n][0].y);
            mma_bf16(sum[m][n], high, b[n][0].z, b[n][0].w);
          }
#endif
        }
#if SCALED_BY
        if (PARTS == 2 || half == 1) {
          const float* const by = (const float*)(stage + SCALES_AT) + (PARTS == 2 ? half * ROWS : 0) + row;
#pragma unroll
          for (int m = 0; m < MS; m++)
#pragma unroll
            for (int n = 0; n < NS; n++)
#pragma unroll
              for (int j = 0; j < 4; j++) {
                acc[m][n][j] += sum[m][n][j] * by[m * 16 + j / 2 * 8];
                sum[m][n][j] = 0.f;
              }
        }
#endif
      }
      __syncwarp();
    }
#pragma unroll
    for (int m = 0; m < MS; m++)
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          sums[(warp * COLUMNS + n * 8 + quarter * 2 + j % 2) * SUM_STRIDE + m * 16 + row + j / 2 * 8] = acc[m][n][j];
    __syncthreads();
    auto total = [&](int column, int r) {
      const float* const of = sums + column * SUM_STRIDE + r;
      float sum = of[0];
#pragma unroll
      for (int w = 1; w < WARPS; w++) sum += of[w * COLUMNS * SUM_STRIDE];
      return sum;
    };
    for (int i = thread; i < COLUMNS * OUT_ROWS; i += THREADS) {
      const int column = i / OUT_ROWS, r = i % OUT_ROWS, feature = tile * OUT_ROWS + r, pair = pairs[column];
      if (pair < 0 || feature >= OUT_FEATURES) continue;
      float value, by = 1.f, by_up = 1.f;
#if WEIGHT && !SCALED_BY
      const float* const of_rows = scale + (size_t)max(expert, 0) * FEATURES + feature;
      by = __ldg(of_rows);
      if (GATED) by_up = __ldg(of_rows + OUT_FEATURES);
#endif
      if (GATED) {
        const int gate = r / 8 * 16 + r % 8;
        value = activation(total(column, gate) * by) * (total(column, gate + 8) * by_up);
      } else {
        value = total(column, r) * by;
      }
      out[(size_t)pair * OUT_FEATURES + feature] = (u16)pack_bf16(value, 0.f);
    }
    buffer ^= 1;
  }
  cp_async_wait<0>();
}
