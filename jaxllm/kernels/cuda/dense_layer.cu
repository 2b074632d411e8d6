// Whole layers with grouped-query attention and a gated feed-forward for one token, in one launch. Weights stream without
// a stop (row_chain.cuh): while blocks tell one another the results of a product, the rows of the next are on their way,
// and while attention, which is little work in many steps, is done on a few multiprocessors, those of the output product
// come to all.
//
// Who needs a number looks until it is told (grid.cuh). Only the parts of a long context are behind a barrier.
//
// Macros: LAYERS; WIDTH FFN of the model; HEADS of queries; KV heads; HEAD_DIM; O tokens of a page; NORM_HEADS 1: queries
// and keys have norms; QKV_BIAS 1: queries, keys and values have biases; EPS GATED (one_token.cuh); SCALE_QK on q.k; ALONE:
// units for each warp up to which a KV head is one block's; those of row_chain.cuh; LAYER_PARAMETERS: POINTERS parameters
// for each layer, p0 and so on; EACH_POINTER: P(0) P(1) and so on of these; POOL_PARAMETERS: one without a name for each.
#include "row_chain.cuh"
#include "token_attention.cuh"

// By all threads: COUNT bf16 that others tell in pairs, to shared memory, where nobody reads any more before.
template <int COUNT>
DEVICE void fetch_pairs(uint4* inputs, const u32* words) {
  constexpr int EACH = (COUNT / 8 + THREADS - 1) / THREADS, AT_ONCE = EACH < 8 ? EACH : 8;
  constexpr int TURNS = (EACH + AT_ONCE - 1) / AT_ONCE;
#pragma unroll 1
  for (int turn = TURNS - 1; turn >= 0; --turn) {
    const int at = turn * AT_ONCE * THREADS + threadIdx.x;
    uint4 x[AT_ONCE];
    collect_pairs(x, [&](int i) { return words + 4 * min(at + i * THREADS, COUNT / 8 - 1); });
    if (turn == TURNS - 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (at + i * THREADS < COUNT / 8) inputs[at + i * THREADS] = x[i];
  }
  __syncthreads();
}

// By all threads: what a norm makes of the residual stream that others tell in pairs, to shared memory.
DEVICE void fetch_normed(uint4* inputs, float* squares, const u32* words, const NormWeight& weight) {
  constexpr int EACH = NormWeight::EACH;
  uint4 x[EACH];
  collect_pairs(x, [&](int i) { return words + 4 * min((int)threadIdx.x + i * THREADS, WIDTH / 8 - 1); });
#pragma unroll
  for (int i = 0; i < EACH; ++i)
    if (threadIdx.x + i * THREADS >= WIDTH / 8) x[i] = make_uint4(0, 0, 0, 0);
  normed_to(inputs, squares, x, weight);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_layer(
    const u16* __restrict__ x,         // [WIDTH], the residual stream
    const float* __restrict__ cosine,  // [H / 2]
    const float* __restrict__ sine,    // [H / 2]
    const int* __restrict__ page,      // [1], where the token's key and value go
    const int* __restrict__ slot,      // [1]
    const int* __restrict__ pages,     // [W]
    const int* __restrict__ position,  // [1]
    LAYER_PARAMETERS,                  // of each layer, see dense_layer.cuh
    const u32*,                        // `words`, which begin as zeros
    u16* out,                          // [WIDTH], the residual stream after the layers
    float* found,                      // [BLOCKS, GROUP, H], parts of a long context
    float* sums,                       // [BLOCKS, GROUP, 2]
    u32* words,                        // [LAYERS, TOLD_END], what blocks tell one another
    u32* times,                        // of timeline.cuh, of the last layer
    POOL_PARAMETERS                    // of each layer, written in place
) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  float* const squares = (float*)(shared + SQUARES_AT);
  const void** const pointers = (const void**)(shared + POINTERS_AT);
  const Timeline timeline = {times};
  timeline.mark(0);
  timeline.mark_end(0);
  const StreamPart start(x);
#define P(i) \
  if (threadIdx.x == (i) % THREADS) pointers[i] = p##i;
  EACH_POINTER
#undef P
  const int tokens = max(__ldg(position) + 1, 0), units = (tokens + UNIT - 1) / UNIT;
  const int parts = units <= WARPS * ALONE ? 1 : min(PARTS, (units + WARPS * 2 - 1) / (WARPS * 2));
  const int part = blockIdx.x / KV;
  __syncthreads();

  // What all wait for first goes before the copies, or it would come after them.
  const NormWeight first_weight((const float*)pointers[NORM_AT]);
  Chain chain(pointers, words, (int*)(shared + QUEUES_AT), shared);
  start.norm(inputs, squares, first_weight);

#pragma unroll 1
  for (int layer = 0; layer < LAYERS; ++layer) {
    const void* const* const of_layer = pointers + layer * POINTERS;
    u32* const told = words + (size_t)layer * TOLD_END;
    u16* const pool = (u16*)of_layer[POOL_AT];
    timeline.mark(1);
    if (part < parts) prefetch_pages(pages, pool, tokens, part, parts);
    // Keys and values of a block that attends alone are not to come after rows of the output product.
    const bool alone = parts == 1 && part == 0;
    if (alone) chain.hold = 4 * layer + Output::KIND;
    const u32* const bias = (const u32*)of_layer[BIAS_AT];
    auto bias_of = [&](int item) { return QKV_BIAS ? __ldg(bias + item) : 0u; };
    multiply<Qkv>(chain, layer, inputs, bias_of, [&](int item, float a, float b, u32 known) {
      const u32 two = QKV_BIAS ? pack_bf16(a + low_of(known), b + high_of(known)) : pack_bf16(a, b);
      if (lane == 0) tell(told + TOLD_QKV + 2 * item, words_of(two));
    });
    timeline.mark(2);

    chain.hold = 4 * LAYERS;
    if (!alone) chain.fill();
    if (part < parts)
      attend(shared, told, (const float*)of_layer[Q_NORM_AT], (const float*)of_layer[K_NORM_AT], cosine, sine, page, slot,
             pages, pool, found, sums, tokens, part, parts, timeline);
    else timeline.mark(3);
    timeline.mark(4);
    if (parts > 1) {
      grid_sync((int*)told, 1, BLOCKS, THREADS);
      merge(found, sums, told, parts);
    }
    timeline.mark(5);
    // What does not depend on anything is there before it is wanted.
    const NormWeight mlp_weight((const float*)of_layer[MLP_NORM_AT]);
    chain.fill();
    wait_for_told(told + TOLD_HEADS);
    fetch_told<ATTENDED>(inputs, told + TOLD_HEADS);
    timeline.mark(6);
    auto stream_of = [&](int item) {
      return layer ? ~__ldcg(told - TOLD_END + TOLD_OUT + item) : __ldg((const u32*)x + item);
    };
    multiply<Output>(chain, layer, inputs, stream_of, [&](int item, float a, float b, u32 known) {
      if (lane == 0) tell(told + TOLD_STREAM + item, ~pack_bf16(low_of(known) + a, high_of(known) + b));
    });
    timeline.mark(7);
    chain.fill();

    fetch_normed(inputs, squares, told + TOLD_STREAM, mlp_weight);
    timeline.mark(8);
    auto none = [](int) { return 0u; };
    multiply<GateUp>(chain, layer, inputs, none, [&](int item, float gate, float up, u32) {
      if (lane == 0) tell((u16*)(told + TOLD_HIDDEN) + item, (u16)~pack_bf16(activation(gate) * up, 0.f));
    });
    timeline.mark(9);
    const bool last = layer == LAYERS - 1;
    const NormWeight weight((const float*)of_layer[NORM_AT + (last ? 0 : POINTERS)]);
    chain.fill();

    fetch_pairs<FFN>(inputs, told + TOLD_HIDDEN);
    timeline.mark(10);
    auto between = [&](int item) {
      if (Down::HALVES) return ~__ldcg(told + TOLD_STREAM + item / 2) >> item % 2 * 16;
      return ~__ldcg(told + TOLD_STREAM + item);
    };
    multiply<Down>(chain, layer, inputs, between, [&](int item, float a, float b, u32 known) {
      if (lane) return;
      const u32 two = pack_bf16(low_of(known) + a, high_of(known) + b);
      if (Down::HALVES && last) out[item] = (u16)two;
      else if (Down::HALVES) tell((u16*)(told + TOLD_OUT) + item, (u16)~two);
      else if (last) ((u32*)out)[item] = two;
      else tell(told + TOLD_OUT + item, ~two);
    });
    timeline.mark(11);
    timeline.mark_end(1);
    if (last) break;
    chain.fill();
    timeline.mark(0);
    timeline.mark_end(0);
    fetch_normed(inputs, squares, told + TOLD_OUT, weight);
  }
  cp_async_wait<0>();
}
