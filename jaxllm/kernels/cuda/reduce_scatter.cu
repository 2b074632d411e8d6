// Every GPU's own rows of the sum of all GPUs' parts. See all_reduce.cuh, also for the macros and the arguments.
#define TRIPS SCATTER
#include "all_reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_OF(CLUSTER) reduce_scatter(
    const uint4* part, const uint4* residual, const u64* group, const float4* weight, const float* row_scale,
    const float4* column_scale, uint4* out, void* normed, float* normed_scale) {
  exchange(part, residual, group, weight, row_scale, column_scale, out, normed, normed_scale);
}
