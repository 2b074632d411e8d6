// Addition of a residual and RMSNorm of the sum, a block for each row: every number is read and written once. The sum is
// rounded, and the norm is that of the rounded sum.
//
// Macros: those of rows.cuh; PER: units of a thread; RESIDUAL (there is one); NORM (without, the sum itself goes on);
// SUM (it is a result); QUANT (what goes on is e4m3, with a scale for each row); EPS; BLOCKED (what goes on lies as
// `BlockedTokens` of linear/product.py has it, in so many rows; 0: row by row). Grid: rows.
#include "rows.cuh"

constexpr int UNITS = COLUMNS / 8;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) residual_norm(
    const void* __restrict__ product,       // [SPLITS, T, COLUMNS]
    const float* __restrict__ row_scale,    // [T]
    const float* __restrict__ column_scale, // [COLUMNS]
    const void* __restrict__ residual,      // [T, COLUMNS]
    const float* __restrict__ weight,       // [COLUMNS]
    void* __restrict__ sum,                 // [T, COLUMNS]
    void* __restrict__ out,                 // [T, COLUMNS]
    float* __restrict__ out_scale           // [T]
) {
  const int row = blockIdx.x;
  const size_t first = (size_t)row * UNITS;
  float v[PER][8], by[PER][8];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int unit = i * THREADS + threadIdx.x;
    if (unit < UNITS) {
      float start[8];
      load_product(product, row_scale, column_scale, gridDim.x, row, unit, v[i]);
      if (RESIDUAL) load_unit(residual, first + unit, start);
      if (NORM) load_floats(weight, unit, by[i]);
      if (RESIDUAL) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] += start[j];
        round_unit(v[i]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = by[i][j] = 0.f;
    }
  }
  float squares = 0.f, largest = 0.f;
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (NORM) squares += v[i][j] * v[i][j];
      if (QUANT) largest = max(largest, fabsf(NORM ? v[i][j] * by[i][j] : v[i][j]));
    }
  const float2 total = of_block<NORM, QUANT>(squares, largest);
  const float factor = NORM ? rsqrtf(total.x / COLUMNS + (float)EPS) : 1.f;
  // The largest as rounded; by one product instead of two, which may be the next number, and then the values' own limit
  // holds.
  const float2 scale = scales_of(bf16_to_float((u16)pack_bf16(total.y * factor, 0.f)));
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int unit = i * THREADS + threadIdx.x;
    if (unit >= UNITS) continue;
    if (SUM) store_unit(sum, first + unit, v[i]);
    if (NORM)
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = v[i][j] * factor * by[i][j];
    if (QUANT) {
      if (NORM) round_unit(v[i]);
      store_e4m3(out, first + unit, v[i], scale.y);
    } else if (NORM && BLOCKED) {
      store_unit(out, ((size_t)(unit / 8) * BLOCKED + row) * 8 + (unit % 8 ^ row % 8), v[i]);
    } else if (NORM) {
      store_unit(out, first + unit, v[i]);
    }
  }
  if (QUANT && threadIdx.x == 0) out_scale[row] = scale.x;
}
