// Products of one token with weights, two rows at a time, by warps that share nothing: each has its own ring in shared
// memory, which its first lane fills by bulk copies of whole rows of a stage, so that nobody waits for anybody. A ring has
// the weights of two products that follow each other: while the results of the first are exchanged, those of the second come
// already. A ring can go on with what the second one is followed by.
//
// A product is a type with
//   ITEMS   pairs of rows; warp w of block b has items w * (BLOCKS - IDLE) + b - IDLE, and so on, by WORKERS
//   PIECES  of 256 inputs in a row
//   RUN     of them lie together, from a multiple of so many on
//   const u16* start(int item, int row)   where row 0 or 1 of a pair begins
//   size_t offset(int piece)              of a piece from there
// Macros: BLOCKS of the grid, the first IDLE (0) of which have no items; WARPS of a block; SLOTS of a ring; DEPTH: stages of a
// warp on their way while it multiplies the first product (SLOTS - 1); PACE: of a warp that waits (1). What blocks tell one
// another comes late behind many copies, so there are no more of them than memory needs to be busy.
#pragma once
#include "cluster.cuh"

#ifndef DEPTH
#define DEPTH (SLOTS - 1)
#endif

#ifndef IDLE
#define IDLE 0
#endif

#ifndef PACE
#define PACE 1
#endif

constexpr int THREADS = WARPS * 32, WORKERS = WARPS * (BLOCKS - IDLE);
constexpr int PIECE = 256, STAGE = 4, SLOT = STAGE * 2 * PIECE * 2;  // inputs; pieces of two rows; bytes
constexpr int RINGS = WARPS * SLOTS * SLOT;                          // bytes of all rings
constexpr int BARRIERS = (WARPS * SLOTS * 8 + 15) / 16 * 16;         // after them, one for each slot
static_assert(SLOTS > 1 && DEPTH > 0 && DEPTH < SLOTS, "a ring");

// Of this warp.
DEVICE int first_item() {
  return (int)blockIdx.x < IDLE ? 1 << 30 : (int)threadIdx.x / 32 * (BLOCKS - IDLE) + (int)blockIdx.x - IDLE;
}

template <class Product>
DEVICE constexpr int stages_of() { return (Product::PIECES + STAGE - 1) / STAGE; }
// A product may have items that are one row, in two halves: how many stages an item has, and where, in uint4 of inputs, those
// of its second half begin.
template <class Product>
DEVICE constexpr int stages_at(const Product&, int) { return stages_of<Product>(); }
template <class Product>
DEVICE constexpr int second_inputs(const Product&, int) { return 0; }
// How many items are copied: a product that is not there after all may have none.
template <class Product>
DEVICE constexpr int items_of(const Product&) { return Product::ITEMS; }

// How far the copies of a warp are.
struct RingPlace {
  u8* slots;       // of this warp
  int lane, item;  // item: of the next copy
  int stage, filled, emptied;
  int ahead, most, later;  // stages on their way, and how many there may be, of the first product and of the second
  u32 phase;        // of the barriers from `emptied` on
  u64 once;
  const u16* from[2];  // the rows of the next copy

  // At the begin of a first product, with DEPTH stages.
  DEVICE explicit RingPlace(u8* rings) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    slots = rings + warp * (SLOTS * SLOT);
    filled = emptied = ahead = phase = 0;
    once = read_once();
    begin();
  }
  // The same for a product that does not follow the one before, all of which is multiplied.
  DEVICE void begin() {
    item = first_item();
    stage = 0;
    most = later = DEPTH;
  }
  // By a warp, before there are copies: its barriers.
  DEVICE static void make_barriers(u8* rings) {
    const int lane = threadIdx.x % 32;
    if (lane < SLOTS) barrier_init(barrier_of(rings, lane), 1);
    barrier_init_fence();
  }
  DEVICE static u32 barrier_of(u8* rings, int slot) {
    return shared_address(rings + RINGS + (threadIdx.x / 32 * SLOTS + slot) * 8);
  }
  DEVICE u32 barrier(int slot) const { return barrier_of(slots - threadIdx.x / 32 * (SLOTS * SLOT), slot); }
};

template <class First, class Second>
struct Ring : RingPlace {
  const First& first;
  const Second& second;
  bool on_second = false;

  // Goes on where a ring of what was before `first`, and of `first`, has come to, once what was before is multiplied.
  DEVICE Ring(const First& first, const Second& second, const RingPlace& place)
      : RingPlace(place), first(first), second(second) {
    if (item >= items_of(first)) to_second();
  }
  // From now on all slots but one.
  DEVICE void top() {
#pragma unroll 1
    while (bring()) continue;
  }
  // Lets the second-level cache fetch what there is no room for.
  DEVICE void prefetch_rest() {
    if (item >= items_of(second)) return;
    for (int at = 2 * stage * STAGE + lane; at < 2 * Second::PIECES; at += 32)
      prefetch(second.start(item, at % 2) + second.offset(at / 2), PIECE * 2);
  }
  // Begins anew: what has been brought is not wanted.
  DEVICE void restart() {
    while (ahead) next();
    begin();
    on_second = item >= items_of(first);
  }
  // Whether fewer than PACE stages are on their way.
  DEVICE bool has_paced() const {
    if (ahead < PACE) return true;
    const int slot = emptied + ahead - PACE;
    const bool ended = barrier_ended_now(barrier(slot < SLOTS ? slot : slot - SLOTS), slot < SLOTS ? phase : phase ^ 1);
    return __all_sync(~0u, ended);
  }
  // One stage, if no more than PACE are on their way then. Returns whether all slots but one are full.
  DEVICE bool bring_paced() { return has_paced() && !bring() && ahead == SLOTS - 1; }
  // The same, of the first product alone.
  DEVICE void bring_first_paced() {
    if (on_second || ahead >= most || !has_paced()) return;
    if (copy(first)) to_second();
    ++ahead;
  }

  // One stage. Returns whether it was the product's last.
  template <class Product>
  DEVICE bool copy(const Product& product) {
    constexpr int PIECES = Product::PIECES;
    const u32 to = shared_address(slots + filled * SLOT);
    if (stage == 0)
#pragma unroll
      for (int row = 0; row < 2; ++row) from[row] = product.start(item, row);
    constexpr int RUN = Product::RUN;
    const int pieces = PIECES % STAGE ? min(STAGE, PIECES - stage * STAGE) : STAGE;
    __syncwarp();  // all have read what was there
    if (lane == 0) {
      const u32 told = barrier(filled);
      barrier_expect(told, pieces * 2 * PIECE * 2);
#pragma unroll
      for (int i = 0; i < STAGE; ++i) {
        const int piece = stage * STAGE + i, run = RUN < PIECES ? min(RUN - piece % RUN, pieces - i) : pieces;
        if (i && (RUN >= PIECES || piece % RUN || i >= pieces)) continue;
#pragma unroll
        for (int row = 0; row < 2; ++row)
          copy_once(to + (row * STAGE + i) * PIECE * 2, from[row] + product.offset(piece), run * PIECE * 2, told, once);
      }
    }
    if (++filled == SLOTS) filled = 0;
    if (++stage == stages_at(product, item)) {
      stage = 0;
      item += WORKERS;
    }
    return item >= items_of(product);
  }
  // Copies one stage, if there is one and room for it. Returns whether it did.
  DEVICE bool bring() {
    if (ahead >= (on_second ? later : most) || (on_second && item >= items_of(second))) return false;
    if (on_second) copy(second);
    else if (copy(first)) to_second();
    ++ahead;
    return true;
  }
  DEVICE void to_second() {
    on_second = true;
    item = first_item();
  }
  // Waits for the next stage, which the copies after it need not have landed for.
  DEVICE const uint4* next() {
    --ahead;
    barrier_wait(barrier(emptied), phase);
    const uint4* const found = (const uint4*)(slots + emptied * SLOT);
    if (++emptied == SLOTS) {
      emptied = 0;
      phase ^= 1;
    }
    return found;
  }
};

// What a warp that waits does meanwhile: its ring's copies, one after the other. REST: and once those are there, all that the
// product's item has besides comes to the second-level cache.
template <class Ring, bool REST>
struct Copying {
  Ring& ring;
  bool done = false;
  DEVICE void operator()() {
    if (done) return;
    done = ring.bring_paced();
    if (REST && done) ring.prefetch_rest();
  }
};
template <bool REST = false, class Ring>
DEVICE Copying<Ring, REST> copying(Ring& ring) { return {ring}; }

DEVICE float low_of(u32 two) { return bf16_to_float((u16)two); }
DEVICE float high_of(u32 two) { return __uint_as_float(two & 0xffff0000u); }

// The products of pieces of two rows with their inputs, added up over lanes. On tensor cores that takes a third of the
// instructions: rows of theirs are (row, one of 8 parts of the piece), columns the same parts of inputs, and what stands on
// the diagonal is wanted.
struct PairSums {
  float sums[4] = {};

  // weights: of the first row, the second STAGE pieces further. second: how much further its inputs are.
  DEVICE void add(float by, const uint4* weights, const uint4* inputs, int second) {
    const int lane = threadIdx.x % 32;
    const u32 from = shared_address(weights + lane / 8 % 2 * (STAGE * 32) + lane / 16 * 8 + lane % 8);
    float found[4] = {};
    u32 a[2][4], x[4];
    ldmatrix_x4(x, shared_address(inputs + lane));
#pragma unroll
    for (int half = 0; half < 2; ++half) ldmatrix_x4(a[half], from + half * 256);
    if (second) {
      u32 y[4];
      ldmatrix_x4(y, shared_address(inputs + second + lane));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 first_row[4] = {a[half][0], 0, a[half][2], 0}, other_row[4] = {0, a[half][1], 0, a[half][3]};
        mma_bf16(found, first_row, x[2 * half], x[2 * half + 1]);
        mma_bf16(found, other_row, y[2 * half], y[2 * half + 1]);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) mma_bf16(found, a[half], x[2 * half], x[2 * half + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += by * found[i];
  }
  // All lanes have the sums of both rows.
  DEVICE void reduce(float (&sum)[2]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int row = 0; row < 2; ++row)  // of the four lanes of part lane / 4, the one with its column
      sum[row] = __shfl_sync(~0u, lane / 4 % 2 ? sums[2 * row + 1] : sums[2 * row], lane / 4 * 4 + lane / 8);
#pragma unroll
    for (int by = 16; by > 2; by /= 2)
#pragma unroll
      for (int row = 0; row < 2; ++row) sum[row] += __shfl_xor_sync(~0u, sum[row], by);
  }
};

// Multiplies `inputs`, bf16 in shared memory, with the rows of a product that the ring has. factor(piece): of a piece's
// part of the sum. finish(item, sums of its two rows, what before(item) gave) is called by whole warps; sums are float32.
// ready(stage) is called before the inputs of a stage are read.
struct Always {
  DEVICE void operator()(int) const {}
};
template <class Product, class Source, class Factor, class Before, class Finish, class Ready = Always>
DEVICE void multiply(
    const Product& product, Source& ring, const uint4* inputs, Factor factor, Before before, Finish finish, Ready ready = {}
) {
#pragma unroll 1
  for (int item = first_item(); item < Product::ITEMS; item += WORKERS) {
    PairSums sums;
    const u32 known = before(item);
    const int second = second_inputs(product, item);
#pragma unroll 1
    for (int stage = 0; stage < stages_at(product, item); ++stage) {
      ready(stage);
      const uint4* const weights = ring.next();
      ring.bring();  // into the slot that was read before this one
#pragma unroll
      for (int i = 0; i < STAGE; ++i) {
        const int piece = stage * STAGE + i;
        if (Product::PIECES % STAGE && piece >= Product::PIECES) break;
        sums.add(factor(piece), weights + i * 32, inputs + piece * 32, second);
      }
    }
    float sum[2];
    sums.reduce(sum);
    finish(item, sum[0], sum[1], known);
  }
}
