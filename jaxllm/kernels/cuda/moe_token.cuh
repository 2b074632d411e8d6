// What a layer with experts consists of for one token: its products with experts, and what lies where in shared memory.
//
// Macros: those of one_token.cuh and choice.cuh; FFN of an expert; ATTENDED: inputs of the output product of attention.
#pragma once
#include "choice.cuh"
#include "one_token.cuh"

// Shared memory: the rings, the residual stream as it is and times its norm's weight, inputs of other products, what each warp
// knows of the choice, sums of squares.
constexpr int NORMED_AT = RINGS + BARRIERS, STREAM_AT = NORMED_AT + WIDTH * 2, INPUTS_AT = STREAM_AT + WIDTH * 2;
constexpr int CHOICE_AT = INPUTS_AT + larger(ATTENDED, CHOSEN * FFN) * 2, SQUARES_AT = CHOICE_AT + WARPS * CHOSEN * 8;
constexpr int SHARED_END = SQUARES_AT + WARPS * 4;
constexpr int OF_EXPERT = FFN / PIECE;  // pieces
static_assert(WIDTH % PIECE == 0 && FFN % PIECE == 0 && ATTENDED % PIECE == 0, "sizes");

struct Output {
  static constexpr int ITEMS = WIDTH / 2, PIECES = ATTENDED / PIECE, RUN = PIECES;
  const u16* weight;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)(2 * item + row) * ATTENDED; }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
struct GateUp {
  static constexpr int ITEMS = CHOSEN * FFN, PIECES = WIDTH / PIECE, RUN = PIECES;
  const u16* weight;
  const int* chosen;
  DEVICE const u16* start(int item, int row) const {
    return weight + ((size_t)chosen[item / FFN] * (2 * FFN) + row * FFN + item % FFN) * WIDTH;
  }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
struct Down {
  static constexpr int ITEMS = WIDTH / 2, PIECES = CHOSEN * OF_EXPERT, RUN = OF_EXPERT;
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
