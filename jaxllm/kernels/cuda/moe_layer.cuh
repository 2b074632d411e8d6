// What the parts of moe_layers.cu share: sizes, where things lie in shared memory, and where blocks tell one another what.
#pragma once
#include "cluster.cuh"
#include "moe_token.cuh"

constexpr int H = 128, GROUP = HEADS / KV, UNIT = 16, PARTS = BLOCKS / KV;
constexpr int QKV_ROWS = (HEADS + 2 * KV) * H;
// Shared memory after that of moe_token.cuh: queries [GROUP, WIDE], the warps' results [WARPS, GROUP, WIDE], their maxima and
// sums [WARPS, GROUP, 2], the token's key and value, and a layer's arrays. Where results were, the choice of experts has the
// warps' parts of scores [WARPS, 32 PER_LANE].
constexpr int WIDE = H + 8;  // of a row, so that the rows of a product lie in different banks
constexpr int QUERIES_AT = (SHARED_END + 15) / 16 * 16, RESULTS_AT = QUERIES_AT + GROUP * WIDE * 2;
constexpr int SUMS_AT = RESULTS_AT + larger(WARPS * GROUP * WIDE * 4, WARPS * PER_LANE * 128);
constexpr int NEW_AT = SUMS_AT + WARPS * GROUP * 8, TABLE_AT = NEW_AT + 2 * H * 2;
// What blocks tell one another (grid.cuh): the barrier's words, and then numbers in bf16.
constexpr int TOLD_QKV = (BLOCKS + 3) / 4 * 4, TOLD_HEADS = TOLD_QKV + QKV_ROWS, TOLD_STREAM = TOLD_HEADS + ATTENDED;
constexpr int TOLD_HIDDEN = TOLD_STREAM + WIDTH, TOLD_NEXT = TOLD_HIDDEN + CHOSEN * FFN;
constexpr int TOLD_PREDICTED = TOLD_NEXT + WIDTH;  // and a word for each expert
// Sums of scores, four of them in 128 bytes: many blocks add to them at once.
constexpr int ALL_SUMS = (EXPERTS + 3) / 4 * 16;
DEVICE int sum_at(int expert) { return expert / 4 * 16 + expert % 4; }
static_assert(SIGMOID || !BIAS, "a choice by probabilities and a bias");
static_assert(WARPS > 1 && BLOCKS < 256, "blocks that a sum can count");
static_assert(HEADS % KV == 0 && GROUP <= 8 && O % UNIT == 0 && PARTS > 0 && ATTENDED == HEADS * H, "sizes");
