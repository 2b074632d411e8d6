// What the parts of dense_layer.cu share: sizes, where things lie in shared memory, and where blocks tell one another what.
#pragma once
#include "one_token.cuh"

constexpr int H = HEAD_DIM, GROUP = HEADS / KV, UNIT = 16, PARTS = BLOCKS / KV, ATTENDED = HEADS * H;
constexpr int QKV_ROWS = (HEADS + 2 * KV) * H;
static_assert(WIDTH % PIECE == 0 && FFN % PIECE == 0 && ATTENDED % PIECE == 0, "sizes");
static_assert(HEADS % KV == 0 && GROUP <= 8 && O % UNIT == 0 && PARTS > 0, "heads");

// What a layer has: its weights in the order of their products, then the rest.
constexpr int FIRST_WEIGHT = 0, BIAS_AT = 4, NORM_AT = 5, MLP_NORM_AT = 6, Q_NORM_AT = 7, K_NORM_AT = 8, POOL_AT = 9;
constexpr int POINTERS = 10;

// Shared memory: the rings; inputs of a product, and in the same place the warps' results of attention [WARPS, GROUP, WIDE];
// queries [GROUP, WIDE]; maxima and sums [WARPS, GROUP, 2]; the token's key and value; sums of squares; queues of items;
// pointers.
constexpr int WIDE = H + 8;  // of a row, so that the rows of a product lie in different banks
constexpr int INPUTS_AT = RINGS, RESULTS_AT = INPUTS_AT;
constexpr int INPUTS_END = INPUTS_AT + larger(larger(ATTENDED, larger(WIDTH, FFN)) * 2, WARPS * GROUP * WIDE * 4);
constexpr int QUERIES_AT = INPUTS_END, SUMS_AT = QUERIES_AT + GROUP * WIDE * 2, NEW_AT = SUMS_AT + WARPS * GROUP * 8;
constexpr int SQUARES_AT = NEW_AT + 4 * H, QUEUES_AT = SQUARES_AT + WARPS * 4;
constexpr int POINTERS_AT = (QUEUES_AT + WARPS * 8 * 4 + 7) / 8 * 8;

// What blocks tell one another about a layer (grid.cuh): the barrier's words, how many items without an owner
// each product has given away, numbers with marks, and numbers in pairs.
constexpr int TICKETS = (BLOCKS + 3) / 4 * 4, TOLD_QKV = TICKETS + 4, TOLD_HEADS = TOLD_QKV + QKV_ROWS, TOLD_STREAM = TOLD_HEADS + ATTENDED;
constexpr int TOLD_HIDDEN = TOLD_STREAM + WIDTH / 2, TOLD_OUT = TOLD_HIDDEN + FFN / 2, TOLD_END = TOLD_OUT + WIDTH / 2;
