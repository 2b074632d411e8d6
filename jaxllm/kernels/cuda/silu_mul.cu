// act(gate) * up of the two halves of each row of a product, rounded once; as e4m3 with a scale for each row, a block
// keeps its row in registers until its largest number is known.
//
// Macros: those of rows.cuh; PER: units of a thread; ACTIVATION (1: silu, 2: gelu with tanh); QUANT. Grid: rows, and
// blocks of a row (one with QUANT).
#include "rows.cuh"

constexpr int UNITS = COLUMNS / 16;

DEVICE float activation(float x) {
  const float y = ACTIVATION == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
  return x * fast_reciprocal(1.f + fast_exp2(y * -1.4426950408889634f));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) silu_mul(
    const void* __restrict__ product,       // [SPLITS, T, COLUMNS]
    const float* __restrict__ row_scale,    // [T]
    const float* __restrict__ column_scale, // [COLUMNS]
    void* __restrict__ out,                 // [T, COLUMNS / 2]
    float* __restrict__ out_scale           // [T]
) {
  const int row = blockIdx.x, block = blockIdx.y * PER * THREADS;
  const size_t first = (size_t)row * UNITS;
  float v[PER][8];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int unit = block + i * THREADS + threadIdx.x;
    float up[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[i][j] = up[j] = 0.f;
    if (unit < UNITS) {
      load_product(product, row_scale, column_scale, gridDim.x, row, unit, v[i]);
      load_product(product, row_scale, column_scale, gridDim.x, row, UNITS + unit, up);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[i][j] = activation(v[i][j]) * up[j];
  }
  float largest = 0.f;
  if (QUANT) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      round_unit(v[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = max(largest, fabsf(v[i][j]));
    }
    largest = of_block<false, true>(0.f, largest).y;
  }
  const float2 scale = scales_of(largest);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int unit = block + i * THREADS + threadIdx.x;
    if (unit >= UNITS) continue;
    if (QUANT) store_e4m3(out, first + unit, v[i], scale.y);
    else store_unit(out, first + unit, v[i]);
  }
  if (QUANT && threadIdx.x == 0) out_scale[row] = scale.x;
}
