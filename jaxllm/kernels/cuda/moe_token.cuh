// The half of a layer that has its experts, for one token: RMSNorm, router and choice, the chosen experts' gate and up, and
// their way down with weights and residual, by the blocks of a grid that wait for one another (grid.cuh) and bring what
// comes next meanwhile (row_pairs.cuh).
//
// Macros:
//   WIDTH FFN    of the model, and of an expert
//   ATTENDED     inputs of the output product of attention; 0: there is none
//   EPS          of the norm
//   GATED        1: silu(gate) * up; 2: gelu with tanh
//   BLOCKS WARPS SLOTS   of row_pairs.cuh; and EXPERTS, CHOSEN, SIGMOID, BIAS, NORMALISE, SCALE of choice.cuh
#pragma once
#include "choice.cuh"
#include "one_token.cuh"

// Shared memory: the rings, inputs of a product, what each warp knows of the choice, sums of squares.
constexpr int MOST = larger(ATTENDED, larger(WIDTH, CHOSEN * FFN));
constexpr int INPUTS_AT = RINGS, CHOICE_AT = INPUTS_AT + MOST * 2, SQUARES_AT = CHOICE_AT + WARPS * CHOSEN * 8;
constexpr int SHARED_END = SQUARES_AT + WARPS * 4;
constexpr int OF_EXPERT = FFN / PIECE;  // pieces
static_assert(WIDTH % PIECE == 0 && FFN % PIECE == 0 && ATTENDED % PIECE == 0, "sizes");

struct Output {
  static constexpr int ITEMS = ATTENDED ? WIDTH / 2 : 0, PIECES = ATTENDED ? ATTENDED / PIECE : 1;
  const u16* weight;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)(2 * item + row) * ATTENDED; }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
struct Route {
  static constexpr int ITEMS = (EXPERTS + 1) / 2, PIECES = WIDTH / PIECE;
  const u16* weight;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)min(2 * item + row, EXPERTS - 1) * WIDTH; }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
struct GateUp {
  static constexpr int ITEMS = CHOSEN * FFN, PIECES = WIDTH / PIECE;
  const u16* weight;
  const int* chosen;
  DEVICE const u16* start(int item, int row) const {
    return weight + ((size_t)chosen[item / FFN] * (2 * FFN) + row * FFN + item % FFN) * WIDTH;
  }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
struct Down {
  static constexpr int ITEMS = WIDTH / 2, PIECES = CHOSEN * OF_EXPERT;
  const u16* weight;
  const int* chosen;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)(2 * item + row) * FFN; }
  DEVICE size_t offset(int piece) const {
    return (size_t)chosen[piece / OF_EXPERT] * WIDTH * FFN + piece % OF_EXPERT * PIECE;
  }
};

// No product: after the last one of a ring.
struct Nothing {
  static constexpr int ITEMS = 0, PIECES = 1;
  DEVICE const u16* start(int, int) const { return nullptr; }
  DEVICE size_t offset(int) const { return 0; }
};

// By all threads: what the norm makes of the residual stream, to shared memory.
DEVICE void fetch_normed(u8* shared, const u16* stream, const NormWeight& weight) {
  constexpr int EACH = NormWeight::EACH;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  float* const squares = (float*)(shared + SQUARES_AT);
  uint4 x[EACH];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = threadIdx.x + i * THREADS;
    x[i] = at < WIDTH / 8 ? __ldcg((const uint4*)stream + at) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) sum += square(x[i].x) + square(x[i].y) + square(x[i].z) + square(x[i].w);
#pragma unroll
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += squares[w];
  const float by = rsqrtf(sum / WIDTH + EPS);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = threadIdx.x + i * THREADS;
    const float4 a = weight.low[i], b = weight.high[i];
    if (at < WIDTH / 8)
      inputs[at] = make_uint4(scaled(x[i].x, by * a.x, by * a.y), scaled(x[i].y, by * a.z, by * a.w),
                              scaled(x[i].z, by * b.x, by * b.y), scaled(x[i].w, by * b.z, by * b.w));
  }
  __syncthreads();
}

// What a product that ends in the residual stream does with its sums; before: two numbers of the stream.
DEVICE void add_to_stream(u16* to, int item, float a, float b, u32 before) {
  if (threadIdx.x % 32 == 0) ((u32*)to)[item] = pack_bf16(low_of(before) + a, high_of(before) + b);
}

// From the stream after attention, which all blocks see, to `out`. ring: has the router's rows. number: of the barriers
// that were before.
template <class Source>
DEVICE void through_experts(
    u8* shared, Source& ring, const Route& route, const u16* stream, const NormWeight& norm, const float* bias,
    const u16* gate_up, const u16* down, u16* out, float* logits, u16* hidden, int* words, int number,
    const Timeline& timeline
) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  int* const chosen = (int*)(shared + CHOICE_AT) + warp * 2 * CHOSEN;
  float* const weights = (float*)chosen + CHOSEN;
  auto one = [](int) { return 1.f; };
  auto none = [](int) { return 0u; };
  fetch_normed(shared, stream, norm);
  timeline.mark(9);
  multiply(route, ring, inputs, one, none, [&](int item, float a, float b, u32) {
    if (lane) return;
    logits[2 * item] = a;
    if (2 * item + 1 < EXPERTS) logits[2 * item + 1] = b;
  });
  timeline.mark(10);
  grid_sync(words, number + 1, BLOCKS, THREADS);
  timeline.mark(11);
  float score[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) score[i] = __ldcg(logits + min(i * 32 + lane, EXPERTS - 1));
  choose(score, bias, lane, chosen, weights);  // each warp for itself
  __syncwarp();
  timeline.mark(12);

  const GateUp first = {gate_up, chosen};
  const Down second = {down, chosen};
  Ring<GateUp, Down> of_experts(first, second, shared);
  multiply(first, of_experts, inputs, one, none, [&](int item, float gate, float up, u32) {
    if (lane == 0) hidden[item] = (u16)pack_bf16(activation(gate) * up, 0.f);
  });
  timeline.mark(13);
  grid_sync(words, number + 2, BLOCKS, THREADS);
  timeline.mark(14);
  fetch_inputs<CHOSEN * FFN>(inputs, hidden);
  timeline.mark(15);
  auto weight = [&](int piece) { return weights[piece / OF_EXPERT]; };
  auto before = [&](int item) { return __ldcg((const u32*)stream + item); };
  multiply(second, of_experts, inputs, weight, before, [&](int item, float a, float b, u32 known) {
    add_to_stream(out, item, a, b, known);
  });
  timeline.mark(16);
  timeline.mark_end(1);
  cp_async_wait<0>();
}
