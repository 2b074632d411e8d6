// Every GPU's rows on all of them. See all_reduce.cuh, also for the macros and the arguments.
#define TRIPS GATHER
#include "all_reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_OF(CLUSTER) gather_rows(
    const uint4* part, const uint4* residual, const u64* group, const float4* weight, uint4* out, uint4* normed) {
  exchange(part, residual, group, weight, out, normed);
}
