// Numbers in e4m3 on their way to products in bf16.
#pragma once
#include "cluster.cuh"

// Two neighbouring e4m3 of a word as two bf16, exactly: sign, exponent and mantissa move to their places, and the exponents'
// bias is put right by a factor of 2^120. `pair` 0: bytes 0 and 1, 1: bytes 2 and 3.
DEVICE u32 widen_e4m3(u32 word, int pair) {
  const u32 apart = select_bytes(word, 0u, pair ? 0x3424 : 0x1404);
  return fma_bf16x2((apart & 0x80008000u) | ((apart & 0x7F007F00u) >> 4), 0x7B807B80u, 0x80008000u);
}
