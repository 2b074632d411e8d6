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
// block's; AHEAD: rows, an even number, of the next layer's queries, keys and values that the second-level cache fetches; LATER:
// 1: not before the heads are there; EVEN 1: see Qkv.
#include "cluster.cuh"
#include "moe_token.cuh"

constexpr int H = 128, GROUP = HEADS / KV, UNIT = 16, PARTS = BLOCKS / KV;
constexpr int QKV_ROWS = (HEADS + 2 * KV) * H;
constexpr float MASKED = -1e30f;
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

// Rows that are no whole round of pairs for all warps come one by one, if there is one for each warp at most.
struct Qkv {
  static constexpr int PIECES = WIDTH / PIECE, ROUNDS = QKV_ROWS / 2 / WORKERS * WORKERS, REST_OF = QKV_ROWS - 2 * ROUNDS;
  static constexpr bool SINGLE = EVEN && REST_OF <= WORKERS && PIECES % (2 * STAGE) == 0;
  static constexpr int PAIRS = SINGLE ? ROUNDS : QKV_ROWS / 2, ITEMS = PAIRS + (QKV_ROWS - 2 * PAIRS);
  const u16* weight;
  DEVICE const u16* start(int item, int row) const {
    return weight + (item < PAIRS ? (size_t)(2 * item + row) * WIDTH : (size_t)(PAIRS + item) * WIDTH + row * (WIDTH / 2));
  }
  DEVICE size_t offset(int piece) const { return piece * PIECE; }
};
DEVICE int stages_at(const Qkv&, int item) { return stages_of<Qkv>() / (item < Qkv::PAIRS ? 1 : 2); }
DEVICE int second_inputs(const Qkv&, int item) { return item < Qkv::PAIRS ? 0 : WIDTH / 16; }

// By a warp: a head of the token, as soon as it is told, normed and rotated where it has to be.
DEVICE void prepare_head(
    const u32* from, u16* to, u16* also, const float* norm, const float* cosine, const float* sine, bool rotates, float eps
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
  uint2 words[2];
  collect(words, [&](int half) { return from + half * H / 2 + lane * 2; });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    two[half] = two_of(words[half]);
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
  for (int half = 0; half < 2; ++half) {
    const u32 result = pack_bf16(x[half][0], x[half][1]);
    ((u32*)to)[half * H / 4 + lane] = result;
    if (also) ((u32*)also)[half * H / 4 + lane] = result;
  }
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
// its result is told; otherwise `found` [BLOCKS, GROUP, H] and `sums` [BLOCKS, GROUP, 2] get this part of it.
DEVICE void attend(
    u8* shared, u32* words, const float* q_norm, const float* k_norm, const float* cosine, const float* sine,
    const int* page, const int* slot, const int* pages, u16* pool, float* found, float* sums, int tokens, int part,
    int parts, const Timeline& timeline
) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int head = blockIdx.x % KV, units = (tokens + UNIT - 1) / UNIT, step = parts * WARPS;
  const int first = part * WARPS + warp;
  u16* const queries = (u16*)(shared + QUERIES_AT);
  float* const results = (float*)(shared + RESULTS_AT);
  float* const of_warps = (float*)(shared + SUMS_AT);
  u16* const new_ones = (u16*)(shared + NEW_AT);  // the token's key and value
  // A lane has the page of every 32nd unit of the warp.
  auto page_of = [&](int unit) { return unit < units ? __ldg(pages + unit * UNIT / O) : 0; };
  int batch = page_of(first + lane * step);
  uint4 k[2][4], v[4][2];
  const uint4 zero = make_uint4(0, 0, 0, 0);
  auto keys_of = [&](int unit, int turn) {
    return pool + (((size_t)__shfl_sync(~0u, batch, turn % 32) * 2 * KV + head) * O + unit * UNIT % O) * H;
  };
  auto load_keys = [&](const u16* keys) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) k[n][i] = __ldcg((const uint4*)(keys + (n * 8 + row) * H + i * 32 + quarter * 8));
  };
  auto load_values = [&](const u16* keys, int unit) {
    const u16* const values = keys + (size_t)KV * O * H;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int at = quarter * 2 + t % 2 + t / 2 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i)  // what follows the last token may be anything
        v[t][i] = unit * UNIT + at < tokens ? __ldcg((const uint4*)(values + at * H + i * 64 + row * 8)) : zero;
    }
  };
  // They come while the queries are made elsewhere.
  if (first < units) {
    const u16* const keys = keys_of(first, 0);
    load_keys(keys);
    load_values(keys, first);
  }

  // The block with the last unit writes the new key and value, before it reads any.
  const bool writes = units ? (units - 1) / WARPS % parts == part : part == 0;
#pragma unroll 1
  for (int i = warp; i < GROUP + (writes ? 2 : 0); i += WARPS) {
    const bool is_query = i < GROUP, is_key = i == GROUP;
    const int of = is_query ? head * GROUP + i : HEADS + (is_key ? 0 : KV) + head;
    const size_t place = (((size_t)__ldg(page) * 2 + (is_key ? 0 : 1)) * KV + head) * O + __ldg(slot);
    prepare_head(
        words + TOLD_QKV + of * H, is_query ? queries + i * WIDE : pool + place * H,
        is_query ? nullptr : new_ones + (i - GROUP) * H, is_query ? q_norm : k_norm, cosine, sine, is_query || is_key, EPS
    );
  }
  __syncthreads();
  timeline.mark(3);
  uint4 query[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) query[i] = row < GROUP ? *(const uint4*)(queries + row * WIDE + i * 32 + quarter * 8) : zero;

  float out[2][8][4] = {}, top = MASKED, sum = 0.f;
#pragma unroll 1
  for (int unit = first, turn = 0; unit < units; unit += step, ++turn) {
    const int token = unit * UNIT, newest = tokens - 1 - token;
    if (newest < UNIT) {  // in the pool it may not be seen yet
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * 8 + row == newest) k[n][i] = *(const uint4*)(new_ones + i * 32 + quarter * 8);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (quarter * 2 + t % 2 + t / 2 * 8 == newest) v[t][i] = *(const uint4*)(new_ones + H + i * 64 + row * 8);
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
    const u16* next = nullptr;
    if (unit + step < units) {
      if ((turn + 1) % 32 == 0) batch = page_of(unit + (lane + 1) * step);
      next = keys_of(unit + step, turn + 1);
      load_keys(next);
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
    if (next) load_values(next, unit + step);
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (row < GROUP) {
    if (quarter == 0) {
      of_warps[(warp * GROUP + row) * 2] = top;
      of_warps[(warp * GROUP + row) * 2 + 1] = sum;
    }
    const bool last_first = quarter >= 2;  // so that four quarters write to different banks
    float4* const to = (float4*)(results + (warp * GROUP + row) * WIDE) + quarter * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 a = make_float4(out[i][0][n], out[i][1][n], out[i][2][n], out[i][3][n]);
        const float4 b = make_float4(out[i][4][n], out[i][5][n], out[i][6][n], out[i][7][n]);
        to[i * 16 + n * 2 + (last_first ? 1 : 0)] = last_first ? b : a;
        to[i * 16 + n * 2 + (last_first ? 0 : 1)] = last_first ? a : b;
      }
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
      const float2 two = *(const float2*)(results + (w * GROUP + m) * WIDE + dim);
      total += of_warps[(w * GROUP + m) * 2 + 1] * by;
      x += two.x * by;
      y += two.y * by;
    }
    if (parts == 1) {
      const float inverse = total > 0.f ? 1.f / total : 0.f;
      tell(words + TOLD_HEADS + (head * GROUP + m) * H + dim, words_of(pack_bf16(x * inverse, y * inverse)));
    } else {
      const size_t of = (size_t)blockIdx.x * GROUP + m;
      *(float2*)(found + of * H + dim) = make_float2(x, y);
      if (dim == 0) *(float2*)(sums + of * 2) = make_float2(most, total);
    }
  }
}

// The parts of the heads that this block merges.
DEVICE void merge(const float* found, const float* sums, u32* words, int parts) {
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
      tell(words + TOLD_HEADS + head * H + dim, pack_bf16(x / total, 0.f) & 0xffff | TOLD);
    }
  }
}

// By all threads: COUNT bf16 that others tell, a multiple of 8, to shared memory, where nobody reads any more before.
template <int COUNT>
DEVICE void fetch_told(uint4* inputs, const u32* words) {
  constexpr int EACH = (COUNT / 4 + THREADS - 1) / THREADS, AT_ONCE = EACH < 8 ? EACH : 8;
#pragma unroll 1
  for (int first = 0; first < COUNT / 4; first += AT_ONCE * THREADS) {
    const int at = first + threadIdx.x;
    uint4 x[AT_ONCE];
    collect(x, [&](int i) { return words + 4 * min(at + i * THREADS, COUNT / 4 - 1); });
    if (first == 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (at + i * THREADS < COUNT / 4)
        ((uint2*)inputs)[at + i * THREADS] = make_uint2(two_of(x[i].x, x[i].y), two_of(x[i].z, x[i].w));
  }
  __syncthreads();
}

// By all threads: what a norm multiplies the stream with, of which each thread has a part.
DEVICE float norm_factor(u8* shared, const uint4 (&x)[NormWeight::EACH]) {
  float* const squares = (float*)(shared + SQUARES_AT);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < NormWeight::EACH; ++i) sum += square(x[i].x) + square(x[i].y) + square(x[i].z) + square(x[i].w);
#pragma unroll
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += squares[w];
  return rsqrtf(sum / WIDTH + EPS);
}
DEVICE uint4 normed(uint4 x, const NormWeight& weight, int i, float by) {
  const float4 a = weight.low[i], b = weight.high[i];
  return make_uint4(scaled(x.x, by * a.x, by * a.y), scaled(x.y, by * a.z, by * a.w), scaled(x.z, by * b.x, by * b.y),
                    scaled(x.w, by * b.z, by * b.w));
}

// A thread's part of the residual stream.
struct StreamPart {
  uint4 x[NormWeight::EACH];

  DEVICE explicit StreamPart(const u16* stream) {
#pragma unroll
    for (int i = 0; i < NormWeight::EACH; ++i) {
      const int at = threadIdx.x + i * THREADS;
      x[i] = at < WIDTH / 8 ? load_kept((const uint4*)stream + at) : make_uint4(0, 0, 0, 0);
    }
  }
  // By all threads, as fetch_normed.
  DEVICE void norm(u8* shared, const NormWeight& weight) const {
    uint4* const inputs = (uint4*)(shared + INPUTS_AT);
    const float by = norm_factor(shared, x);
#pragma unroll
    for (int i = 0; i < NormWeight::EACH; ++i)
      if (threadIdx.x + i * THREADS < WIDTH / 8) inputs[threadIdx.x + i * THREADS] = normed(x[i], weight, i, by);
    __syncthreads();
  }
};

// Waits for the stream after attention; what its norm makes of it goes to shared memory, and this block's scores are told.
// route: the router's rows of them, as NormWeight has a norm's.
DEVICE void score_experts(
    u8* shared, u32* words, const NormWeight& weight, const uint4 (&route)[ROUTED][NormWeight::EACH],
    const Timeline& timeline
) {
  constexpr int EACH = NormWeight::EACH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* const inputs = (uint4*)(shared + INPUTS_AT);
  float* const parts = (float*)(shared + RESULTS_AT);  // [ROUTED, WARPS]
  uint4 told[2 * EACH], x[EACH];
  collect(told, [&](int i) {
    return words + TOLD_STREAM + 8 * min((int)threadIdx.x + i / 2 * THREADS, WIDTH / 8 - 1) + i % 2 * 4;
  });
  timeline.mark(8);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint4 a = told[2 * i], b = told[2 * i + 1];
    x[i] = make_uint4(two_of(a.x, a.y), two_of(a.z, a.w), two_of(b.x, b.y), two_of(b.z, b.w));
    if (threadIdx.x + i * THREADS >= WIDTH / 8) x[i] = make_uint4(0, 0, 0, 0);
  }
  const float by = norm_factor(shared, x);
  float score[ROUTED] = {};
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = threadIdx.x + i * THREADS;
    const uint4 y = normed(x[i], weight, i, by);
    if (at < WIDTH / 8) inputs[at] = y;
#pragma unroll
    for (int r = 0; r < ROUTED; ++r) score[r] += dot(route[r][i], y);
  }
  timeline.mark(9);
#pragma unroll
  for (int r = 0; r < ROUTED; ++r) {
#pragma unroll
    for (int by = 16; by; by /= 2) score[r] += __shfl_xor_sync(~0u, score[r], by);
    if (lane == 0) parts[r * WARPS + warp] = score[r];
  }
  __syncthreads();
  const int expert = blockIdx.x + threadIdx.x * BLOCKS;
  if (threadIdx.x < ROUTED && expert < EXPERTS) {
    float all = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += parts[threadIdx.x * WARPS + w];
    tell(words + TOLD_SCORES + 2 * expert, words_of(__float_as_uint(all)));
  }
  timeline.mark(10);
}

// Waits for the scores, and chooses as `choose` does: an expert's place is the number of those before it. All threads have
// `chosen` afterwards; weights are what weigh_experts makes weights of.
DEVICE void choose_by_block(
    u8* shared, const u32* words, const float* __restrict__ bias, int* chosen, float* weights, const Timeline& timeline
) {
  constexpr int SHARES = shares_of(THREADS / EXPERTS), GROUPS = (EXPERTS + 3) / 4;  // of four experts
  u32* const keys = (u32*)(shared + RESULTS_AT + (ROUTED * WARPS * 4 + 15) / 16 * 16);
  float* const scores = (float*)(keys + GROUPS * 4);
  for (int expert = threadIdx.x; expert < GROUPS * 4; expert += THREADS) {
    if (expert >= EXPERTS) {
      keys[expert] = 0;
      continue;
    }
    uint2 halves[1];
    collect(halves, [&](int) { return words + TOLD_SCORES + 2 * expert; });
    const float told = __uint_as_float(two_of(halves[0])), score = SIGMOID ? 1.f / (1.f + exponential(-told)) : told;
    scores[expert] = score;
    keys[expert] = ordered(BIAS ? score + __ldg(bias + expert) : score);
  }
  __syncthreads();
  timeline.mark(11);
  const int share = threadIdx.x % SHARES;
  for (int first = 0; first < EXPERTS; first += THREADS / SHARES) {
    const int expert = min(first + (int)threadIdx.x / SHARES, EXPERTS - 1);
    const u32 key = keys[expert];
    int place = 0;
#pragma unroll 8
    for (int group = share; group < GROUPS; group += SHARES) {
      const uint4 others = ((const uint4*)keys)[group];
      const u32 above = group < expert / 4 ? key - 1 : key;  // those before it win a tie
      place += (others.x > above) + (others.y > above) + (others.z > above) + (others.w > above);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i)  // and those of its own group
      if (share == 0 && i < expert % 4 && keys[expert / 4 * 4 + i] == key) ++place;
#pragma unroll
    for (int by = SHARES / 2; by; by /= 2) place += __shfl_xor_sync(~0u, place, by);
    if (share == 0 && place < CHOSEN && first + threadIdx.x / SHARES < EXPERTS) {
      chosen[place] = expert;
      weights[place] = scores[expert];
    }
  }
  __syncthreads();
}

// By a warp: the weight of the chosen expert `lane`, by what choose_by_block left.
DEVICE float weigh_expert(const u8* shared, const float* weights) {
  const int lane = threadIdx.x % 32;
  float weight = lane < CHOSEN ? weights[lane] : 0.f;
  if (!SIGMOID) {
    const float most = weights[0];
    weight = lane < CHOSEN ? exponential(weight - most) : 0.f;
    if (!NORMALISE) {  // of all
      const float* const scores =
          (const float*)(shared + RESULTS_AT + (ROUTED * WARPS * 4 + 15) / 16 * 16 + (EXPERTS + 3) / 4 * 16);
      float sum = 0.f;
      for (int expert = lane; expert < EXPERTS; expert += 32) sum += exponential(scores[expert] - most);
#pragma unroll
      for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      weight /= sum;
    }
  }
  if (NORMALISE) {
    float sum = weight;
#pragma unroll
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    weight /= sum + 1e-20f;
  }
  return weight * SCALE;
}

// Lets the second-level cache fetch the first AHEAD rows, while the memory has nothing to do. number: of this one of so
// many blocks.
DEVICE void prefetch_rows(const u16* rows, int number, int blocks) {
  for (int row = (threadIdx.x * blocks + number) * 2; row < AHEAD; row += THREADS * blocks * 2)
    prefetch(rows + (size_t)row * WIDTH, 2 * WIDTH * 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_flow(
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
  start.norm(shared, first_weight);
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

  if (AHEAD && !LATER && part >= parts) prefetch_rows(upcoming, blockIdx.x - parts * KV, BLOCKS - parts * KV);
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
  if (AHEAD && LATER) prefetch_rows(upcoming, blockIdx.x, BLOCKS);
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
  timeline.mark(15);
  auto weight_of = [&](int piece) { return own_weights[piece / OF_EXPERT]; };
  auto after = [&](int item) { return item == mine ? between_of_mine : between(item); };
  multiply<SLOTS - 1>(fourth, of_experts, inputs, weight_of, after, [&](int item, float a, float b, u32 known) {
    add_to_stream(out, item, a, b, known);
  });
  timeline.mark(16);
  timeline.mark_end(1);
  cp_async_wait<0>();
}
