// Every GPU's rows on all of them. See all_reduce.cuh, also for the macros and the arguments.
#define TRIPS GATHER
#include "all_reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_OF(CLUSTER) gather_rows(
    const uint4* part, const uint4* residual, const u64* group, const float4* weight, const float* row_scale,
    const float4* column_scale, uint4* out, void* normed, float* normed_scale) {
  exchange(part, residual, group, weight, row_scale, column_scale, out, normed, normed_scale);
}
