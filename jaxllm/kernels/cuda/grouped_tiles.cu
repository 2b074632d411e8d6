// The products of mixtures of experts with many tokens for each expert, with wgmma.
//
// A pair is a token and one of its experts. A tile is 128 pairs of one expert and BLOCK_N rows of its weight. One block
// stays on each multiprocessor and takes tile after tile. Its first warpgroup copies (cp.async, because the pairs' rows
// lie anywhere) 64 inputs of each into a ring of STAGES buffers, LAG copies ahead of those it has told the others of; two
// others multiply, each with 64 pairs. With a gate, 8 rows of it and the same 8 of up take turns, so that the thread that
// has one has the other.
//
//   PAIRS EXPERTS SHARED_BY FEATURES INPUTS GATED  as in grouped_skinny.cu
//   RECORDS          of `work`, each an expert, or -1 from the first without work on, and 128 pairs, or -1
//   STAGES LAG
#include "hopper.cuh"

constexpr int BLOCK_M = 128, BLOCK_N = 256, BLOCK_K = 64, GROUPS = 2, THREADS = (1 + GROUPS) * 128;
constexpr int OUT_ROWS = GATED ? BLOCK_N / 2 : BLOCK_N, OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES;
constexpr int TILES = OUT_FEATURES / OUT_ROWS, STEPS = INPUTS / BLOCK_K;
constexpr int RECORD = 1 + BLOCK_M, ITEMS = RECORDS * TILES;
constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, STAGE = A_BYTES + BLOCK_N * BLOCK_K * 2, BARRIERS_AT = STAGES * STAGE;
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

DEVICE void copy(u32 smem, const u16* __restrict__ x, const u16* __restrict__ weight, const int* __restrict__ work,
                 int thread) {
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
    const u16* rows[BLOCK_M / 16];
    u32 real = 0;
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; i++) {
      const int pair = __ldg(record + 1 + first + i * 16);
      rows[i] = x + (size_t)(max(pair, 0) / SHARED_BY) * INPUTS + chunk * 8;
      real |= (pair >= 0 ? 1u : 0u) << i;
    }
    const int row = GATED ? tile * OUT_ROWS + first % 8 + (first < 8 ? 0 : OUT_FEATURES) : tile * OUT_ROWS + first;
    const u16* from = weight + ((size_t)expert * FEATURES + row) * INPUTS + chunk * 8;
    for (int step = 0; step < STEPS; step++) {
      barrier_wait(place.freed(), place.phase ^ 1);
      const u32 a = smem + place.slot * STAGE + to, b = a + A_BYTES;
#pragma unroll
      for (int i = 0; i < BLOCK_M / 16; i++)
        cp_async_16(a + i * 16 * 128, rows[i] + step * BLOCK_K, real >> i & 1 ? 16 : 0);
#pragma unroll
      for (int i = 0; i < BLOCK_N / 16; i++)
        cp_async_16(b + i * 16 * 128, from + (size_t)i * (GATED ? 8 : 16) * INPUTS + step * BLOCK_K, 16);
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

DEVICE void multiply(u32 smem, const int* __restrict__ work, u16* __restrict__ out, int group, int thread) {
  const int lane = thread % 32, quarter = lane % 4, row = group * 64 + thread / 32 * 16 + lane / 4;
  Place place{smem + BARRIERS_AT, 0, 0};
  float d[BLOCK_N / 2];
  for (int item = blockIdx.x; item < ITEMS; item += gridDim.x) {
    const int* const record = work + item / TILES * RECORD;
    if (__ldg(record) < 0) break;
    const int pairs[2] = {__ldg(record + 1 + row), __ldg(record + 1 + row + 8)};
    u32 before = 0;
    for (int step = 0; step < STEPS; step++) {
      barrier_wait(place.full(), place.phase);
      wgmma_pin(d);
      wgmma_fence();
      const u32 stage = smem + place.slot * STAGE;
      const u64 a = matrix_descriptor(stage + group * 64 * 128, 128, 16, 1024);
      const u64 b = matrix_descriptor(stage + A_BYTES, 128, 16, 1024);
#pragma unroll
      for (int i = 0; i < BLOCK_K / 16; i++) Wgmma<BLOCK_N>::ss(d, a + i * 2, b + i * 2, step > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0 && lane == 0) barrier_arrive(before);
      before = place.freed();
      place.next();
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    if (lane == 0) barrier_arrive(before);
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_tiles(
    const u16* __restrict__ x,       // [PAIRS / SHARED_BY, INPUTS]
    const u16* __restrict__ weight,  // [EXPERTS, FEATURES, INPUTS]
    const int* __restrict__ work,    // [RECORDS, RECORD]
    u16* __restrict__ out            // [PAIRS, OUT_FEATURES]
) {
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
    copy(smem, x, weight, work, thread);
  } else {
    registers_more<224>();
    multiply(smem, work, out, group - 1, thread);
  }
}
