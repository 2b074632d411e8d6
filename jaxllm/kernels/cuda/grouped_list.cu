// The work of grouped_skinny.cu: for each expert that somebody chose its pairs, COLUMNS to a record; by one block.
//
// A record is an expert, or -1 for no work, and COLUMNS pairs, or -1. A pair's place among those of its expert is
// whatever the atomic additions make of it, on which no result depends.
//
// Macros: PAIRS, EXPERTS (others are nobody's), COLUMNS, RECORDS, THREADS.
#include "ptx.cuh"

constexpr int RECORD = 1 + COLUMNS;
constexpr int PER_THREAD = (PAIRS + THREADS - 1) / THREADS, PER_LANE = (EXPERTS + 31) / 32;

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_list(
    const int* __restrict__ chosen,  // [PAIRS]
    int* __restrict__ records        // [RECORDS, RECORD]
) {
  __shared__ int counts[EXPERTS], firsts[EXPERTS];
  const int thread = threadIdx.x;
  int expert[PER_THREAD], number[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    const int pair = i * THREADS + thread;
    expert[i] = pair < PAIRS ? __ldg(chosen + pair) : -1;
  }
  for (int i = thread; i < EXPERTS; i += THREADS) counts[i] = 0;
  for (int i = thread; i < RECORDS * RECORD; i += THREADS) records[i] = -1;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++)
    if (expert[i] >= 0 && expert[i] < EXPERTS) number[i] = atomicAdd(&counts[expert[i]], 1);
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
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++)
    if (expert[i] >= 0 && expert[i] < EXPERTS) {
      int* const record = records + (firsts[expert[i]] + number[i] / COLUMNS) * RECORD;
      record[1 + number[i] % COLUMNS] = i * THREADS + thread;
      if (number[i] % COLUMNS == 0) record[0] = expert[i];
    }
}
