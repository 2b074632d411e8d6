// What a layer with experts consists of for one token: its products with experts, and what lies where in shared memory.
//
// Macros: those of one_token.cuh and choice.cuh; FFN of an expert; EVEN: rounds of gate and up that are dealt evenly; ATTENDED: inputs of the output product of attention.
#pragma once
#include "choice.cuh"
#include "one_token.cuh"

// Shared memory: the rings, the residual stream as it is and times its norm's weight, inputs of other products, what each warp
// knows of the choice, sums of squares.
constexpr int NORMED_AT = RINGS, STREAM_AT = NORMED_AT + WIDTH * 2, INPUTS_AT = STREAM_AT + WIDTH * 2;
constexpr int CHOICE_AT = INPUTS_AT + larger(ATTENDED, CHOSEN * FFN) * 2, SQUARES_AT = CHOICE_AT + WARPS * CHOSEN * 8;
constexpr int SHARED_END = SQUARES_AT + WARPS * 4;
constexpr int OF_EXPERT = FFN / PIECE;  // pieces
static_assert(WIDTH % PIECE == 0 && FFN % PIECE == 0 && ATTENDED % PIECE == 0, "sizes");

struct Output {
  static constexpr int ITEMS = WIDTH / 2, PIECES = ATTENDED / PIECE;
  const u16* weight;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)(2 * item + row) * ATTENDED; }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
// Multiprocessors are not equally near to memory. After EVEN rounds of items, of which each warp has one, a warp takes the next
// item that nobody has: the warps of a number share a counter, which is asked an item ahead.
constexpr int EVEN_ITEMS = EVEN * WORKERS;
struct Draws {
  static constexpr int ROOM = 8;
  u32* counter;
  int* items;  // [ROOM] of this warp, in shared memory: from the copies to the products
  u32 number;
  int put, taken;

  DEVICE Draws(u32* counters, int* items) : counter(counters + threadIdx.x / 32), items(items), number(0), put(0), taken(0) {
    draw();
  }
  DEVICE void draw() {
    if (EVEN_ITEMS < CHOSEN * FFN && threadIdx.x % 32 == 0 && (int)blockIdx.x >= IDLE) number = draw_number(counter);
  }
};
struct GateUp {
  static constexpr int ITEMS = CHOSEN * FFN, PIECES = WIDTH / PIECE;
  const u16* weight;
  const int* chosen;
  Draws* draws;
  DEVICE const u16* start(int item, int row) const {
    return weight + ((size_t)chosen[item / FFN] * (2 * FFN) + row * FFN + item % FFN) * WIDTH;
  }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
DEVICE int item_to_copy(const GateUp& product, int item) {
  if (EVEN_ITEMS >= GateUp::ITEMS) return item + WORKERS;
  Draws& draws = *product.draws;
  if (item + WORKERS < EVEN_ITEMS) {
    item += WORKERS;
  } else {
    item = EVEN_ITEMS + (int)__shfl_sync(~0u, draws.number, 0) * WARPS + (int)threadIdx.x / 32;
    draws.draw();
  }
  if (threadIdx.x % 32 == 0) draws.items[draws.put % Draws::ROOM] = item;
  ++draws.put;
  return item;
}
DEVICE int item_to_multiply(const GateUp& product, int item) {
  if (EVEN_ITEMS >= GateUp::ITEMS) return item + WORKERS;
  __syncwarp();
  return product.draws->items[product.draws->taken++ % Draws::ROOM];
}
struct Down {
  static constexpr int ITEMS = WIDTH / 2, PIECES = CHOSEN * OF_EXPERT;
  const u16* weight;
  const int* chosen;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)(2 * item + row) * FFN; }
  DEVICE size_t offset(int piece) const {
    return (size_t)chosen[piece / OF_EXPERT] * WIDTH * FFN + piece % OF_EXPERT * PIECE;
  }
};

// Numbers between gate and up and the way down whose stages do not wait for the last ones: those of the rounds of items before
// the last one and a half.
constexpr int EARLY = larger(CHOSEN * FFN - WORKERS * 3 / 2, 0) / (STAGE * PIECE) * (STAGE * PIECE);
