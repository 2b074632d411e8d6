// Layers with grouped-query attention and experts for one token, LAYERS of them in one launch.
//
// At one token every weight is read once and nothing is computed twice, so a layer is the time of its bytes plus what
// passes between them. Kernels that follow one another begin and end, 3 us each, and find their instructions in no cache;
// here blocks stay, one on each multiprocessor, while the copies of what comes next go on (row_pairs.cuh): with the end of a
// layer come the first rows of the next one, and before the experts are chosen those of which the stream before attention says
// that they will be (token_prediction.cuh).
//
// Blocks tell one another numbers with marks (grid.cuh), in place of barriers: who needs a number looks until it is there.
// A mark is the layer's number, so all layers use the same words: a block tells something of a layer only after all blocks
// have told their part of the stream before it, when they have read all of the layer before. Scores of experts are sums of
// what all blocks have. Only the parts of a long context are behind a barrier.
//
// Macros: those of moe_token.cuh with ATTENDED = HEADS * H; HEADS of queries; KV heads; H head dim, 128; O tokens of a
// page; NORM_HEADS 1: queries and keys have norms; SCALE_QK on q.k; ALONE: units for each warp up to which a KV head is one
// block's.
// IDLE KV: a block for each KV head does nothing but attention, which all wait for.
// LAYERS and, for each of them, what the kernel takes: LAYER_PARAMETERS and POOL_PARAMETERS are parameters, pointers to the
// arrays of `Layer` and to the pool, which FILL_TABLE writes to a `table` of Layer.
#include "moe_layer.cuh"
#include "token_attention.cuh"
#include "token_experts.cuh"

struct Layer {
  const float* norm;     // [WIDTH]
  const u16* qkv;        // [QKV_ROWS, WIDTH]
  const float* q_norm;   // [H]
  const float* k_norm;   // [H]
  const u16* output;     // [WIDTH, ATTENDED]
  const float* mlp_norm; // [WIDTH]
  const u16* router;     // [EXPERTS, WIDTH]
  const float* bias;     // [EXPERTS]
  const u16* gate_up;    // [EXPERTS, 2 FFN, WIDTH]
  const u16* down;       // [EXPERTS, WIDTH, FFN]
  u16* pool;             // [P, 2, KV, O, H], which is written in place
};
static_assert(TABLE_AT % 8 == 0, "a table of pointers");

// Rows that are no whole round of pairs for all warps come one by one, if there is one for each warp at most.
struct Qkv {
  static constexpr int PIECES = WIDTH / PIECE, RUN = PIECES, ROUNDS = QKV_ROWS / 2 / WORKERS * WORKERS, REST_OF = QKV_ROWS - 2 * ROUNDS;
  static constexpr bool SINGLE = REST_OF <= WORKERS && PIECES % (2 * STAGE) == 0;
  static constexpr int PAIRS = SINGLE ? ROUNDS : QKV_ROWS / 2, ITEMS = PAIRS + (QKV_ROWS - 2 * PAIRS);
  const u16* weight;
  int items;  // to copy
  DEVICE const u16* start(int item, int row) const {
    return weight + (item < PAIRS ? (size_t)(2 * item + row) * WIDTH : (size_t)(PAIRS + item) * WIDTH + row * (WIDTH / 2));
  }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
DEVICE int stages_at(const Qkv&, int item) { return stages_of<Qkv>() / (item < Qkv::PAIRS ? 1 : 2); }
DEVICE int items_of(const Qkv& product) { return product.items; }
DEVICE int second_inputs(const Qkv&, int item) { return item < Qkv::PAIRS ? 0 : WIDTH / 16; }
extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_layers(
    const u16* __restrict__ x,         // [WIDTH], the residual stream
    const float* __restrict__ cosine,  // [H / 2]
    const float* __restrict__ sine,    // [H / 2]
    const int* __restrict__ page,      // [1], where the token's keys and values go
    const int* __restrict__ slot,      // [1]
    const int* __restrict__ pages,     // [W]
    const int* __restrict__ position,  // [1]
    LAYER_PARAMETERS,
    const u32*,    // `words`, which begin as zeros
    const u64*,    // `scores`, which begin as zeros
    u16* out,      // [WIDTH], the residual stream after the layers
    POOL_PARAMETERS,
    float* found,  // [BLOCKS, GROUP, H], parts of a long context
    float* sums,   // [BLOCKS, GROUP, 2]
    u32* words,    // what blocks tell one another, and of their barrier
    u64* scores,   // [LAYERS, ALL_SUMS], sums of all blocks
    u32* times     // [LAYERS], of timeline.cuh
) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  const uint4* const normed = (const uint4*)(shared + NORMED_AT);
  const u32* const stream = (const u32*)(shared + STREAM_AT);
  Layer* const table = (Layer*)(shared + TABLE_AT);
  FILL_TABLE
  RingPlace::make_barriers(shared);
  Stream of_stream;
  of_stream.load(x);
  const int tokens = max(__ldg(position) + 1, 0), units = (tokens + UNIT - 1) / UNIT;
  const int parts = units <= WARPS * ALONE ? 1 : min(PARTS, (units + WARPS * 2 - 1) / (WARPS * 2));
  const int part = blockIdx.x / KV;
  auto one = [](int) { return 1.f; };
  auto none = [](int) { return 0u; };
  auto before = [&](int item) { return stream[item]; };
  __syncthreads();
  // Blocks of attention alone: what they do again and again is little enough for the caches of instructions.
  if ((int)blockIdx.x < IDLE && parts == 1) {
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer) {
      const Layer& of = table[layer];
      const Timeline timeline = {times + layer * (BLOCKS * WARPS * MARKS)};
      timeline.mark_end(0);
      for (int i = 0; i < 3; ++i) timeline.mark(i);
      prefetch_pages(pages, of.pool, tokens, part, parts);
      copy_units(shared, pages, of.pool, tokens, part, parts);
      attend(shared, words, of.q_norm, of.k_norm, cosine, sine, page, slot, pages, of.pool, found, sums, tokens, part, parts,
             timeline, TOLD * (layer + 1));
      for (int i = 6; i < 16; ++i) timeline.mark(i);  // attend has marked units and the end of them all
      timeline.mark_end(1);
    }
    return;
  }
  RingPlace place(shared);
  {
    const Qkv nothing = {table->qkv, 0}, qkv = {table->qkv, Qkv::ITEMS};
    Ring<Qkv, Qkv> ring(nothing, qkv, place);  // as at the end of a layer before
    ring.most = ring.later = SLOTS - 1;
    ring.top();
    place = ring;
  }

#pragma unroll 1
  for (int layer = 0; layer < LAYERS; ++layer) {
    const Layer& of = table[layer];
    const u32 mark = TOLD * (layer + 1);
    const bool last = layer == LAYERS - 1;
    const Timeline timeline = {times + layer * (BLOCKS * WARPS * MARKS)};
    timeline.mark(0);
    timeline.mark_end(0);
    const NormWeight first_weight(of.norm);
    // What comes from memory for the middle of the layer is there before much else is on its way.
    const NormWeight weight(of.mlp_norm);
    Scores of_experts(of.router, of.mlp_norm);
    const Prediction prediction(of.router);
    if (part < parts) prefetch_pages(pages, of.pool, tokens, part, parts);
    if (ROOM && (int)blockIdx.x < IDLE) copy_units(shared, pages, of.pool, tokens, part, parts);
    const Qkv qkv = {of.qkv, Qkv::ITEMS};
    const Output output = {of.output};
    Ring<Qkv, Output> ring(qkv, output, place);
    if (layer) of_stream.wait(words + TOLD_NEXT, mark - TOLD, copying(ring));
    timeline.mark(1);
    ring.later = PACE;
    float score = PREDICTS ? prediction.part(of_stream.x, weight) : 0.f;
    float factor = of_stream.norm<PREDICTS>(shared, first_weight, score);
    if (PREDICTS) prediction.tell_score(words, score * factor, of.bias, mark);
    multiply(qkv, ring, normed, one, none, [&](int item, float a, float b, u32) {
      if (lane) return;
      if (item < Qkv::PAIRS) tell(words + TOLD_QKV + 2 * item, words_of(pack_bf16(a * factor, b * factor), mark));
      else tell(words + TOLD_QKV + Qkv::PAIRS + item, word_of(pack_bf16((a + b) * factor, 0.f), mark));
    });
    timeline.mark(2);

    if (part < parts)
      attend(shared, words, of.q_norm, of.k_norm, cosine, sine, page, slot, pages, of.pool, found, sums, tokens, part, parts,
             timeline, mark);
    else timeline.mark(3);
    timeline.mark(4);
    if (parts > 1) {
      grid_sync((int*)words, layer + 1, BLOCKS, THREADS);
      merge(found, sums, words, parts, mark);
    }
    timeline.mark(5);

    ring.later = SLOTS - 1;
    // Of this warp: the experts in the order in which it multiplies with them, first as they are predicted, and their weights.
    int* const experts_here = (int*)(shared + CHOICE_AT) + threadIdx.x / 32 * 2 * CHOSEN;
    float* const weights_here = (float*)experts_here + CHOSEN;
    if (PREDICTS) predict(words, experts_here, mark);
    fetch_told<ATTENDED, true>(inputs, words + TOLD_HEADS, mark, copying(ring));
    timeline.mark(6);
    multiply(output, ring, inputs, one, before, [&](int item, float a, float b, u32 known) {
      const float x = low_of(known) + a, y = high_of(known) + b;
      if (lane == 0) tell(words + TOLD_STREAM + 2 * item, words_of(pack_bf16(x, y), mark));
      of_experts.add(item, x, y);
    });
    timeline.mark(7);

    const GateUp gate_up = {of.gate_up, experts_here};
    const Down down = {of.down, experts_here};
    place = ring;
    place.begin();
    Ring<GateUp, Down> experts(gate_up, down, place);
    experts.most = GUESS;
    auto guessing = [&] {
      if (PREDICTS) experts.bring_first_paced();
    };
    guessing();

    u64* const of_layer = scores + layer * ALL_SUMS;
    of_experts.tell_all(shared, of_layer);
    timeline.mark(8);
    of_stream.wait(words + TOLD_STREAM, mark, guessing);
    timeline.mark(9);
    factor = of_stream.norm(shared, weight);
    timeline.mark(10);
    guessing();
    float* const scores_here = (float*)(shared + RESULTS_AT);
    collect_scores(scores_here, of_layer, factor, guessing);
    timeline.mark(11);
    const Chosen chosen(scores_here, of.bias);
    timeline.mark(12);

    int at = lane;
    if (PREDICTS) {
      const u32 right = place_experts(experts_here, chosen.expert, at);
      const int begun = experts.on_second ? GateUp::ITEMS : experts.item + (experts.stage ? WORKERS : 0);
      bool all = true;
      for (int item = first_item(); item < begun; item += WORKERS) all = all && right >> item / FFN & 1;
      if (!all) experts.restart();
      __syncwarp();
    }
    if (lane < CHOSEN) experts_here[at] = chosen.expert;
    __syncwarp();
    experts.most = experts.later = DEPTH;
    experts.top();
    const float weight_here = chosen.weight();  // while they come
    if (lane < CHOSEN) weights_here[at] = weight_here;
    __syncwarp();
    multiply(gate_up, experts, normed, one, none, [&](int item, float gate, float up, u32) {
      if (lane == 0) tell(words + TOLD_HIDDEN + item, word_of(pack_bf16(activation(gate * factor) * (up * factor), 0.f), mark));
    });
    timeline.mark(13);
    experts.most = experts.later = SLOTS - 1;
    if (EARLY) fetch_told<EARLY, true>(inputs, words + TOLD_HIDDEN, mark, copying<true>(experts));
    timeline.mark(14);
    auto weight_of = [&](int piece) { return weights_here[piece / OF_EXPERT]; };
    const Qkv next = {table[last ? layer : layer + 1].qkv, last ? 0 : Qkv::ITEMS};
    Ring<Down, Qkv> end(down, next, experts);
    bool waits = true;
    auto ready = [&](int stage) {
      if (!waits || stage * STAGE * PIECE < EARLY) return;
      waits = false;
      fetch_told<CHOSEN * FFN - EARLY, true>(inputs + EARLY / 8, words + TOLD_HIDDEN + EARLY, mark, copying(end));
    };
    multiply(down, end, inputs, weight_of, before, [&](int item, float a, float b, u32 known) {
      const u32 two = pack_bf16(low_of(known) + a, high_of(known) + b);
      if (lane) return;
      if (last) ((u32*)out)[item] = two;
      else tell(words + TOLD_NEXT + 2 * item, words_of(two, mark));
    }, ready);
    ready(Down::PIECES);  // with warps that have nothing to multiply
    place = end;
    timeline.mark(15);
    timeline.mark_end(1);
  }
}
