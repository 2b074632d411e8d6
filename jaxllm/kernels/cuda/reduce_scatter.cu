// Every GPU's own rows of the sum of all GPUs' parts. See all_reduce.cuh, also for the macros and the arguments.
#define TRIPS SCATTER
#include "all_reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_OF(CLUSTER) reduce_scatter(
    const uint4* part, const uint4* residual, const u64* group, const float4* weight, uint4* out, uint4* normed) {
  exchange(part, residual, group, weight, out, normed);
}
