// A whole layer with grouped-query attention and experts for one token, in one launch: what moe_token.cu does for the
// second half, from RMSNorm and the queries, keys and values on. While attention, which is little work in many steps that
// wait for one another, is under way on a few multiprocessors, the rows of the output product come to all.
//
// Attention reads pages straight to registers. A unit is 16 tokens of a KV head, with all its query heads, for one warp;
// heads are the rows of products. A contraction may take its numbers in any order as long as both sides take the same, so
// a lane reads 16 consecutive bytes of a key; of values it reads the same 16 bytes of two tokens, and mixes them. A block
// has units of one KV head. A short context is one block's; a long one's parts are merged by one block for each head.
//
// Macros: those of moe_token.cuh with ATTENDED = HEADS * H; HEADS of queries; KV heads; H head dim, 128; O tokens of a
// page; NORM_HEADS 1: queries and keys have norms; SCALE_QK on q.k; ALONE: units for each warp up to which a KV head is one
// block's.
#include "cluster.cuh"
#include "moe_token.cuh"

constexpr int H = 128, GROUP = HEADS / KV, UNIT = 16, PARTS = BLOCKS / KV;
constexpr int QKV_ROWS = (HEADS + 2 * KV) * H;
constexpr float MASKED = -1e30f;
// Shared memory after that of moe_token.cuh: queries [GROUP, H], the warps' results [WARPS, GROUP, H], their maxima and
// sums [WARPS, GROUP, 2].
constexpr int QUERIES_AT = (SHARED_END + 15) / 16 * 16, RESULTS_AT = QUERIES_AT + GROUP * H * 2;
constexpr int SUMS_AT = RESULTS_AT + WARPS * GROUP * H * 4;
static_assert(HEADS % KV == 0 && GROUP <= 8 && O % UNIT == 0 && PARTS > 0 && ATTENDED == HEADS * H, "sizes");

struct Qkv {
  static constexpr int ITEMS = QKV_ROWS / 2, PIECES = WIDTH / PIECE;
  const u16* weight;
  DEVICE const u16* start(int item, int row) const { return weight + (size_t)(2 * item + row) * WIDTH; }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};

// By a warp: a head of the token, normed and rotated where it has to be; `to` may be global memory.
DEVICE void prepare_head(
    const u16* from, u16* to, const float* norm, const float* cosine, const float* sine, bool rotates, float eps
) {
  const int lane = threadIdx.x % 32;
  u32 two[2];
  float x[2][2];
  float2 weight[2] = {}, c = {}, s = {};
  if (rotates) {  // on its way with the head
    c = __ldg((const float2*)cosine + lane);
    s = __ldg((const float2*)sine + lane);
    if (NORM_HEADS)
#pragma unroll
      for (int half = 0; half < 2; ++half) weight[half] = __ldg((const float2*)norm + half * H / 4 + lane);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    two[half] = __ldcg((const u32*)from + half * H / 4 + lane);
    x[half][0] = low_of(two[half]);
    x[half][1] = high_of(two[half]);
  }
  if (rotates) {
    if (NORM_HEADS) {
      float sum = square(two[0]) + square(two[1]);
#pragma unroll
      for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      const float factor = rsqrtf(sum / H + eps);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 normed = pack_bf16(x[half][0] * factor * weight[half].x, x[half][1] * factor * weight[half].y);
        x[half][0] = low_of(normed);
        x[half][1] = high_of(normed);
      }
    }
    const float a[2] = {x[0][0], x[0][1]}, b[2] = {x[1][0], x[1][1]};
    x[0][0] = a[0] * c.x - b[0] * s.x;
    x[0][1] = a[1] * c.y - b[1] * s.y;
    x[1][0] = b[0] * c.x + a[0] * s.x;
    x[1][1] = b[1] * c.y + a[1] * s.y;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) ((u32*)to)[half * H / 4 + lane] = pack_bf16(x[half][0], x[half][1]);
}

// Lets the second-level cache fetch the keys and values of each warp's first units, while queries are made.
DEVICE void prefetch_pages(const int* pages, const u16* pool, int tokens, int part, int parts) {
  const int lane = threadIdx.x % 32, unit = (lane * parts + part) * WARPS + threadIdx.x / 32;
  if (lane >= ALONE || unit * UNIT >= tokens) return;
  const size_t page = __ldg(pages + unit * UNIT / O);
  const u16* const keys = pool + ((page * 2 * KV + blockIdx.x % KV) * O + unit * UNIT % O) * H;
  prefetch(keys, UNIT * H * 2);
  prefetch(keys + (size_t)KV * O * H, UNIT * H * 2);
}

// Attention of a KV head's queries over the units of this block: part `part` of `parts`. Where there are no other parts,
// `attended` gets the result; otherwise `found` [BLOCKS, GROUP, H] and `sums` [BLOCKS, GROUP, 2] get this part of it.
DEVICE void attend(
    u8* shared, const u16* qkv, const float* q_norm, const float* k_norm, const float* cosine, const float* sine,
    const int* page, const int* slot, const int* pages, u16* pool, u16* attended, float* found, float* sums, int tokens,
    int part, int parts
) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int head = blockIdx.x % KV, units = (tokens + UNIT - 1) / UNIT, step = parts * WARPS;
  const int first = part * WARPS + warp;
  u16* const queries = (u16*)(shared + QUERIES_AT);
  float* const results = (float*)(shared + RESULTS_AT);
  float* const of_warps = (float*)(shared + SUMS_AT);
  // A lane has the page of every 32nd unit of the warp.
  auto page_of = [&](int unit) { return unit < units ? __ldg(pages + unit * UNIT / O) : 0; };
  int batch = page_of(first + lane * step);

  // The block with the last unit writes the new key and value, before it reads any.
  const bool writes = units ? (units - 1) / WARPS % parts == part : part == 0;
#pragma unroll 1
  for (int i = warp; i < GROUP + (writes ? 2 : 0); i += WARPS) {
    const bool is_query = i < GROUP, is_key = i == GROUP;
    const int of = is_query ? head * GROUP + i : HEADS + (is_key ? 0 : KV) + head;
    const size_t place = (((size_t)__ldg(page) * 2 + (is_key ? 0 : 1)) * KV + head) * O + __ldg(slot);
    prepare_head(
        qkv + of * H, is_query ? queries + i * H : pool + place * H, is_query ? q_norm : k_norm, cosine, sine,
        is_query || is_key, EPS
    );
  }
  __syncthreads();
  const uint4 zero = make_uint4(0, 0, 0, 0);
  uint4 query[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) query[i] = row < GROUP ? *(const uint4*)(queries + row * H + i * 32 + quarter * 8) : zero;

  float out[2][8][4] = {}, top = MASKED, sum = 0.f;
#pragma unroll 1
  for (int unit = first, turn = 0; unit < units; unit += step, ++turn) {
    if (turn && turn % 32 == 0) batch = page_of(unit + lane * step);
    const int token = unit * UNIT;
    const u16* const keys =
        pool + (((size_t)__shfl_sync(~0u, batch, turn % 32) * 2 * KV + head) * O + token % O) * H;
    const u16* const values = keys + (size_t)KV * O * H;
    uint4 k[2][4], v[4][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) k[n][i] = __ldcg((const uint4*)(keys + (n * 8 + row) * H + i * 32 + quarter * 8));
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int at = quarter * 2 + t % 2 + t / 2 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i)  // what follows the last token may be anything
        v[t][i] = token + at < tokens ? __ldcg((const uint4*)(values + at * H + i * 64 + row * 8)) : zero;
    }
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 low[4] = {query[i].x, 0, query[i].y, 0}, high[4] = {query[i].z, 0, query[i].w, 0};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_bf16(s[n], low, k[n][i].x, k[n][i].y);
        mma_bf16(s[n], high, k[n][i].z, k[n][i].w);
      }
    }
    float high = top;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool visible = token + n * 8 + quarter * 2 + j < tokens;
        s[n][j] = visible ? s[n][j] * (float)(SCALE_QK * 1.4426950408889634) : MASKED;
        high = fmaxf(high, s[n][j]);
      }
    high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
    const float keep = fast_exp2(top - high);
    top = high;
    sum *= keep;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[n][j] = fast_exp2(s[n][j] - high);
        sum += s[n][j];
      }
    const u32 weights[4] = {pack_bf16(s[0][0], s[0][1]), 0, pack_bf16(s[1][0], s[1][1]), 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 of[4][4] = {
          {v[0][i].x, v[0][i].y, v[0][i].z, v[0][i].w},
          {v[1][i].x, v[1][i].y, v[1][i].z, v[1][i].w},
          {v[2][i].x, v[2][i].y, v[2][i].z, v[2][i].w},
          {v[3][i].x, v[3][i].y, v[3][i].z, v[3][i].w},
      };
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const u32 selector = j % 2 ? 0x7632 : 0x5410;
        out[i][j][0] *= keep;
        out[i][j][1] *= keep;
        mma_bf16(out[i][j], weights, select_bytes(of[0][j / 2], of[1][j / 2], selector),
                 select_bytes(of[2][j / 2], of[3][j / 2], selector));
      }
    }
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (row < GROUP) {
    if (quarter == 0) {
      of_warps[(warp * GROUP + row) * 2] = top;
      of_warps[(warp * GROUP + row) * 2 + 1] = sum;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n)
          results[(warp * GROUP + row) * H + i * 64 + (quarter * 2 + n) * 8 + j] = out[i][j][n];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < GROUP * H / 2; at += THREADS) {  // two dims of a head
    const int m = at / (H / 2), dim = at % (H / 2) * 2;
    float most = MASKED, total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, of_warps[(w * GROUP + m) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float by = fast_exp2(of_warps[(w * GROUP + m) * 2] - most);
      const float2 two = *(const float2*)(results + (w * GROUP + m) * H + dim);
      total += of_warps[(w * GROUP + m) * 2 + 1] * by;
      x += two.x * by;
      y += two.y * by;
    }
    if (parts == 1) {
      const float inverse = total > 0.f ? 1.f / total : 0.f;
      *(u32*)(attended + (head * GROUP + m) * H + dim) = pack_bf16(x * inverse, y * inverse);
    } else {
      const size_t of = (size_t)blockIdx.x * GROUP + m;
      *(float2*)(found + of * H + dim) = make_float2(x, y);
      if (dim == 0) *(float2*)(sums + of * 2) = make_float2(most, total);
    }
  }
}

// The parts of the heads that this block merges.
DEVICE void merge(const float* found, const float* sums, u16* attended, int parts) {
  for (int head = blockIdx.x; head < HEADS; head += BLOCKS) {
    const int m = head % GROUP, kv = head / GROUP;
    for (int dim = threadIdx.x; dim < H; dim += THREADS) {
      float most = MASKED, total = 0.f, x = 0.f;
#pragma unroll 8
      for (int part = 0; part < parts; ++part)
        most = fmaxf(most, __ldcg(sums + ((size_t)(part * KV + kv) * GROUP + m) * 2));
#pragma unroll 8
      for (int part = 0; part < parts; ++part) {
        const size_t of = (size_t)(part * KV + kv) * GROUP + m;
        const float by = fast_exp2(__ldcg(sums + of * 2) - most);
        total += __ldcg(sums + of * 2 + 1) * by;
        x += __ldcg(found + of * H + dim) * by;
      }
      attended[head * H + dim] = (u16)pack_bf16(x / total, 0.f);
    }
  }
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
    const int*,                           // `words`, which begin as zeros
    u16* out,                             // [WIDTH], the residual stream after the layer
    u16* pool,                            // [P, 2, KV, O, H]
    u16* qkv,                             // [QKV_ROWS]
    u16* attended,                        // [ATTENDED]
    float* found,                         // [BLOCKS, GROUP, H], parts of a long context
    float* sums,                          // [BLOCKS, GROUP, 2]
    u16* between,                         // [WIDTH], the stream after attention
    float* logits,                        // [EXPERTS]
    u16* hidden,                          // [CHOSEN, FFN]
    int* words,                           // [BLOCKS], of the barrier
    u32* times                            // of timeline.cuh
) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  auto one = [](int) { return 1.f; };
  const Timeline timeline = {times};
  timeline.mark(0);
  timeline.mark_end(0);
  const Qkv first = {qkv_weight};
  const Output second = {output};
  Ring<Qkv, Output> ring(first, second, shared);
  const int tokens = max(__ldg(position) + 1, 0), units = (tokens + UNIT - 1) / UNIT;
  const int parts = units <= WARPS * ALONE ? 1 : min(PARTS, (units + WARPS * 2 - 1) / (WARPS * 2));
  fetch_normed(shared, x, NormWeight(first_norm));
  timeline.mark(1);
  multiply(first, ring, inputs, one, [](int) { return 0u; }, [&](int item, float a, float b, u32) {
    if (lane == 0) ((u32*)qkv)[item] = pack_bf16(a, b);
  });
  timeline.mark(2);
  const int part = blockIdx.x / KV;
  if (part < parts) prefetch_pages(pages, pool, tokens, part, parts);
  int number = 1;
  grid_sync(words, number, BLOCKS, THREADS);
  timeline.mark(3);
  if (part < parts)
    attend(shared, qkv, q_norm, k_norm, cosine, sine, page, slot, pages, pool, attended, found, sums, tokens, part, parts);
  timeline.mark(4);
  grid_sync(words, ++number, BLOCKS, THREADS);
  if (parts > 1) {
    merge(found, sums, attended, parts);
    grid_sync(words, ++number, BLOCKS, THREADS);
  }
  timeline.mark(5);
  const NormWeight weight(norm);
  fetch_inputs<ATTENDED>(inputs, attended);
  timeline.mark(6);
  auto before = [&](int item) { return __ldcg((const u32*)x + item); };
  multiply(second, ring, inputs, one, before, [&](int item, float a, float b, u32 known) {
    add_to_stream(between, item, a, b, known);
  });
  timeline.mark(7);
  const Route route = {router};
  const Nothing nothing;
  Ring<Route, Nothing> of_router(route, nothing, shared);
  grid_sync(words, ++number, BLOCKS, THREADS);
  timeline.mark(8);
  through_experts(
      shared, of_router, route, between, weight, bias, gate_up, down, out, logits, hidden, words, number, timeline
  );
}
