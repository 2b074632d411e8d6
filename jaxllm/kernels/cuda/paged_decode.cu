// Attention of few query tokens per row over paged keys and values: reads every key and value once, at the speed of
// memory (FlashDecoding; grouped queries share what is read).
//
// The work is a list of blocks of BLOCK tokens: those of row 0, KV head 0, then of head 1, ..., then of row 1. How many
// blocks a row has is known when the kernel runs; each CTA takes an equal, contiguous share of the whole list, so that
// neither long nor short rows, nor padding, leave part of the GPU idle. A row's head whose blocks all fell to one CTA is
// finished by it; otherwise the CTAs leave partial results, each at most two, which paged_decode_combine.cu merges.
//
// Inside of a CTA each warp takes 16 tokens of a block, copies them to shared memory STAGES - 1 blocks ahead (across the
// borders of rows), and keeps a running softmax of its own; the warps meet only where a row's head ends.
//
// Macros: H head dim; G query heads per KV head; Q query tokens per row, G * Q <= 16; K KV heads; O tokens of a page;
// W pages of a row; WARPS, STAGES; CTAS, of them RESIDENT on an SM; MIN_SHARE, the fewest blocks worth a CTA; SCALE on
// q.k; SOFTCAP (0: none); FP8 (pages are e4m3); FIRST (queries have a first visible key).
// Grid: R, and then enough to have CTAS; the number of rows R is read from it, so that one program serves all of them.
#include "ptx.cuh"

constexpr int N = K * G, M = G * Q;
constexpr int TOKENS = 16, BLOCK = WARPS * TOKENS, THREADS = WARPS * 32;
constexpr int ROW = FP8 ? H : 2 * H;              // bytes of a token's key or value
constexpr int CHUNKS = ROW / 16;                  // of 16 bytes
constexpr int PLANE = TOKENS * ROW;               // a warp's keys, or values, of one block
constexpr int STAGE = 2 * PLANE;
constexpr int PADDED = H + 8;                     // floats of a row of the merged output: no bank conflicts
constexpr int MERGED = WARPS * STAGES * STAGE;    // where it begins
constexpr int MAXIMA = MERGED + M * PADDED * 4;   // of each warp, and then their sums
constexpr int ROWS = MAXIMA + 2 * WARPS * 16 * 4; // where the tables of rows begin
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float MASKED = -1e30f, UNSEEN = -1e29f;
static_assert(M <= 16 && H % 32 == 0 && O % TOKENS == 0, "not what this kernel was written for");

// Where a chunk of a token lies in its row of shared memory, so that 8 tokens' equal chunks lie in different banks.
DEVICE u32 chunk_at(int token, int chunk) {
  const int flip = CHUNKS % 8 == 0 ? token & 7 : CHUNKS % 4 == 0 ? token >> 1 & 3 : token >> 2 & 1;
  return token * ROW + ((chunk ^ flip) << 4);
}

// The rows of a call, in shared memory: blocks before each (of one head), its first block, and its last visible key.
struct Rows {
  int count;
  int* before;  // [count + 1]
  int* low;
  int* last;
};

// A place in the list of blocks.
struct Place {
  int row, head, left;  // left: blocks of this row's head, this one included
  int token, last;      // first token of the block; last visible one of the row

  DEVICE void enter(const Rows& rows, int skip) {
    left = rows.before[row + 1] - rows.before[row] - skip;
    token = (rows.low[row] + skip) * BLOCK;
    last = rows.last[row];
  }
  DEVICE void next(const Rows& rows) {
    token += BLOCK;
    if (--left) return;
    if (++head == K) {
      head = 0;
      do ++row;
      while (row < rows.count && rows.before[row + 1] == rows.before[row]);
    }
    if (row < rows.count) enter(rows, 0);
  }
};

// The list of blocks as CTAs share it: CTA c has blocks [begin(c), begin(c + 1)).
struct Shares {
  int total, ctas;

  DEVICE int begin(int cta) const { return (int)((u64)total * cta / ctas); }
  DEVICE int owner(int block) const { return (int)((((u64)block + 1) * ctas - 1) / total); }
};

// Fills the tables of rows.
DEVICE void count_blocks(const Rows& rows, const int* positions, const int* first, int* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = (rows.count + THREADS - 1) / THREADS;
  const int from = min((int)threadIdx.x * each, rows.count), to = min(from + each, rows.count);
  int mine = 0;
  for (int r = from; r < to; ++r) {
    int last = -1, low = 0x7fffffff;
    for (int i = 0; i < Q; ++i) {
      const int at = positions[r * Q + i];
      const int start = FIRST ? max(first[r * Q + i], 0) : 0;
      if (at >= start) {
        last = max(last, at);
        low = min(low, start);
      }
    }
    rows.last[r] = last;
    rows.low[r] = last < 0 ? 0 : low / BLOCK;
    rows.before[r] = mine;
    if (last >= 0) mine += last / BLOCK - low / BLOCK + 1;
  }
  int upto = mine;  // over the threads
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(~0u, upto, by);
    if (lane >= by) upto += other;
  }
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  int offset = upto - mine;
  for (int w = 0; w < warp; ++w) offset += sums[w];
  for (int r = from; r < to; ++r) rows.before[r] += offset;
  if (threadIdx.x == THREADS - 1) rows.before[rows.count] = offset + mine;
  __syncthreads();
}

// The words of the queries that a lane multiplies: of fragment rows lane / 4 and 8 further.
DEVICE void load_queries(u32 (&query)[H / 16][4], const u16* q, int row, int head, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = lane / 4 + half * 8;
    const u16* from = q + ((size_t)(row * Q + m / G) * N + head * G + m % G) * H;
#pragma unroll
    for (int step = 0; step < H / 16; ++step)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        // With e4m3 a lane has the keys' dims in fours: the order of dims in a product is free.
        const int dim = step * 16 + (FP8 ? lane % 4 * 4 + part * 2 : lane % 4 * 2 + part * 8);
        u32 two = m < M ? *(const u32*)(from + dim) : 0u;
        if (FP8) two = pack_f16(bf16_to_float((u16)two), bf16_to_float((u16)(two >> 16)));
        query[step][half + 2 * part] = two;
      }
  }
}

// Scores of 16 queries and 16 tokens, as accumulators of two products.
DEVICE void multiply_keys(float (&scores)[2][4], const u32 (&query)[H / 16][4], u32 keys, int lane) {
#if FP8
  const int token = lane & 15, right = lane >> 4;
#pragma unroll
  for (int step = 0; step < H / 16; step += 2) {
    u32 r[4];
    ldmatrix_x4(r, keys + chunk_at(token, step + right));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma_f16(scores[i & 1], query[step + i / 2], e4m3_to_f16((u16)r[i]), e4m3_to_f16((u16)(r[i] >> 16)));
  }
#else
  const int token = (lane >> 4) * 8 + (lane & 7), right = lane >> 3 & 1;
#pragma unroll
  for (int step = 0; step < H / 16; ++step) {
    u32 r[4];
    ldmatrix_x4(r, keys + chunk_at(token, 2 * step + right));
    mma_bf16(scores[0], query[step], r[0], r[1]);
    mma_bf16(scores[1], query[step], r[2], r[3]);
  }
#endif
}

// out += weights @ values of 16 tokens.
DEVICE void multiply_values(float (&out)[H / 8][4], const float (&weights)[2][4], u32 values, int lane) {
  const int token = lane & 15, right = lane >> 4;
  u32 a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = weights[i / 2][i % 2 * 2], high = weights[i / 2][i % 2 * 2 + 1];
    a[i] = FP8 ? pack_f16(low, high) : pack_bf16(low, high);
  }
#if FP8
#pragma unroll
  for (int step = 0; step < H / 16; step += 2) {
    u32 r[4];
    ldmatrix_x4_trans(r, values + chunk_at(token, step + right));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Each word has dims 2n and 2n + 1 of two tokens: apart, they are columns of two products.
      const u32 top = select_bytes(r[2 * i], 0, 0x3120), bottom = select_bytes(r[2 * i + 1], 0, 0x3120);
      mma_f16(out[2 * (step + i)], a, e4m3_to_f16((u16)top), e4m3_to_f16((u16)bottom));
      mma_f16(out[2 * (step + i) + 1], a, e4m3_to_f16((u16)(top >> 16)), e4m3_to_f16((u16)(bottom >> 16)));
    }
  }
#else
#pragma unroll
  for (int step = 0; step < H / 16; ++step) {
    u32 r[4];
    ldmatrix_x4_trans(r, values + chunk_at(token, 2 * step + right));
    mma_bf16(out[2 * step], a, r[0], r[1]);
    mma_bf16(out[2 * step + 1], a, r[2], r[3]);
  }
#endif
}

// The dim of accumulator out[n][i] of a lane (i of 0 and 1).
DEVICE int dim_of(int n, int i, int lane) {
  return FP8 ? n / 2 * 16 + lane % 4 * 4 + i * 2 + n % 2 : n * 8 + lane % 4 * 2 + i;
}

DEVICE float score(float product) {
  if (SOFTCAP == 0) return product * (float)(SCALE * LOG2E);
  // tanh(x) = 1 - 2 / (1 + e^2x)
  const float power = fast_exp2(fminf(product * (float)(SCALE / (SOFTCAP ? SOFTCAP : 1) * 2 * LOG2E), 80.f));
  return (float)(SOFTCAP * LOG2E) * (1.f - 2.f * fast_reciprocal(1.f + power));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) paged_decode(
    const u16* q,          // [R, Q, N, H]
    const u8* kv,          // [P, 2, K, O, H]
    const int* pages,      // [R, W]
    const int* positions,  // [R, Q]
    const int* first,      // [R, Q]
    u16* out,              // [R, Q, N, H]
    float* lse,            // [R, Q, N]
    float* part_out,       // [2 CTAS, M, H]
    float* part_lse,       // [2 CTAS, M], to the base 2
    int* split             // [CTAS, 4]: what paged_decode_combine has to do
) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cta = blockIdx.y * gridDim.x + blockIdx.x;
  if (cta >= CTAS) return;
  float* const merged = (float*)(shared + MERGED);
  float* const maxima = (float*)(shared + MAXIMA);
  float* const sums = maxima + WARPS * 16;
  Rows rows;
  rows.count = gridDim.x;
  rows.before = (int*)(shared + ROWS);
  rows.low = rows.before + rows.count + 1;
  rows.last = rows.low + rows.count;
  count_blocks(rows, positions, first, (int*)maxima);

  for (int r = cta; r < rows.count; r += CTAS) {  // rows that see nothing
    if (rows.before[r] != rows.before[r + 1]) continue;
    for (int i = threadIdx.x; i < Q * N * H / 2; i += THREADS) ((u32*)out)[(size_t)r * (Q * N * H / 2) + i] = 0;
    for (int i = threadIdx.x; i < Q * N; i += THREADS) lse[r * Q * N + i] = MASKED;
  }

  Shares shares;
  shares.total = rows.before[rows.count] * K;
  shares.ctas = min(CTAS, (shares.total + MIN_SHARE - 1) / MIN_SHARE);
  if (cta >= shares.ctas) {
    if (threadIdx.x == 0) split[cta * 4] = -1;
    return;
  }
  const int begin = shares.begin(cta), end = shares.begin(cta + 1);

  Place place;  // of the block to compute
  {
    int low = 0, high = rows.count;  // before[low] * K <= begin < before[high] * K
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (rows.before[middle] * K <= begin) low = middle;
      else high = middle;
    }
    const int blocks = rows.before[low + 1] - rows.before[low], skip = begin - rows.before[low] * K;
    place.row = low;
    place.head = skip / blocks;
    place.enter(rows, skip % blocks);
    if (threadIdx.x == 0) {
      const int start = begin - skip % blocks;
      const int from = shares.owner(start);
      split[cta * 4] = start < begin && from == cta - 1 ? low * K + place.head : -1;
      split[cta * 4 + 1] = from;
      split[cta * 4 + 2] = shares.owner(start + blocks - 1);
    }
  }

  Place ahead = place;  // of the block to copy
  int to_copy = end - begin;
  auto page_ahead = [&]() {
    const int token = ahead.token + warp * TOKENS;
    return to_copy > 0 && token <= ahead.last ? pages[(size_t)ahead.row * W + token / O] : 0;
  };
  int page = page_ahead();
  const u32 stages = shared_address(shared) + warp * (STAGES * STAGE);
  auto copy = [&](int stage) {
    if (to_copy > 0) {
      const int token = ahead.token + warp * TOKENS, seen = ahead.last + 1 - token;
      if (seen > 0) {
        const u8* keys = kv + (((size_t)page * 2 * K + ahead.head) * O + token % O) * ROW;
        const u8* values = keys + (size_t)K * O * ROW;
        const u32 to = stages + stage * STAGE;
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; ++i) {
          const int chunk = i * 32 + lane;  // a page's tokens are one after the other
          const u32 at = to + chunk_at(chunk / CHUNKS, chunk % CHUNKS);
          const u32 bytes = chunk / CHUNKS < seen ? 16 : 0;
          cp_async_16(at, keys + chunk * 16, bytes);
          cp_async_16(at + PLANE, values + chunk * 16, bytes);
        }
      }
      --to_copy;
      ahead.next(rows);
      page = page_ahead();
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) copy(s);

  int stage = 0, free_stage = STAGES - 1;
  for (int block = begin; block < end;) {
    // One row and head.
    u32 query[H / 16][4];
    load_queries(query, q, place.row, place.head, lane);
    int highest[2], lowest[2];  // visible keys of a lane's two queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = lane / 4 + half * 8;
      const int index = place.row * Q + (m < M ? m / G : 0);
      highest[half] = Q == 1 ? place.last : positions[index];
      lowest[half] = FIRST ? first[index] : 0;
    }
    float o[H / 8][4];
#pragma unroll
    for (int n = 0; n < H / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
    float top[2] = {MASKED, MASKED}, sum[2] = {0.f, 0.f};
    const int row = place.row, head = place.head;
    const int count = min(place.left, end - block);
    for (int i = 0; i < count; ++i) {
      cp_async_wait<STAGES - 2>();
      __syncwarp();
      copy(free_stage);
      const int token = place.token + warp * TOKENS;
      if (token <= place.last) {
        const u32 keys = stages + stage * STAGE;
        float s[2][4] = {};
        multiply_keys(s, query, keys, lane);
        float high[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int key = token + n * 8 + lane % 4 * 2 + j % 2, half = j / 2;
            const bool visible = key <= highest[half] && (!FIRST || key >= lowest[half]);
            s[n][j] = visible ? score(s[n][j]) : MASKED;
            high[half] = fmaxf(high[half], s[n][j]);
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          high[half] = fmaxf(high[half], __shfl_xor_sync(~0u, high[half], 1));
          high[half] = fmaxf(high[half], __shfl_xor_sync(~0u, high[half], 2));
        }
        if (__any_sync(~0u, high[0] > top[0] || high[1] > top[1])) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float keep = fast_exp2(top[half] - high[half]);
            top[half] = high[half];
            sum[half] *= keep;
#pragma unroll
            for (int n = 0; n < H / 8; ++n) {
              o[n][2 * half] *= keep;
              o[n][2 * half + 1] *= keep;
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[n][j] = fast_exp2(s[n][j] - top[j / 2]);
            sum[j / 2] += s[n][j];
          }
        multiply_values(o, s, keys + PLANE, lane);
      }
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      free_stage = free_stage + 1 == STAGES ? 0 : free_stage + 1;
      ++block;
      place.next(rows);
    }

    // The warps' results become one: scaled to the highest maximum, then added up, warp after warp.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      if (lane % 4 == 0) {
        maxima[warp * 16 + lane / 4 + half * 8] = top[half];
        sums[warp * 16 + lane / 4 + half * 8] = sum[half];
      }
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = MASKED;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) high = fmaxf(high, maxima[w * 16 + lane / 4 + half * 8]);
      factor[half] = fast_exp2(top[half] - high);
    }
    for (int turn = 0; turn < WARPS; ++turn) {
      if (turn == warp) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int m = lane / 4 + half * 8;
          if (m < M) {
#pragma unroll
            for (int n = 0; n < H / 8; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                float* const at = merged + m * PADDED + dim_of(n, i, lane);
                const float x = o[n][2 * half + i] * factor[half];
                *at = turn ? *at + x : x;
              }
          }
        }
      }
      __syncthreads();
    }
    const int start = rows.before[row] * K + head * (rows.before[row + 1] - rows.before[row]);
    const bool here = start >= begin, whole = here && start + rows.before[row + 1] - rows.before[row] <= end;
    for (int m = warp; m < M; m += WARPS) {
      float high = MASKED, total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) high = fmaxf(high, maxima[w * 16 + m]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) total += sums[w * 16 + m] * fast_exp2(maxima[w * 16 + m] - high);
      const float inverse = 1.f / total;
      const float log_sum = high < UNSEEN ? MASKED : high + fast_log2(total);
      const size_t target = (size_t)(row * Q + m / G) * N + head * G + m % G, slot = (size_t)(2 * cta + here) * M + m;
      for (int d = 2 * lane; d < H; d += 64) {
        const float x = merged[m * PADDED + d] * inverse, y = merged[m * PADDED + d + 1] * inverse;
        if (whole) *(u32*)(out + target * H + d) = pack_bf16(x, y);
        else *(float2*)(part_out + slot * H + d) = make_float2(x, y);
      }
      if (lane == 0) {
        if (whole) lse[target] = log_sum < UNSEEN ? MASKED : log_sum * LN2;
        else part_lse[slot] = log_sum;
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();
}
