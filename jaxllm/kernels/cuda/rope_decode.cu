// One new token for each row: its queries and key are rotated, its key and value go to their page, and its queries see
// all keys and values up to there; see paged_decode.cuh, for macros and arguments too.
#define ROPE 1
#include "paged_decode.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) rope_decode(
    const u16* qkv, const float* cosine, const float* sine, const int* pages, const int* positions, const int* zeros,
    const u8* pool, u16* out, float* lse, float* part_out, float* part_lse, int* finished, u8* kv) {
  decode(qkv, kv, cosine, sine, pages, positions, positions, out, lse, part_out, part_lse, finished);
}
