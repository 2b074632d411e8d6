// Products of one token with weights, one after the other without an end in between: as the ring of row_pairs.cuh, for all
// products of LAYERS layers. While the results of one are exchanged, the rows of the next come already.
//
// Weights lie as checkpoints have them, so the pieces of a row follow one another. A layer has four products: queries, keys
// and values; output; gate and up, whose pairs are a row of each; down.
// Macros: those of row_pairs.cuh, whose DEPTH holds for all products; LAYERS; LOOKAHEAD: stages that the second-level cache
// fetches for a warp whose slots are full.
#pragma once
#include "dense_layer.cuh"

// One of a layer's products, for `multiply`.
template <int ROWS, int INPUTS>
struct Rows {
  static constexpr int ITEMS = ROWS / 2, PIECES = INPUTS / PIECE;
};
typedef Rows<QKV_ROWS, WIDTH> Qkv;
typedef Rows<WIDTH, ATTENDED> Output;
typedef Rows<2 * FFN, WIDTH> GateUp;
typedef Rows<WIDTH, FFN> Down;

struct Chain {
  const void* const* pointers;  // of the layers, in shared memory
  u8* slots;                    // of this warp
  u64 once;
  const u16* from[2];           // this lane's part of the rows of the next copy
  int lane, mine;               // mine: the first item of this warp in each product
  int product, item, left;      // of the next copy: which of all, and pieces that are left of the item
  int filled, emptied, ahead;   // ahead: stages on their way

  // Begins with DEPTH stages.
  DEVICE Chain(const void* const* pointers, u8* rings) : pointers(pointers) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    slots = rings + warp * (SLOTS * SLOT) + lane * 16;
    item = mine = warp * BLOCKS + blockIdx.x;
    product = filled = emptied = ahead = 0;
    once = read_once();
    seek();
#pragma unroll 1
    while (ahead < DEPTH) copy();
  }
  // The rows of the next copy: of this item, or where the product has no more, of the next product's first.
  DEVICE void seek() {
    left = 0;
    for (; product < 4 * LAYERS; ++product, item = mine) {
      const int kind = product % 4;
      if (item < (kind == 0 ? Qkv::ITEMS : kind == 2 ? GateUp::ITEMS : WIDTH / 2)) break;
    }
    if (product == 4 * LAYERS) return;
    const int kind = product % 4, inputs = kind == 1 ? ATTENDED : kind == 3 ? FFN : WIDTH;
    const u16* const weight = (const u16*)pointers[product / 4 * POINTERS + FIRST_WEIGHT + kind] + lane * 8;
    from[0] = weight + (size_t)(kind == 2 ? item : 2 * item) * inputs;
    from[1] = from[0] + (size_t)(kind == 2 ? FFN : 1) * inputs;
    left = inputs / PIECE;
  }
  // One stage; where there is no more, a group of copies that has none.
  DEVICE void copy() {
    if (left) {
      const u32 to = shared_address(slots + filled * SLOT);
#pragma unroll
      for (int i = 0; i < STAGE; ++i) {
        if (!WHOLE_STAGES && i >= left) break;
#pragma unroll
        for (int row = 0; row < 2; ++row) cp_async_16_once(to + (i * 2 + row) * PIECE * 2, from[row] + i * PIECE, once);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) from[row] += STAGE * PIECE;
      left = max(left - STAGE, 0);
      if (++filled == SLOTS) filled = 0;
      if (!left) {
        item += WORKERS;
        seek();
      }
    }
    cp_async_commit();
    ++ahead;
  }
  // While it multiplies.
  DEVICE void bring() {
    if (ahead < DEPTH) copy();
  }
  // While nothing else is to be done: all slots but one, and what the second-level cache fetches.
  DEVICE void fill() {
#pragma unroll 1
    while (ahead < SLOTS - 1) copy();
    const int count = min(left, LOOKAHEAD * STAGE);
    for (int at = lane; at < 2 * count; at += 32)
      prefetch((at % 2 ? from[1] : from[0]) - lane * 8 + at / 2 * PIECE, PIECE * 2);
  }
  template <int>
  DEVICE const uint4* next() {
    cp_async_wait<DEPTH - 1>();
    const uint4* const found = (const uint4*)(slots + emptied * SLOT);
    if (++emptied == SLOTS) emptied = 0;
    --ahead;
    return found;
  }
};
