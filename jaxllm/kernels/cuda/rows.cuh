// What the kernels between products share. A block has a row, the activations of a token, or a part of it; a thread has
// units of 8 neighbouring numbers, and computes in float32.
//
// A product may come unfinished, so that finishing it takes no pass of its own: as SPLITS sums in float32 that are added
// up in their order, or with scales of its rows and columns (SCALED). Finished it is rounded to the activations' dtype.
//
// Macros: COLUMNS of the product; THREADS; BLOCKS that a multiprocessor shall have at once; FLOAT (activations are float32,
// else bfloat16); SPLITS (0: the product is in the activations' dtype); ROUNDED (the sums of its parts are in that dtype,
// too, and theirs is not rounded again before something is added); SCALED.
#pragma once
#include "quantize.cuh"
#include "stream.cuh"

DEVICE void add_pair(float (&v)[8], int at, u32 two) {
  v[at] = bf16_to_float((u16)two);
  v[at + 1] = bf16_to_float((u16)(two >> 16));
}
DEVICE void unpack(float (&v)[8], uint4 word) {
  add_pair(v, 0, word.x);
  add_pair(v, 2, word.y);
  add_pair(v, 4, word.z);
  add_pair(v, 6, word.w);
}
DEVICE uint4 pack(const float (&v)[8]) {
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}
// What v is in the activations' dtype.
DEVICE void round_unit(float (&v)[8]) {
  if (!FLOAT) unpack(v, pack(v));
}

DEVICE void load_floats(const void* p, size_t unit, float (&v)[8]) {
  const uint4 a = load_kept((const uint4*)p + 2 * unit), b = load_kept((const uint4*)p + 2 * unit + 1);
  const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = __uint_as_float(words[j]);
}
// Units of activations.
DEVICE void load_unit(const void* p, size_t unit, float (&v)[8]) {
  if (FLOAT) load_floats(p, unit, v);
  else unpack(v, load_kept((const uint4*)p + unit));
}
DEVICE void store_unit(void* p, size_t unit, const float (&v)[8]) {
  if (FLOAT) {
    ((float4*)p)[2 * unit] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4*)p)[2 * unit + 1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    ((uint4*)p)[unit] = pack(v);
  }
}

// A unit of a row of a product of `rows` rows, finished.
DEVICE void load_product(
    const void* product, const float* row_scale, const float* column_scale, int rows, int row, int unit, float (&v)[8]
) {
  const size_t at = (size_t)row * (COLUMNS / 8) + unit;
  if (SPLITS == 0) {
    load_unit(product, at, v);
  } else {
    float part[SPLITS > 0 ? SPLITS : 1][8];
#pragma unroll
    for (int split = 0; split < SPLITS; ++split)
      if (ROUNDED) load_unit(product, (size_t)split * rows * (COLUMNS / 8) + at, part[split]);
      else load_floats(product, (size_t)split * rows * (COLUMNS / 8) + at, part[split]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] = part[0][j];
#pragma unroll
      for (int split = 1; split < SPLITS; ++split) v[j] += part[split][j];
    }
  }
  if (SCALED) {
    // Where the compiler likes: rows share them, and they wait in the first-level cache.
    const float4 a = ((const float4*)column_scale)[2 * unit], b = ((const float4*)column_scale)[2 * unit + 1];
    const float scale[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, of_row = row_scale[row];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = v[j] * of_row * scale[j];
  }
  if ((SPLITS && !ROUNDED) || SCALED) round_unit(v);
}

// The sum, and the largest, of what the threads of the block have, or one of them; to be called once. Shared memory: 8
// bytes a warp.
template <bool WITH_SUM, bool WITH_LARGEST>
DEVICE float2 of_block(float sum, float largest) {
  DYNAMIC_SHARED(bytes);
  float2* const of_warp = (float2*)bytes;
#pragma unroll
  for (int by = 16; by; by /= 2) {
    if (WITH_SUM) sum += __shfl_xor_sync(~0u, sum, by);
    if (WITH_LARGEST) largest = max(largest, __shfl_xor_sync(~0u, largest, by));
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = make_float2(sum, largest);
  __syncthreads();
  sum = largest = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) {
    const float2 other = of_warp[warp];
    sum += other.x;
    largest = max(largest, other.y);
  }
  return make_float2(sum, largest);
}
