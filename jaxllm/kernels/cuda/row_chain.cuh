// Products of one token with weights, one after the other without an end in between, by warps that share nothing: each has
// its own ring in shared memory, as in row_pairs.cuh, for all products of LAYERS layers. While the results of one product
// are exchanged, the rows of the next come already.
//
// Multiprocessors are not equally fast, so a part of a product's items has no owner: a warp that is about to have brought its
// own asks for one more. What it brings is in a queue, from which it multiplies.
//
// Weights lie as checkpoints have them, so the pieces of a row follow one another. A layer has four products: queries, keys
// and values; output; gate and up; down. An item is a pair of rows, or a row in two halves.
// Macros: BLOCKS WARPS SLOTS of row_pairs.cuh; DEPTH: stages of a warp on their way while it multiplies; LAYERS; OWNED:
// percent of a product's items that have owners.
#pragma once
#include "dense_layer.cuh"

// One of a layer's products. HALVES: its items are rows in two halves.
template <int KIND_, int ROWS, int INPUTS, bool MAY_HALVE>
struct Rows {
  static constexpr bool HALVES = MAY_HALVE && INPUTS / PIECE % 2 == 0;
  static constexpr int KIND = KIND_, ITEMS = HALVES ? ROWS : ROWS / 2, PIECES = INPUTS / PIECE / (HALVES ? 2 : 1);
  static constexpr int ROUNDS = ITEMS * OWNED / 100 / WORKERS;
  static constexpr int OWN_ITEMS = ROUNDS ? ROUNDS * WORKERS : ITEMS < WORKERS ? ITEMS : WORKERS;
  static constexpr bool WHOLE = PIECES % STAGE == 0;
};
typedef Rows<0, QKV_ROWS, WIDTH, false> Qkv;
typedef Rows<1, WIDTH, ATTENDED, false> Output;
typedef Rows<2, 2 * FFN, WIDTH, false> GateUp;
typedef Rows<3, WIDTH, FFN, true> Down;
constexpr bool WHOLE_STAGES = Qkv::WHOLE && Output::WHOLE && GateUp::WHOLE && Down::WHOLE;
constexpr int of_kind(int kind, int a, int b, int c, int d) { return kind == 0 ? a : kind == 1 ? b : kind == 2 ? c : d; }
constexpr int ITEM_BITS = 20, QUEUE = 8;  // a queue's entry: the product's number, the item
static_assert(GateUp::ITEMS < 1 << ITEM_BITS && 4 * LAYERS < 1 << (31 - ITEM_BITS) && SLOTS <= QUEUE, "a queue");

struct Chain {
  const void* const* pointers;  // of the layers, in shared memory
  u32* words;                   // see dense_layer.cuh
  int* queue;                   // of this warp
  u8* slots;                    // of this warp
  u64 once;
  const u16* from[2];           // this lane's part of the rows of the next copy
  int lane, mine;               // mine: the first item of this warp in each product
  int product, item, left;      // of the next copy: which of all, and pieces that are left of the item
  int filled, emptied, ahead;   // ahead: stages on their way
  int pushed, popped, ticket;   // ticket: what lane 0 was given when it asked for an item without an owner
  bool asked;
  int hold = 4 * LAYERS;        // nothing of this product and what follows is brought while others are multiplied

  // Begins with DEPTH stages.
  DEVICE Chain(const void* const* pointers, u32* words, int* queues, u8* rings) : pointers(pointers), words(words) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    queue = queues + warp * QUEUE;
    slots = rings + warp * (SLOTS * SLOT) + lane * 16;
    mine = warp * BLOCKS + blockIdx.x;
    product = item = left = filled = emptied = ahead = pushed = popped = ticket = 0;
    asked = false;
    once = read_once();
    begin();
#pragma unroll 1
    while (ahead < DEPTH) copy();
  }
  DEVICE static int items(int kind) { return of_kind(kind, Qkv::ITEMS, Output::ITEMS, GateUp::ITEMS, Down::ITEMS); }
  DEVICE static int own_items(int kind) {
    return of_kind(kind, Qkv::OWN_ITEMS, Output::OWN_ITEMS, GateUp::OWN_ITEMS, Down::OWN_ITEMS);
  }
  // The first item of the product, or of the next one that has one for this warp.
  DEVICE void begin() {
    item = mine;
    while (product < 4 * LAYERS && mine >= items(product % 4)) ++product;
    if (product < 4 * LAYERS) open();
  }
  // The item after this one.
  DEVICE void seek() {
    const int kind = product % 4;
    item = asked ? own_items(kind) + __shfl_sync(~0u, ticket, 0) : item + WORKERS;
    asked = false;
    if (item < items(kind)) return open();
    ++product;
    begin();
  }
  DEVICE void open() {
    const int kind = product % 4, inputs = of_kind(kind, WIDTH, ATTENDED, WIDTH, FFN);
    const bool halves = of_kind(kind, Qkv::HALVES, Output::HALVES, GateUp::HALVES, Down::HALVES);
    const u16* const weight = (const u16*)pointers[product / 4 * POINTERS + FIRST_WEIGHT + kind] + lane * 8;
    from[0] = weight + (size_t)(halves || kind == 2 ? item : 2 * item) * inputs;
    from[1] = from[0] + (kind == 2 ? (size_t)FFN * inputs : halves ? inputs / 2 : inputs);
    left = of_kind(kind, Qkv::PIECES, Output::PIECES, GateUp::PIECES, Down::PIECES);
    queue[pushed++ % QUEUE] = product << ITEM_BITS | item;  // by all lanes, so that each sees it
  }
  // One stage, unless it is held back; where there is no more, a group of copies that has none.
  DEVICE void copy() {
    if (left == 0 && product < 4 * LAYERS) seek();
    if (product >= hold && hold < 4 * LAYERS) return;
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
      const int kind = product % 4, own = own_items(kind);
      if (!asked && left <= 2 * STAGE && item + WORKERS >= own && own < items(kind)) {  // the answer takes a while
        asked = true;
        if (lane == 0) ticket = atomicAdd((int*)words + (size_t)(product / 4) * TOLD_END + TICKETS + kind, 1);
      }
    }
    cp_async_commit();
    ++ahead;
  }
  // While nothing else is to be done: all slots but one.
  DEVICE void fill() {
#pragma unroll 1
    while (ahead < SLOTS - 1) copy();
  }
  // The next item to multiply with, if it is one of this product; otherwise -1.
  DEVICE int pop(int of) {
    if (popped == pushed) return -1;
    const int entry = queue[popped % QUEUE];
    if (entry >> ITEM_BITS != of) return -1;
    ++popped;
    return entry & ((1 << ITEM_BITS) - 1);
  }
  // The next stage, which has come; meanwhile another is on its way.
  DEVICE const uint4* next() {
    if (ahead < DEPTH) cp_async_wait<0>();  // some were held back
    else cp_async_wait<DEPTH - 1>();
    const uint4* const found = (const uint4*)(slots + emptied * SLOT);
    if (++emptied == SLOTS) emptied = 0;
    --ahead;
    if (ahead < DEPTH) copy();  // into the slot that was read before this one
    return found;
  }
};

// Multiplies `inputs`, bf16 in shared memory, with a product's rows. finish(item, float32 sums of its two rows, or of the one
// and 0, what before(item) gave) is called by whole warps.
//
// On matrix instructions: the 8 groups of 4 lanes are rows for weights, and columns for inputs, of the same places in a row.
// What counts of their products are those of a group with itself, at the diagonal; a pair's second row has rows 8 to 15.
template <class Product, class Before, class Finish>
DEVICE void multiply(Chain& chain, int layer, const uint4* inputs, Before before, Finish finish) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int item; (item = chain.pop(4 * layer + Product::KIND)) >= 0;) {
    const auto known = before(item);
    float sums[2][4] = {};
#pragma unroll 1
    for (int stage = 0; stage < (Product::PIECES + STAGE - 1) / STAGE; ++stage) {
      const uint4* const weights = chain.next();
#pragma unroll
      for (int i = 0; i < STAGE; ++i) {
        const int piece = stage * STAGE + i;
        if (!Product::WHOLE && piece >= Product::PIECES) break;
        const uint4 a = weights[i * 2 * 32], b = weights[(i * 2 + 1) * 32], x = inputs[piece * 32 + lane];
        if (Product::HALVES) {
          const uint4 y = inputs[(Product::PIECES + piece) * 32 + lane];
          const u32 of_a[2][4] = {{a.x, 0, a.y, 0}, {a.z, 0, a.w, 0}}, of_b[2][4] = {{b.x, 0, b.y, 0}, {b.z, 0, b.w, 0}};
          mma_bf16(sums[0], of_a[0], x.x, x.y);
          mma_bf16(sums[1], of_b[0], y.x, y.y);
          mma_bf16(sums[0], of_a[1], x.z, x.w);
          mma_bf16(sums[1], of_b[1], y.z, y.w);
        } else {
          const u32 low[4] = {a.x, b.x, a.y, b.y}, high[4] = {a.z, b.z, a.w, b.w};
          mma_bf16(sums[0], low, x.x, x.y);
          mma_bf16(sums[1], high, x.z, x.w);
        }
      }
    }
    const int group = lane / 4;
    float sum[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float even = sums[0][2 * row] + sums[1][2 * row], odd = sums[0][2 * row + 1] + sums[1][2 * row + 1];
      sum[row] = lane % 4 != group / 2 ? 0.f : group % 2 ? odd : even;
    }
#pragma unroll
    for (int by = 16; by; by /= 2)
#pragma unroll
      for (int row = 0; row < (Product::HALVES ? 1 : 2); ++row) sum[row] += __shfl_xor_sync(~0u, sum[row], by);
    finish(item, sum[0], sum[1], known);
  }
}
