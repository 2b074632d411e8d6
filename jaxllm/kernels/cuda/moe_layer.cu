// A whole layer with grouped-query attention and experts for one token, in one launch: what moe_token.cu does for the
// second half, from RMSNorm and the queries, keys and values on. While attention, which is little work in many steps that
// wait for one another, is under way on a few multiprocessors, the rows of the output product come to all.
//
// Blocks tell one another numbers with marks (grid.cuh), in place of barriers: who needs a number looks until it is there.
// Only the parts of a long context are behind a barrier.
//
// Macros: those of moe_token.cuh with ATTENDED = HEADS * H; HEADS of queries; KV heads; H head dim, 128; O tokens of a
// page; NORM_HEADS 1: queries and keys have norms; SCALE_QK on q.k; ALONE: units for each warp up to which a KV head is one
// block's; AHEAD: rows, an even number, of the next layer's queries, keys and values that the second-level cache fetches.
#include "moe_layer.cuh"
#include "token_attention.cuh"
#include "token_experts.cuh"

// Rows that are no whole round of pairs for all warps come one by one, if there is one for each warp at most.
struct Qkv {
  static constexpr int PIECES = WIDTH / PIECE, ROUNDS = QKV_ROWS / 2 / WORKERS * WORKERS, REST_OF = QKV_ROWS - 2 * ROUNDS;
  static constexpr bool SINGLE = REST_OF <= WORKERS && PIECES % (2 * STAGE) == 0;
  static constexpr int PAIRS = SINGLE ? ROUNDS : QKV_ROWS / 2, ITEMS = PAIRS + (QKV_ROWS - 2 * PAIRS);
  const u16* weight;
  DEVICE const u16* start(int item, int row) const {
    return weight + (item < PAIRS ? (size_t)(2 * item + row) * WIDTH : (size_t)(PAIRS + item) * WIDTH + row * (WIDTH / 2));
  }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
DEVICE int stages_at(const Qkv&, int item) { return stages_of<Qkv>() / (item < Qkv::PAIRS ? 1 : 2); }
DEVICE int second_inputs(const Qkv&, int item) { return item < Qkv::PAIRS ? 0 : WIDTH / 16; }

// Lets the second-level cache fetch the first AHEAD rows, while the memory has nothing to do. number: of this one of so
// many blocks.
DEVICE void prefetch_rows(const u16* rows, int number, int blocks) {
  for (int row = (threadIdx.x * blocks + number) * 2; row < AHEAD; row += THREADS * blocks * 2)
    prefetch(rows + (size_t)row * WIDTH, 2 * WIDTH * 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_layer(
    const u16* __restrict__ x,            // [WIDTH], the residual stream
    const float* __restrict__ first_norm, // [WIDTH]
    const u16* __restrict__ qkv_weight,   // [QKV_ROWS, WIDTH]
    const float* __restrict__ q_norm,     // [H]
    const float* __restrict__ k_norm,     // [H]
    const float* __restrict__ cosine,     // [H / 2]
    const float* __restrict__ sine,       // [H / 2]
    const int* __restrict__ page,         // [1], where the token's key and value go
    const int* __restrict__ slot,         // [1]
    const int* __restrict__ pages,        // [W]
    const int* __restrict__ position,     // [1]
    const u16*,                           // the pool, which is written in place
    const u16* __restrict__ output,       // [WIDTH, ATTENDED]
    const float* __restrict__ norm,       // [WIDTH]
    const u16* __restrict__ router,       // [EXPERTS, WIDTH]
    const float* __restrict__ bias,       // [EXPERTS]
    const u16* __restrict__ gate_up,      // [EXPERTS, 2 FFN, WIDTH]
    const u16* __restrict__ down,         // [EXPERTS, WIDTH, FFN]
    const u16* __restrict__ upcoming,     // [QKV_ROWS, WIDTH], of the layer after this one, or anything
    const u32*,                           // `words`, which begin as zeros
    u16* out,                             // [WIDTH], the residual stream after the layer
    u16* pool,                            // [P, 2, KV, O, H]
    float* found,                         // [BLOCKS, GROUP, H], parts of a long context
    float* sums,                          // [BLOCKS, GROUP, 2]
    u32* words,                           // what blocks tell one another, and of their barrier
    u32* times                            // of timeline.cuh
) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  auto one = [](int) { return 1.f; };
  auto none = [](int) { return 0u; };
  const Timeline timeline = {times};
  timeline.mark(0);
  timeline.mark_end(0);
  const Qkv first = {qkv_weight};
  const Output second = {output};
  // What all wait for first goes before the copies, or it would come after them.
  const NormWeight first_weight(first_norm);
  StreamPart start(x);
  Ring<Qkv, Output> ring(first, second, shared);
  const int tokens = max(__ldg(position) + 1, 0), units = (tokens + UNIT - 1) / UNIT;
  const int parts = units <= WARPS * ALONE ? 1 : min(PARTS, (units + WARPS * 2 - 1) / (WARPS * 2));
  const int part = blockIdx.x / KV;
  if (part < parts) prefetch_pages(pages, pool, tokens, part, parts);
  start.norm(inputs, (float*)(shared + SQUARES_AT), first_weight);
  timeline.mark(1);
  multiply(first, ring, inputs, one, none, [&](int item, float a, float b, u32) {
    if (lane) return;
    if (item < Qkv::PAIRS) tell(words + TOLD_QKV + 2 * item, words_of(pack_bf16(a, b)));
    else tell(words + TOLD_QKV + Qkv::PAIRS + item, pack_bf16(a + b, 0.f) & 0xffff | TOLD);
  });
  timeline.mark(2);
  ring.fill();

  if (part < parts)
    attend(shared, words, q_norm, k_norm, cosine, sine, page, slot, pages, pool, found, sums, tokens, part, parts, timeline);
  else timeline.mark(3);
  timeline.mark(4);
  if (parts > 1) {
    grid_sync((int*)words, 1, BLOCKS, THREADS);
    merge(found, sums, words, parts);
  }
  timeline.mark(5);

  if (AHEAD && part >= parts) prefetch_rows(upcoming, blockIdx.x - parts * KV, BLOCKS - parts * KV);
  // What does not depend on anything is there before the heads are.
  const NormWeight weight(norm);
  uint4 route[ROUTED][NormWeight::EACH];
#pragma unroll
  for (int r = 0; r < ROUTED; ++r)
#pragma unroll
    for (int i = 0; i < NormWeight::EACH; ++i)
      route[r][i] = load_streamed(
          router + (size_t)min((int)blockIdx.x + r * BLOCKS, EXPERTS - 1) * WIDTH +
          8 * min((int)threadIdx.x + i * THREADS, WIDTH / 8 - 1)
      );
  const int mine = threadIdx.x / 32 * BLOCKS + blockIdx.x;  // the warp's first item
  const u32 stream_of_mine = __ldcg((const u32*)x + min(mine, WIDTH / 2 - 1));
  fetch_told<ATTENDED>(inputs, words + TOLD_HEADS);
  timeline.mark(6);
  auto before = [&](int item) { return item == mine ? stream_of_mine : __ldcg((const u32*)x + item); };
  multiply<SLOTS - 1>(second, ring, inputs, one, before, [&](int item, float a, float b, u32 known) {
    if (lane == 0) tell(words + TOLD_STREAM + 2 * item, words_of(pack_bf16(low_of(known) + a, high_of(known) + b)));
  });
  timeline.mark(7);

  score_experts(shared, words, weight, route, timeline);
  int* const chosen = (int*)(shared + CHOICE_AT);
  float* const weights = (float*)chosen + CHOSEN;
  choose_by_block(shared, words, bias, chosen, weights, timeline);
  timeline.mark(12);

  const GateUp third = {gate_up, chosen};
  const Down fourth = {down, chosen};
  Ring<GateUp, Down> of_experts(third, fourth, shared);
  float* const own_weights = weights + CHOSEN + threadIdx.x / 32 * CHOSEN;  // of this warp
  const float weight_here = weigh_expert(shared, weights);                  // while they come
  if (lane < CHOSEN) own_weights[lane] = weight_here;
  __syncwarp();
  multiply(third, of_experts, inputs, one, none, [&](int item, float gate, float up, u32) {
    if (lane == 0) tell(words + TOLD_HIDDEN + item, pack_bf16(activation(gate) * up, 0.f) & 0xffff | TOLD);
  });
  timeline.mark(13);
  of_experts.fill();
  auto between = [&](int item) {  // all is told since the experts were scored
    uint2 two;
    look(words + TOLD_STREAM + 2 * item, two);
    return two_of(two);
  };
  const u32 between_of_mine = between(min(mine, WIDTH / 2 - 1));
  fetch_told<CHOSEN * FFN>(inputs, words + TOLD_HIDDEN);
  timeline.mark(14);
  auto weight_of = [&](int piece) { return own_weights[piece / OF_EXPERT]; };
  auto after = [&](int item) { return item == mine ? between_of_mine : between(item); };
  multiply<SLOTS - 1>(fourth, of_experts, inputs, weight_of, after, [&](int item, float a, float b, u32 known) {
    add_to_stream(out, item, a, b, known);
  });
  timeline.mark(15);
  timeline.mark_end(1);
  cp_async_wait<0>();
}
