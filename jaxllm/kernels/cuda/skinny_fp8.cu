// out[T, F] = (x[T, D] @ weight[F, D].T) * x_scale[T] * scale[F] of e4m3 operands, for up to 64 tokens: the weight is read
// once, at the speed of memory, and multiplied as it is.
//
// Tokens are the rows of wgmma's products, of which there are always 64, and ROWS rows of the weight the columns: so few
// that there is a block for each multiprocessor, and no block has to wait for another. Where many tokens would have to be
// read by too many blocks, a tile has more rows, and a cluster of CLUSTER blocks, each of which has a part of the inputs.
//
// A block has ACROSS x DEEP warpgroups: each has ROWS / ACROSS of the rows, and PANELS times 128 inputs of each stage. The
// stages of the ring in shared memory are filled by asynchronous copies of all threads, and STAGES - 1 are under way at
// any time. Sums of a stage are added up in registers, because the tensor cores' own sums keep about 14 bits; then those
// of the warpgroups, and of the blocks of a cluster, always in the same order.
//
// With few tokens what is around a product is done by it, for a kernel of its own would take longer than its work: while
// the first of the weight comes, each block norms and quantises all tokens for itself; and at the end act(gate) * up of
// the halves of the rows, or a residual, is made of the sums.
//
//   TOKENS FEATURES INPUTS   T, F (both halves, where gated) and D
//   ROWS CLUSTER ACROSS DEEP PANELS STAGES
//   WIDE       0: x is e4m3, with x_scale; 1: x is bf16, and quantised by the kernel, each token by its largest
//   NORM EPS   1: a wide x becomes x * rsqrt(mean(x^2) + EPS) * norm first, rounded to bf16
//   GATED      0: no; 1: silu; 2: gelu with tanh
//   RESIDUAL   1: bf16, is added to the result
//   OUT_FLOAT  1: float32 results; 0: bf16
//   AHEAD      bytes of `ahead`, the weight that is read next, that each block lets the second-level cache fetch when it
//              has asked for all of its own
#include "cluster.cuh"
#include "hopper_e4m3.cuh"
#include "stream.cuh"

constexpr int THREADS = 128 * ACROSS * DEEP, WARPS = THREADS / 32;
constexpr int COLUMNS = ROWS / ACROSS;                       // of a warpgroup's products
constexpr int LINES = DEEP * PANELS;                         // of 128 inputs, of a stage
constexpr int PART = (INPUTS / 128 + CLUSTER - 1) / CLUSTER;  // lines of a block
constexpr int STEPS = (PART + LINES - 1) / LINES;
constexpr bool WHOLE = STEPS * LINES * CLUSTER * 128 == INPUTS;
constexpr int OUT_FEATURES = GATED ? FEATURES / 2 : FEATURES, OUT_ROWS = GATED ? ROWS / 2 : ROWS;
constexpr int OWN_ROWS = ROWS / CLUSTER, OWN_OUTS = OUT_ROWS / CLUSTER;
// Shared memory: all of a wide x; stages, each of its lines of an x that is not, and then of the weight; and what a
// cluster's blocks give this one of its rows, [CLUSTER, TOKENS, OWN_ROWS] floats. Products read 64 rows of tokens: those
// that are not tokens are whatever follows, and come to nothing. At the end the sums of the warpgroups take the place of
// the stages.
constexpr int X_ROWS = TOKENS <= 8 ? 8 : TOKENS <= 16 ? 16 : TOKENS <= 32 ? 32 : 64;
constexpr int X_PANEL = X_ROWS * 128, PANEL = ROWS * 128;
constexpr int STAGES_AT = WIDE ? PART * X_PANEL : 0, WEIGHT_AT = WIDE ? 0 : LINES * X_PANEL;
constexpr int STAGE = WEIGHT_AT + LINES * PANEL;
constexpr int GIVEN_AT = STAGES_AT + STAGES * STAGE, GIVEN = CLUSTER == 1 ? 0 : ROWS * TOKENS * 4;
constexpr int NOTES_AT = GIVEN_AT + (GIVEN > 8192 ? GIVEN : 8192);  // scales of wide tokens, and what leads to them
constexpr int SUM_STRIDE = ROWS + 8;  // floats; the lanes of half a warp then write to all banks
// Copies: 16 bytes of a row of a stage a thread, of AT_ONCE rows at a time.
constexpr int PIECES = LINES * 8, AT_ONCE = THREADS / PIECES;
// A wide token is quantised by TOKEN_WARPS warps, each lane having OWN pieces of 8 inputs.
constexpr int TOKEN_WARPS = TOKENS <= 1 ? WARPS : TOKENS <= 2 ? WARPS / 2 : WARPS / 4;
constexpr int OWN = WIDE ? (INPUTS / 8 + TOKEN_WARPS * 32 - 1) / (TOKEN_WARPS * 32) : 1;
static_assert(TOKENS <= 64 && INPUTS % 128 == 0 && OUT_FEATURES % 8 == 0 && STAGES > 1, "sizes");
static_assert(ROWS % ACROSS == 0 && OWN_ROWS * CLUSTER == ROWS && OWN_ROWS % (GATED ? 16 : 4) == 0, "tiles");
static_assert(THREADS % PIECES == 0 && AT_ONCE % 8 == 0 && ROWS % AT_ONCE == 0, "copies");
static_assert(NOTES_AT + (WIDE ? 16 + WARPS * 8 : 0) <= SHARED, "shared memory");
static_assert(DEEP * TOKENS * SUM_STRIDE * 4 <= STAGES * STAGE, "sums");
static_assert(AHEAD % 512 == 0, "16 bytes of each lane");
static_assert(!WIDE || (WHOLE && TOKENS <= 4 && WARPS >= 8), "wide tokens");

#if OUT_FLOAT
typedef float4 Four;
DEVICE Four four(float4 v) { return v; }
#else
typedef uint2 Four;
DEVICE Four four(float4 v) { return make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)); }
#endif

// The sum of `count` groups of 4 floats, which lie `stride` floats apart.
template <int count>
DEVICE float4 total(const float* from, int stride) {
  float4 sum = *(const float4*)from;
#pragma unroll
  for (int i = 1; i < count; i++) {
    const float4 v = *(const float4*)(from + i * stride);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}
DEVICE float4 times(float4 v, uint4 scale, float of_token) {
  return make_float4(v.x * (__uint_as_float(scale.x) * of_token), v.y * (__uint_as_float(scale.y) * of_token),
                     v.z * (__uint_as_float(scale.z) * of_token), v.w * (__uint_as_float(scale.w) * of_token));
}

DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(x * -1.4426950408889634f)); }
DEVICE float activation(float x) {
  return x * sigmoid(GATED == 2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}

// The row of the weight at `row` of a tile. Gated: 8 rows of the gate, the same 8 of up, the next 8 of the gate.
DEVICE int weight_row(int tile, int row) {
  int out = tile * OUT_ROWS + (GATED ? row / 16 * 8 + row % 8 : row);
  if (OUT_FEATURES % OUT_ROWS) out = min(out, OUT_FEATURES - 1);
  return GATED && row % 16 >= 8 ? OUT_FEATURES + out : out;
}
// How far row `first + by` of the weight lies after row `first` of a tile, where by is a multiple of AT_ONCE.
constexpr int rows_between(int by) { return GATED ? by / 2 : by; }

// What 4 neighbouring results of a token need besides their sums. A block has RESULTS times 4, token by token.
constexpr int RESULTS = TOKENS * OWN_OUTS / 4;
struct Around {
  uint4 scale, up_scale;  // floats
  uint2 added;            // bf16
  float of_token;

  DEVICE void fetch(const float* __restrict__ x_scale, const float* __restrict__ all_scales,
                    const u16* __restrict__ residual, int i, int tile, int rank) {
    const int token = i / (OWN_OUTS / 4), feature = tile * OUT_ROWS + rank * OWN_OUTS + i % (OWN_OUTS / 4) * 4;
    if (i >= RESULTS || feature >= OUT_FEATURES) return;
    scale = load_kept(all_scales + feature);
    if (GATED) up_scale = load_kept(all_scales + OUT_FEATURES + feature);
    if (RESIDUAL) added = __ldg((const uint2*)residual + ((size_t)token * OUT_FEATURES + feature) / 4);
    if (!WIDE) of_token = __ldg(x_scale + token);
  }
};

DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}
DEVICE float largest_of_lanes(float x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}

#if WIDE
DEVICE float low(u32 pair) { return bf16_to_float((u16)pair); }
DEVICE float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// A lane's part of the tokens, and of the norm's weight.
struct Tokens {
  u32 pairs[OWN][4];  // of bf16
  uint4 weights[NORM ? OWN : 1][2];

  DEVICE static int token() { return threadIdx.x / 32 / TOKEN_WARPS; }
  DEVICE static int piece(int i) { return threadIdx.x % (TOKEN_WARPS * 32) + i * TOKEN_WARPS * 32; }
  DEVICE static bool is_piece(int i) { return INPUTS / 8 % (TOKEN_WARPS * 32) == 0 || piece(i) < INPUTS / 8; }

  DEVICE void fetch(const u16* __restrict__ x, const float* __restrict__ norm) {
    const int row = min(token(), TOKENS - 1);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (is_piece(i)) v = load_kept((const uint4*)(x + (size_t)row * INPUTS) + piece(i));
      pairs[i][0] = v.x, pairs[i][1] = v.y, pairs[i][2] = v.z, pairs[i][3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < (NORM ? OWN : 0); i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        weights[i][j] = is_piece(i) ? load_kept((const uint4*)norm + piece(i) * 2 + j) : make_uint4(0, 0, 0, 0);
  }

  // Brings the block's part of the tokens to shared memory as e4m3, and their scales to `scales`. Both are seen after a
  // barrier. `partial` are 2 * WARPS floats.
  DEVICE void quantise(u8* shared, float* scales, float* partial, int rank) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / TOKEN_WARPS * TOKEN_WARPS;
    if (NORM) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) squares += low(pairs[i][j]) * low(pairs[i][j]) + high(pairs[i][j]) * high(pairs[i][j]);
      squares = sum_of_lanes(squares);
      if (lane == 0) partial[warp] = squares;
      __syncthreads();
      squares = 0.f;
#pragma unroll
      for (int i = 0; i < TOKEN_WARPS; i++) squares += partial[group + i];
      const float factor = rsqrtf(squares / INPUTS + EPS);
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint4 four = weights[i][j / 2];
          const float a = __uint_as_float(j % 2 ? four.z : four.x), b = __uint_as_float(j % 2 ? four.w : four.y);
          pairs[i][j] = pack_bf16(low(pairs[i][j]) * factor * a, high(pairs[i][j]) * factor * b);
        }
    }
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) largest = fmaxf(largest, fmaxf(fabsf(low(pairs[i][j])), fabsf(high(pairs[i][j]))));
    largest = largest_of_lanes(largest);
    if (lane == 0) partial[WARPS + warp] = largest;
    __syncthreads();
    largest = 0.f;
#pragma unroll
    for (int i = 0; i < TOKEN_WARPS; i++) largest = fmaxf(largest, partial[WARPS + group + i]);
    const float inverse = largest > 0.f ? 448.f / largest : 1.f;
    if (token() >= TOKENS) return;
    if (piece(0) == 0) scales[token()] = largest > 0.f ? largest * (1.f / 448.f) : 1.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int line = piece(i) / 16 - rank * PART;
      if (line < 0 || line >= PART) continue;
      u32 words[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 a = pairs[i][j * 2], b = pairs[i][j * 2 + 1];
        words[j] = pack_e4m3(low(a) * inverse, high(a) * inverse) | (u32)pack_e4m3(low(b) * inverse, high(b) * inverse) << 16;
      }
      const int place = (piece(i) % 16 / 2 ^ token()) << 4 | piece(i) % 2 * 8;
      *(uint2*)(shared + line * X_PANEL + token() * 128 + place) = make_uint2(words[0], words[1]);
    }
  }
};
typedef u16 X;
#else
typedef u8 X;
#endif

// x_scale, norm, residual and ahead are read where the macros say that there are any.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) skinny_fp8(
    const X* __restrict__ x, const float* __restrict__ x_scale, const u8* __restrict__ weight,
    const float* __restrict__ scale, const float* __restrict__ norm, const u16* __restrict__ residual,
    const u8* __restrict__ ahead, Four* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32, across = thread / 128 % ACROSS, deep = thread / 128 / ACROSS;
  const int rank = blockIdx.x % CLUSTER, tile = blockIdx.x / CLUSTER;

  const int first = thread / PIECES, piece = thread % PIECES, line = piece / 8;
  const int first_row = weight_row(tile, first), part = rank * PART * 128 + piece * 16;
  const u8* from = weight + (size_t)first_row * INPUTS + part;
  const u32 swizzled = first * 128 + ((piece % 8 ^ first % 8) << 4);
  const u32 to = STAGES_AT + WEIGHT_AT + line * PANEL + swizzled, x_to = STAGES_AT + line * X_PANEL + swizzled;
  int next = 0, next_slot = 0;
  auto bring = [&] {
    if (next < STEPS) {
      const u32 stage = smem + next_slot * STAGE;
      const int at = next * LINES + line;  // in the block's part
      const u32 bytes = WHOLE || (at < PART && rank * PART + at < INPUTS / 128) ? 16 : 0;
      const int by = bytes ? next * LINES * 128 : -part;
#if !WIDE
      const u8* const x_from = x + (size_t)min(first, TOKENS - 1) * INPUTS + part + by;
#pragma unroll
      for (int i = 0; i < (TOKENS + AT_ONCE - 1) / AT_ONCE; i++)
        if (first + i * AT_ONCE < TOKENS) cp_async_16(stage + x_to + i * AT_ONCE * 128, x_from + i * AT_ONCE * INPUTS, bytes);
#endif
#pragma unroll
      for (int i = 0; i < ROWS / AT_ONCE; i++) {
        long long further = rows_between(i * AT_ONCE);
        if (OUT_FEATURES % OUT_ROWS || (GATED && AT_ONCE % 16)) further = weight_row(tile, first + i * AT_ONCE) - first_row;
        cp_async_16_ahead(stage + to + i * AT_ONCE * 128, from + by + further * INPUTS, bytes);
      }
      if (++next_slot == STAGES) next_slot = 0;
      if (++next == STEPS && AHEAD && thread < 32)
        prefetch(ahead + ((size_t)blockIdx.x * 32 + lane) * (AHEAD / 32), AHEAD / 32);
    }
    cp_async_commit();
  };
  // What is not of the weight is asked for first: it would come after all of the weight that was asked for.
  Around around;
  around.fetch(x_scale, scale, residual, thread, tile, rank);
#if WIDE
  float* const scales = (float*)(shared + NOTES_AT);
  Tokens tokens;
  tokens.fetch(x, norm);
#endif
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) bring();
#if WIDE
  tokens.quantise(shared, scales, scales + 4, rank);
#endif
  if (CLUSTER > 1) cluster_sync();  // all have started

  float acc[COLUMNS / 2] = {}, d[COLUMNS / 2];
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++) {
    cp_async_wait<STAGES - 2>();
    fence_products();
    __syncthreads();  // all threads' copies are there, and all have done with the stage before
    const u32 stage = smem + STAGES_AT + slot * STAGE;
    wgmma_pin(d);
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < PANELS; p++) {
      const int panel = deep * PANELS + p;
      const u64 a = matrix_descriptor((WIDE ? smem + step * LINES * X_PANEL : stage) + panel * X_PANEL, 128, 16, 1024);
      const u64 b = matrix_descriptor(stage + WEIGHT_AT + panel * PANEL + across * COLUMNS * 128, 128, 16, 1024);
#pragma unroll
      for (int i = 0; i < 4; i++) WgmmaE4m3<COLUMNS>::ss(d, a + i * 2, b + i * 2, p + i > 0);
    }
    wgmma_commit();
    bring();
    wgmma_wait<0>();
    wgmma_pin(d);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) acc[i] += d[i];
    if (++slot == STAGES) slot = 0;
  }
  cp_async_wait<0>();
  __syncthreads();

  float* const sums = (float*)(shared + STAGES_AT);  // [DEEP, TOKENS, SUM_STRIDE]
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int token = thread % 128 / 32 * 16 + half * 8 + lane / 4;
    float* const row = sums + (deep * TOKENS + token) * SUM_STRIDE + across * COLUMNS + lane % 4 * 2;
    if (token < TOKENS)
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; i++) *(float2*)(row + i * 8) = make_float2(acc[i * 4 + half * 2], acc[i * 4 + half * 2 + 1]);
  }
  __syncthreads();
  if (CLUSTER > 1) {
    for (int i = thread; i < TOKENS * ROWS / 4; i += THREADS) {
      const int token = i / (ROWS / 4), row = i % (ROWS / 4) * 4;
      const float4 sum = total<DEEP>(sums + token * SUM_STRIDE + row, TOKENS * SUM_STRIDE);
      cluster_store_4(smem + GIVEN_AT + ((rank * TOKENS + token) * OWN_ROWS + row % OWN_ROWS) * 4, row / OWN_ROWS, sum);
    }
    cluster_sync();
  }
  auto total_of = [&](int token, int row) {
    return CLUSTER == 1 ? total<DEEP>(sums + token * SUM_STRIDE + row, TOKENS * SUM_STRIDE)
                        : total<CLUSTER>((float*)(shared + GIVEN_AT) + token * OWN_ROWS + row, TOKENS * OWN_ROWS);
  };
  for (int i = thread; i < RESULTS; i += THREADS) {
    const Around here = around;
    around.fetch(x_scale, scale, residual, i + THREADS, tile, rank);
    const int token = i / (OWN_OUTS / 4), row = i % (OWN_OUTS / 4) * 4, feature = tile * OUT_ROWS + rank * OWN_OUTS + row;
    if (feature >= OUT_FEATURES) continue;
#if WIDE
    const float of_token = scales[token];
#else
    const float of_token = here.of_token;
#endif
    float4 v = times(total_of(token, GATED ? row / 8 * 16 + row % 8 : row), here.scale, of_token);
    if (GATED) {
      const float4 up = times(total_of(token, row / 8 * 16 + row % 8 + 8), here.up_scale, of_token);
      v = make_float4(activation(v.x) * up.x, activation(v.y) * up.y, activation(v.z) * up.z, activation(v.w) * up.w);
    }
    if (RESIDUAL) {
      v.x += bf16_to_float((u16)here.added.x), v.y += bf16_to_float((u16)(here.added.x >> 16));
      v.z += bf16_to_float((u16)here.added.y), v.w += bf16_to_float((u16)(here.added.y >> 16));
    }
    out[((size_t)token * OUT_FEATURES + feature) / 4] = four(v);
  }
}
