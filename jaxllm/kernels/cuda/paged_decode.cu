// Attention of few query tokens per row over paged keys and values; see paged_decode.cuh, for macros and arguments too.
#define ROPE 0
#include "paged_decode.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) paged_decode(
    const u16* q, const u8* kv, const int* pages, const int* positions, const int* first, const int* zeros, u16* out,
    float* lse, float* part_out, float* part_lse, int* finished) {
  decode(q, (u8*)kv, nullptr, nullptr, pages, positions, first, out, lse, part_out, part_lse, finished);
}
