// Rows of numbers as e4m3 with a scale for each row.
#pragma once
#include "ptx.cuh"

// How numbers of at most this size become e4m3, as `quantize_tokens` of linear/quantized.py has it: .x is what a value
// is multiplied with to be the number again, .y what the number is multiplied with.
DEVICE float2 scales_of(float largest) {
  return largest > 0.f ? make_float2(largest * (1.f / 448.f), 448.f / largest) : make_float2(1.f, 1.f);
}
DEVICE void store_e4m3(void* p, size_t unit, const float (&v)[8], float by) {
  const u32 low = pack_e4m3(v[0] * by, v[1] * by) | (u32)pack_e4m3(v[2] * by, v[3] * by) << 16;
  const u32 high = pack_e4m3(v[4] * by, v[5] * by) | (u32)pack_e4m3(v[6] * by, v[7] * by) << 16;
  ((uint2*)p)[unit] = make_uint2(low, high);
}
