// The products of mixtures of experts with many tokens for each expert, with wgmma.
//
// A pair is a token and one of its experts. A tile is 128 pairs of one expert and BLOCK_N rows of its weight. One block
// stays on each multiprocessor and takes tile after tile. Its first warpgroup copies (cp.async, because the pairs' rows
// lie anywhere) 128 bytes of each into a ring of STAGES buffers, LAG copies ahead of those it has told the others of; two
// others multiply, each with 64 pairs. With a gate, 8 rows of it and the same 8 of up take turns, so that the thread that
// has one has the other.
//
// With weights in e4m3, so is x, with a scale of each row. Where groups of inputs share a scale of the weight, the sums of
// each group are made apart, multiplied with it and added up in float32 (arXiv 2412.19437, section 3.3.2); the scales
// come with the weight.
//
//   PAIRS EXPERTS SHARED_BY FEATURES INPUTS GATED WEIGHT SCALED_BY  as in grouped_skinny.cu; SCALED_BY divides 128 (32 at
//                    least) or is a multiple of it
//   BLOCK_N          rows of a tile: 256, or 128, for which there are registers for both sums
//   RECORDS          of `work`, each an expert, or -1 from the first without work on, and 128 pairs, or -1
//   STAGES LAG
#include "hopper.cuh"

constexpr int BLOCK_M = 128, BYTES = WEIGHT ? 1 : 2, BLOCK_K = 128 / BYTES, GROUPS = 2, THREADS = (1 + GROUPS) * 128;
constexpr int OUT_ROWS = GATED ? BLOCK_N / 2 : BLOCK_N, OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = OUT_FEATURES / OUT_ROWS, STEPS = INPUTS / BLOCK_K;
constexpr int RECORD = 1 + BLOCK_M, ITEMS = RECORDS * TILES;
constexpr int A_BYTES = BLOCK_M * 128, STAGE = A_BYTES + BLOCK_N * 128;
constexpr int INPUT_GROUP = SCALED_BY ? SCALED_BY : INPUTS, SCALES = (INPUTS + INPUT_GROUP - 1) / INPUT_GROUP;
constexpr int PARTS = INPUT_GROUP < BLOCK_K ? BLOCK_K / INPUT_GROUP : 1;  // of a step
// Shared memory: the stages, their scales [STAGES, PARTS, BLOCK_N], and two barriers of each.
constexpr int STAGE_SCALES = SCALED_BY ? PARTS * BLOCK_N * 4 : 0, SCALES_AT = STAGES * STAGE;
constexpr int BARRIERS_AT = SCALES_AT + STAGES * STAGE_SCALES;
static_assert(!SCALED_BY || (BLOCK_N == 128 && (BLOCK_K % INPUT_GROUP == 0 || INPUT_GROUP % BLOCK_K == 0)), "scales");
static_assert(OUT_FEATURES % OUT_ROWS == 0 && INPUTS % BLOCK_K == 0 && LAG < STAGES, "sizes");

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// Where a ring of buffers is: the buffer, and how often all have been used.
struct Place {
  u32 barriers;
  int slot, phase;

  DEVICE u32 full() const { return barriers + slot * 16; }
  DEVICE u32 freed() const { return barriers + slot * 16 + 8; }
  DEVICE void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// The row of the weight that lies at `row` of a tile.
DEVICE int weight_row(int tile, int row) {
  return tile * OUT_ROWS + (GATED ? row / 16 * 8 + row % 8 + (row % 16 < 8 ? 0 : OUT_FEATURES) : row);
}

DEVICE void copy(u32 smem, const u8* __restrict__ x, const u8* __restrict__ weight, const float* __restrict__ scale,
                 const int* __restrict__ work, int thread) {
  constexpr size_t ROW = (size_t)INPUTS * BYTES;
  Place place{smem + BARRIERS_AT, 0, 0}, landed = place;
  int under_way = 0;
  auto tell = [&]() {
    fence_products();
    barrier_arrive(landed.full());
    landed.next();
  };
  // 16 bytes at column `chunk` of rows `first`, first + 16, ...; the swizzle puts it elsewhere in the row.
  const int first = thread / 8, chunk = thread % 8;
  const u32 to = first * 128 + ((chunk ^ (first & 7)) << 4);
  for (int item = blockIdx.x; item < ITEMS; item += gridDim.x) {
    const int* const record = work + item / TILES * RECORD;
    const int expert = __ldg(record), tile = item % TILES;
    if (expert < 0) break;
    const u8* rows[BLOCK_M / 16];
    u32 real = 0;
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; i++) {
      const int pair = __ldg(record + 1 + first + i * 16);
      rows[i] = x + (size_t)(max(pair, 0) / SHARED_BY) * ROW + chunk * 16;
      real |= (pair >= 0 ? 1u : 0u) << i;
    }
    const u8* from = weight + ((size_t)expert * FEATURES + weight_row(tile, first)) * ROW + chunk * 16;
    const float* const scales = scale + ((size_t)expert * FEATURES + weight_row(tile, thread)) * SCALES;
    for (int step = 0; step < STEPS; step++) {
      barrier_wait(place.freed(), place.phase ^ 1);
      const u32 a = smem + place.slot * STAGE + to, b = a + A_BYTES;
#pragma unroll
      for (int i = 0; i < BLOCK_M / 16; i++)
        cp_async_16(a + i * 16 * 128, rows[i] + step * 128, real >> i & 1 ? 16 : 0);
#pragma unroll
      for (int i = 0; i < BLOCK_N / 16; i++)
        cp_async_16(b + i * 16 * 128, from + (size_t)i * (GATED ? 8 : 16) * ROW + step * 128, 16);
#if SCALED_BY
      // Each thread those of a row.
      const u32 at = smem + SCALES_AT + place.slot * STAGE_SCALES + thread * 4;
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        cp_async_4(at + part * BLOCK_N * 4, scales + step * BLOCK_K / INPUT_GROUP + part, 4);
#endif
      cp_async_commit();
      place.next();
      if (++under_way > LAG) {
        cp_async_wait<LAG>();
        tell();
        under_way = LAG;
      }
    }
  }
  cp_async_wait<0>();
  for (; under_way > 0; under_way--) tell();
}

// Of 4 words of each of 4 neighbouring lanes, a lane gets those with its own number, in the order of the lanes.
DEVICE void transpose(u32 (&w)[4], int lane) {
#pragma unroll
  for (int by = 1; by < 4; by *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & by) continue;
      const u32 other = __shfl_xor_sync(~0u, lane & by ? w[i] : w[i + by], by);
      if (lane & by) w[i] = other;
      else w[i + by] = other;
    }
}

DEVICE void multiply(u32 smem, const u8* memory, const float* __restrict__ scale, const float* __restrict__ x_scale,
                     const int* __restrict__ work, u16* __restrict__ out, int group, int thread) {
  const int lane = thread % 32, quarter = lane % 4, row = group * 64 + thread / 32 * 16 + lane / 4;
  Place place{smem + BARRIERS_AT, 0, 0};
  float d[BLOCK_N / 2];
  for (int item = blockIdx.x; item < ITEMS; item += gridDim.x) {
    const int* const record = work + item / TILES * RECORD;
    if (__ldg(record) < 0) break;
    const int pairs[2] = {__ldg(record + 1 + row), __ldg(record + 1 + row + 8)};
#if SCALED_BY
    float sum[BLOCK_N / 2];
    constexpr int PRODUCTS = 4 / PARTS;  // of 32 inputs
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; i++) d[i] = 0.f;
    for (int step = 0; step < STEPS; step++) {
      barrier_wait(place.full(), place.phase);
      const u32 stage = smem + place.slot * STAGE;
      const u64 a = matrix_descriptor(stage + group * 64 * 128, 128, 16, 1024);
      const u64 b = matrix_descriptor(stage + A_BYTES, 128, 16, 1024);
      const float* const by = (const float*)(memory + SCALES_AT + place.slot * STAGE_SCALES) + quarter * 2;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        wgmma_pin(sum);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++)
          Wgmma<BLOCK_N>::ss_e4m3(sum, a + (part * PRODUCTS + i) * 2, b + (part * PRODUCTS + i) * 2, i > 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(sum);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 8; i++) {
          const float2 s = *(const float2*)(by + part * BLOCK_N + i * 8);
          d[i * 4] += sum[i * 4] * s.x, d[i * 4 + 1] += sum[i * 4 + 1] * s.y;
          d[i * 4 + 2] += sum[i * 4 + 2] * s.x, d[i * 4 + 3] += sum[i * 4 + 3] * s.y;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(place.freed());
      place.next();
    }
#else
    u32 before = 0;
    for (int step = 0; step < STEPS; step++) {
      barrier_wait(place.full(), place.phase);
      wgmma_pin(d);
      wgmma_fence();
      const u32 stage = smem + place.slot * STAGE;
      const u64 a = matrix_descriptor(stage + group * 64 * 128, 128, 16, 1024);
      const u64 b = matrix_descriptor(stage + A_BYTES, 128, 16, 1024);
#pragma unroll
      for (int i = 0; i < 4; i++)
#if WEIGHT
        Wgmma<BLOCK_N>::ss_e4m3(d, a + i * 2, b + i * 2, step > 0 || i > 0);
#else
        Wgmma<BLOCK_N>::ss(d, a + i * 2, b + i * 2, step > 0 || i > 0);
#endif
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0 && lane == 0) barrier_arrive(before);
      before = place.freed();
      place.next();
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    if (lane == 0) barrier_arrive(before);
#endif
#if WEIGHT
    const float* const of_rows = scale + (size_t)__ldg(record) * FEATURES;
    const float x_by[2] = {__ldg(x_scale + max(pairs[0], 0) / SHARED_BY), __ldg(x_scale + max(pairs[1], 0) / SHARED_BY)};
#pragma unroll
    for (int i = 0; i < BLOCK_N / 8; i++) {
      float2 by = make_float2(1.f, 1.f);
      if (!SCALED_BY) by = __ldg((const float2*)(of_rows + weight_row(item % TILES, i * 8 + quarter * 2)));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        d[i * 4 + half * 2] *= by.x * x_by[half];
        d[i * 4 + half * 2 + 1] *= by.y * x_by[half];
      }
    }
#endif
    // Each lane has two neighbouring columns of each 8; four lanes make 16 bytes of each other's.
    constexpr int WORDS = OUT_ROWS / 8;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int first = 0; first < WORDS; first += 4) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* const v = d + (first + i) * (GATED ? 8 : 4) + half * 2;
          w[i] = GATED ? pack_bf16(activation(v[0]) * v[4], activation(v[1]) * v[5]) : pack_bf16(v[0], v[1]);
        }
        transpose(w, lane);
        const size_t at = (size_t)max(pairs[half], 0) * OUT_FEATURES + item % TILES * OUT_ROWS + (first + quarter) * 8;
        if (pairs[half] >= 0) *(uint4*)(out + at) = make_uint4(w[0], w[1], w[2], w[3]);
      }
  }
}

// x, weight and scale are [PAIRS / SHARED_BY, INPUTS], [EXPERTS, FEATURES, INPUTS] and [EXPERTS, FEATURES, SCALES]; x_scale
// has one of each row of x. Both scales are read where the weight is in e4m3. work: [RECORDS, RECORD].
extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_tiles(
    const u8* __restrict__ x, const u8* __restrict__ weight, const float* __restrict__ scale,
    const float* __restrict__ x_scale, const int* __restrict__ work, u16* __restrict__ out) {
  DYNAMIC_SHARED(memory);
  const u32 smem = shared_address(memory);
  const int thread = threadIdx.x % 128, group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(smem + BARRIERS_AT + i * 16, 128);             // full: all threads that copy
      barrier_init(smem + BARRIERS_AT + i * 16 + 8, GROUPS * 4);  // freed: the warps that multiply
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (group == 0) {
    registers_fewer<56>();
    copy(smem, x, weight, scale, work, thread);
  } else {
    registers_more<224>();
    multiply(smem, memory, scale, x_scale, work, out, group - 1, thread);
  }
}
