// The work of grouped_skinny.cu and grouped_tiles.cu: for each expert that somebody chose its pairs, COLUMNS to a record; by one block.
//
// A record is an expert, or -1 for no work, and COLUMNS pairs, or -1. A pair's place among those of its expert is
// whatever the atomic additions make of it, on which no result depends.
//
// Macros: PAIRS, EXPERTS (others are nobody's), COLUMNS, RECORDS, THREADS.
#include "ptx.cuh"

constexpr int RECORD = 1 + COLUMNS;
constexpr int PER_LANE = (EXPERTS + 31) / 32;

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_list(
    const int* __restrict__ chosen,  // [PAIRS]
    int* __restrict__ records        // [RECORDS, RECORD]
) {
  __shared__ int counts[EXPERTS], firsts[EXPERTS];
  const int thread = threadIdx.x;
  for (int i = thread; i < EXPERTS; i += THREADS) counts[i] = 0;
  for (int i = thread; i < RECORDS * RECORD; i += THREADS) records[i] = -1;
  __syncthreads();
#pragma unroll 8
  for (int pair = thread; pair < PAIRS; pair += THREADS) {
    const int expert = __ldg(chosen + pair);
    if (expert >= 0 && expert < EXPERTS) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  if (thread < 32) {
    int here = 0;
    for (int i = 0; i < PER_LANE; i++) {
      const int e = thread * PER_LANE + i;
      if (e < EXPERTS) here += (counts[e] + COLUMNS - 1) / COLUMNS;
    }
    int before = here;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(~0u, before, by);
      if (thread >= by) before += other;
    }
    before -= here;
    for (int i = 0; i < PER_LANE; i++) {
      const int e = thread * PER_LANE + i;
      if (e >= EXPERTS) break;
      firsts[e] = before;
      before += (counts[e] + COLUMNS - 1) / COLUMNS;
      counts[e] = 0;
    }
  }
  __syncthreads();
#pragma unroll 8
  for (int pair = thread; pair < PAIRS; pair += THREADS) {
    const int expert = __ldg(chosen + pair);
    if (expert < 0 || expert >= EXPERTS) continue;
    const int number = atomicAdd(&counts[expert], 1);
    int* const record = records + (firsts[expert] + number / COLUMNS) * RECORD;
    record[1 + number % COLUMNS] = pair;
    if (number % COLUMNS == 0) record[0] = expert;
  }
}
