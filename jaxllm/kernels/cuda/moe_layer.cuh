// What the parts of moe_layer.cu share: sizes, where things lie in shared memory, and where blocks tell one another what.
#pragma once
#include "cluster.cuh"
#include "moe_token.cuh"

constexpr int H = 128, GROUP = HEADS / KV, UNIT = 16, PARTS = BLOCKS / KV;
constexpr int QKV_ROWS = (HEADS + 2 * KV) * H;
// Shared memory after that of moe_token.cuh: queries [GROUP, WIDE], the warps' results [WARPS, GROUP, WIDE], their maxima and
// sums [WARPS, GROUP, 2].
constexpr int WIDE = H + 8;  // of a row, so that the rows of a product lie in different banks
constexpr int QUERIES_AT = (SHARED_END + 15) / 16 * 16, RESULTS_AT = QUERIES_AT + GROUP * WIDE * 2;
constexpr int SUMS_AT = RESULTS_AT + WARPS * GROUP * WIDE * 4, NEW_AT = SUMS_AT + WARPS * GROUP * 8;
// What blocks tell one another (grid.cuh): the barrier's words, and then numbers in bf16; scores are floats, in halves.
constexpr int TOLD_QKV = (BLOCKS + 3) / 4 * 4, TOLD_HEADS = TOLD_QKV + QKV_ROWS, TOLD_STREAM = TOLD_HEADS + ATTENDED;
constexpr int TOLD_HIDDEN = TOLD_STREAM + WIDTH, TOLD_SCORES = TOLD_HIDDEN + CHOSEN * FFN;
constexpr int shares_of(int most) { return most >= 32 ? 32 : most >= 2 ? 2 * shares_of(most / 2) : 1; }
static_assert(SIGMOID || !BIAS, "a choice by probabilities and a bias");
constexpr int ROUTED = (EXPERTS + BLOCKS - 1) / BLOCKS;  // experts whose score is this block's
static_assert(WARPS > 1 && ROUTED * WARPS * 4 + 16 + EXPERTS * 8 + 32 <= WARPS * GROUP * WIDE * 4, "shared memory");
static_assert(HEADS % KV == 0 && GROUP <= 8 && O % UNIT == 0 && PARTS > 0 && ATTENDED == HEADS * H, "sizes");
