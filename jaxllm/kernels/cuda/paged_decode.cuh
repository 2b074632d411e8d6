// Attention of few query tokens per row over paged keys and values: reads every key and value once, at the speed of
// memory (FlashDecoding; grouped queries share what is read).
//
// An item of work is a row's KV head; see shares.cuh.
//
// Inside of a CTA each warp takes 16 tokens of a block, copies them to shared memory STAGES blocks ahead (across the
// borders of items), and keeps a running softmax of its own; the warps meet only where an item ends.
//
// A load that another one waits for costs 0.7 us here, more than all arithmetic of a short context. The chain is:
// positions and the first pages together, keys and values (queries meanwhile), result: 0.7 + 1 us, and the launch.
//
// Macros: H head dim; G query heads per KV head; Q query tokens per row, G * Q <= 16; K KV heads; O tokens of a page;
// W pages of a row; WARPS, STAGES; CTAS, of them RESIDENT on an SM; MIN_SHARE, the fewest blocks worth a CTA; WHOLE;
// SCALE on q.k; SOFTCAP (0: none); FP8 (pages are e4m3); FIRST (queries have a first visible key); ROPE.
// Grid: R, and then enough to have CTAS; the number of rows R is read from it, so that one program serves all of them.
//
// With ROPE queries come as the projection has them, [R, N + 2K, H] with the row's new key and value, which is that of its
// last position: they are rotated on their way, and whoever has the last block of an item brings them to their page.
#pragma once
#include "ptx.cuh"

constexpr int N = K * G, M = G * Q, ITEMS = K;
constexpr int TOKENS = 16, BLOCK = WARPS * TOKENS, THREADS = WARPS * 32;
constexpr int ROW = FP8 ? H : 2 * H;              // bytes of a token's key or value
constexpr int CHUNKS = ROW / 16;                  // of 16 bytes
constexpr int PLANE = TOKENS * ROW;               // a warp's keys, or values, of one block
constexpr int STAGE = 2 * PLANE;
constexpr int MAXIMA = WARPS * STAGES * STAGE;     // of each warp, and then their sums
constexpr int ANGLES = MAXIMA + 2 * WARPS * 16 * 4;  // cosines and sines of a row, for each stage of each warp
constexpr int TABLES = ANGLES + (ROPE ? WARPS * STAGES * H * 4 : 0);
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static_assert(M <= 16 && H % 32 == 0 && O % TOKENS == 0, "not what this kernel was written for");
static_assert(8 * H * 4 <= STAGE, "warps leave eight rows of results in a stage");
static_assert(!ROPE || (Q == 1 && !FP8 && !FIRST), "what is rotated here");
constexpr int HEADS_OF_ROW = ROPE ? N + 2 * K : N;  // of what queries are among

#include "shares.cuh"

// Where a chunk of a token lies in its row of shared memory, so that 8 tokens' equal chunks lie in different banks.
DEVICE u32 chunk_at(int token, int chunk) {
  const int flip = CHUNKS % 8 == 0 ? token & 7 : CHUNKS % 4 == 0 ? token >> 1 & 3 : token >> 2 & 1;
  return token * ROW + ((chunk ^ flip) << 4);
}

// Where a dim of a row of a warp's results lies in its stage, in floats; four rows lie in different banks.
DEVICE int result_at(int m, int dim) { return m % 8 * H + (dim ^ (m & 3) << 3); }

// Rotates two dims of the first half of a head against those of the second.
DEVICE void rotate(u32& first, u32& second, float2 c, float2 s) {
  const float a = bf16_to_float((u16)first), b = bf16_to_float((u16)(first >> 16));
  const float x = bf16_to_float((u16)second), y = bf16_to_float((u16)(second >> 16));
  first = pack_bf16(a * c.x - x * s.x, b * c.y - y * s.y);
  second = pack_bf16(x * c.x + a * s.x, y * c.y + b * s.y);
}

// Rotates the new key in a warp's block in shared memory, that of `token`, which is as the projection has it, and brings
// it and the value to their page, at `to`. A lane has 16 bytes of both halves of the key. angles: cosines, then sines.
DEVICE void bring_new(u8* keys, const float* angles, u8* to, int token, int lane) {
  if (lane < H / 16) {
    uint4* const first = (uint4*)(keys + chunk_at(token, lane));
    uint4* const second = (uint4*)(keys + chunk_at(token, lane + H / 16));
    uint4 a = *first, b = *second;
    const float4* const c = (const float4*)angles + lane * 2;
    const float4* const s = (const float4*)(angles + H / 2) + lane * 2;
    rotate(a.x, b.x, make_float2(c[0].x, c[0].y), make_float2(s[0].x, s[0].y));
    rotate(a.y, b.y, make_float2(c[0].z, c[0].w), make_float2(s[0].z, s[0].w));
    rotate(a.z, b.z, make_float2(c[1].x, c[1].y), make_float2(s[1].x, s[1].y));
    rotate(a.w, b.w, make_float2(c[1].z, c[1].w), make_float2(s[1].z, s[1].w));
    *first = a;
    *second = b;
    ((uint4*)to)[lane] = a;
    ((uint4*)to)[lane + H / 16] = b;
  }
  for (int i = lane; i < CHUNKS; i += 32)
    ((uint4*)(to + (size_t)K * O * ROW))[i] = *(const uint4*)(keys + PLANE + chunk_at(token, i));
  __syncwarp();
}

// The words of the queries that a lane multiplies: of fragment rows lane / 4 and 8 further.
DEVICE void load_queries(
    u32 (&query)[H / 16][4], const u16* q, const float* cosine, const float* sine, int row, int head, int lane
) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = lane / 4 + half * 8;
    const u16* from = q + ((size_t)(row * Q + m / G) * HEADS_OF_ROW + head * G + m % G) * H;
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
  if (!ROPE) return;
#pragma unroll
  for (int step = 0; step < H / 32; ++step)
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const size_t at = (size_t)row * (H / 2) + step * 16 + lane % 4 * 2 + part * 8;
      const float2 c = __ldg((const float2*)(cosine + at)), s = __ldg((const float2*)(sine + at));
#pragma unroll
      for (int half = 0; half < 2; ++half) rotate(query[step][half + 2 * part], query[step + H / 32][half + 2 * part], c, s);
    }
}

// Scores of 16 queries and 16 tokens, as accumulators of two products.
DEVICE void multiply_keys(float (&scores)[2][4], const u32 (&query)[H / 16][4], u32 keys, int lane) {
  float s[2][2][4] = {};  // of every second product: each waits for the one before
#if FP8
  const int token = lane & 15, right = lane >> 4;
#pragma unroll
  for (int step = 0; step < H / 16; step += 2) {
    u32 r[4];
    ldmatrix_x4(r, keys + chunk_at(token, step + right));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma_f16(s[i / 2][i & 1], query[step + i / 2], e4m3_to_f16((u16)r[i]), e4m3_to_f16((u16)(r[i] >> 16)));
  }
#else
  const int token = (lane >> 4) * 8 + (lane & 7), right = lane >> 3 & 1;
#pragma unroll
  for (int step = 0; step < H / 16; ++step) {
    u32 r[4];
    ldmatrix_x4(r, keys + chunk_at(token, 2 * step + right));
    mma_bf16(s[step % 2][0], query[step], r[0], r[1]);
    mma_bf16(s[step % 2][1], query[step], r[2], r[3]);
  }
#endif
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] = s[0][n][j] + s[1][n][j];
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

DEVICE void decode(
    const u16* q,          // [R, Q, N, H]; ROPE: [R, N + 2K, H]
    u8* kv,                // [P, 2, K, O, H]
    const float* cosine,   // [R, H / 2]; with ROPE
    const float* sine,
    const int* pages,      // [R, W]
    const int* positions,  // [R, Q]
    const int* first,      // [R, Q]
    u16* out,              // [R, Q, N, H]
    float* lse,            // [R, Q, N]
    float* part_out,       // [2 CTAS, M, H]
    float* part_lse,       // [2 CTAS, M], to the base 2
    int* finished          // [CTAS], of the item that begins in the CTA and does not end there: CTAs that have finished
) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cta = blockIdx.y * gridDim.x + blockIdx.x;
  if (cta >= CTAS) return;
  float* const maxima = (float*)(shared + MAXIMA);
  float* const sums = maxima + WARPS * 16;
  const Rows rows(shared + TABLES, gridDim.x);

  // A lane has the page of block `lane` of a run. Of the first one, as it is in most calls, before that is known.
  auto load_pages = [&](int row, int token, int last) {
    const int at = token + lane * BLOCK + warp * TOKENS;
    return at <= last ? pages[(size_t)row * W + at / O] : 0;
  };
  const int likely_row = min(cta / K, rows.count - 1);
  const int likely_pages = load_pages(likely_row, 0, min(WHOLE * BLOCK, W * O) - 1);
  Work work(rows, positions, first, cta);

#pragma unroll 1
  for (int r = cta; r < rows.count; r += CTAS) {  // rows that see nothing
    if (rows.last[r] >= 0) continue;
#pragma unroll 1
    for (int i = threadIdx.x; i < Q * N * H / 2; i += THREADS) ((u32*)out)[(size_t)r * (Q * N * H / 2) + i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < Q * N; i += THREADS) lse[r * Q * N + i] = MASKED;
  }
  Walk walk = work.walk;
  if (!walk.budget) return;

  Walk ahead = walk;  // of what is to be copied
  Run copied = ahead.take(rows, 32), next = {};
  int page = likely_pages, next_page = 0;
  if (!walk.whole || copied.row != likely_row || copied.token) page = load_pages(copied.row, copied.token, copied.last);
  int copies = 0;  // of this run
  const u32 stages = shared_address(shared) + warp * (STAGES * STAGE);
  auto copy = [&](int stage) {
    if (copies == copied.blocks) {
      copied = next;
      page = next_page;
      copies = 0;
    }
    if (copied.blocks) {
      const int token = copied.token + copies * BLOCK + warp * TOKENS, seen = copied.last + 1 - token;
      const int id = __shfl_sync(~0u, page, copies);
      if (seen > 0) {
        const u8* keys = kv + (((size_t)id * 2 * K + copied.item) * O + token % O) * ROW;
        const u8* values = keys + (size_t)K * O * ROW;
        const u32 to = stages + stage * STAGE;
        auto copy_tokens = [&](int count, bool with_new) {
#pragma unroll
          for (int i = 0; i < CHUNKS / 2; ++i) {
            const int chunk = i * 32 + lane;  // a page's tokens are one after the other
            const u32 at = to + chunk_at(chunk / CHUNKS, chunk % CHUNKS);
            const u32 bytes = chunk / CHUNKS < count ? 16 : 0;
            const u8 *key = keys + chunk * 16, *value = values + chunk * 16;
            if (with_new && chunk / CHUNKS == count - 1) {
              key = (const u8*)(q + ((size_t)copied.row * HEADS_OF_ROW + N + copied.item) * H) + chunk % CHUNKS * 16;
              value = key + K * ROW;
            }
            cp_async_16(at, key, bytes);
            cp_async_16(at + PLANE, value, bytes);
          }
        };
        if (seen >= TOKENS + ROPE) copy_tokens(TOKENS, false);  // almost always, and half the instructions
        else copy_tokens(seen, ROPE);
        if (ROPE && seen <= TOKENS)
#pragma unroll
          for (int i = lane; i < H / 4; i += 32) {
            const float* const angles = i < H / 8 ? cosine : sine;
            cp_async_16(
                shared_address(shared) + ANGLES + (warp * STAGES + stage) * H * 4 + i * 16,
                angles + (size_t)copied.row * (H / 2) + i % (H / 8) * 4, 16
            );
          }
      }
      if (copies++ == 0) {
        next = ahead.take(rows, 32);
        next_page = load_pages(next.row, next.token, next.last);
      }
    }
    cp_async_commit();
  };
  u32 query[H / 16][4];
  float o[H / 8][4], top[2], sum[2];
  int highest[2], lowest[2];  // visible keys of a lane's two queries
  int new_page;  // of the run's row
  Run run;
  int done;  // blocks of the run
  auto begin_run = [&]() {
    run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) return false;
    done = 0;
    load_queries(query, q, cosine, sine, run.row, run.item, lane);
    if (ROPE) new_page = pages[(size_t)run.row * W + run.last / O];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = lane / 4 + half * 8;
      const int index = run.row * Q + (m < M ? m / G : 0);
      highest[half] = Q == 1 ? run.last : positions[index];
      lowest[half] = FIRST ? first[index] : 0;
      top[half] = MASKED;
      sum[half] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < H / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
    return true;
  };
#pragma unroll 1
  for (int s = 0; s < STAGES; ++s) copy(s);
  if (!begin_run()) return;
  for (int stage = 0;; stage = stage + 1 == STAGES ? 0 : stage + 1) {
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    const int token = run.token + done * BLOCK + warp * TOKENS;
    if (token <= run.last) {
      const u32 keys = stages + stage * STAGE;
      if (ROPE && run.last < token + TOKENS)
        bring_new(
            shared + (warp * STAGES + stage) * STAGE, (float*)(shared + ANGLES) + (warp * STAGES + stage) * H,
            kv + (((size_t)new_page * 2 * K + run.item) * O + run.last % O) * ROW, run.last - token, lane
        );
      float s[2][4];
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
    __syncwarp();  // all lanes have read the stage
    ++done;
    if (done == run.blocks) {
      // The warps' results become one. They meet in the stage that each has just read.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        if (lane % 4 == 0) {
          maxima[warp * 16 + lane / 4 + half * 8] = top[half];
          sums[warp * 16 + lane / 4 + half * 8] = sum[half];
        }
      }
      const Part part = work.part_of(rows, run);
#pragma unroll
      for (int half = 0; half < (M + 7) / 8; ++half) {
        if (half) __syncthreads();
        float* const mine = (float*)(shared + (warp * STAGES + stage) * STAGE);
        if (lane / 4 + half * 8 < M)
#pragma unroll
          for (int n = 0; n < H / 8; n += 2)
#pragma unroll
            for (int i = 0; i < 2; ++i) {  // two dims that follow each other
              const float2 two = FP8 ? make_float2(o[n][2 * half + i], o[n + 1][2 * half + i])
                                     : make_float2(o[n + i][2 * half], o[n + i][2 * half + 1]);
              *(float2*)(mine + result_at(lane / 4, FP8 ? dim_of(n, i, lane) : dim_of(n + i, 0, lane))) = two;
            }
        __syncthreads();
        for (int i = 2 * threadIdx.x; i < min(M - half * 8, 8) * H; i += 2 * THREADS) {
          const int m = half * 8 + i / H, d = i % H;
          float high = MASKED, total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) high = fmaxf(high, maxima[w * 16 + m]);
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            const float factor = fast_exp2(maxima[w * 16 + m] - high);
            const float2 two = *(const float2*)((float*)(shared + (w * STAGES + stage) * STAGE) + result_at(m, d));
            total += sums[w * 16 + m] * factor;
            x += two.x * factor;
            y += two.y * factor;
          }
          const float inverse = 1.f / total;
          const size_t target = (size_t)(run.row * Q + m / G) * N + run.item * G + m % G;
          const size_t slot = (size_t)part.slot * M + m;
          if (part.complete()) *(u32*)(out + target * H + d) = pack_bf16(x * inverse, y * inverse);
          else *(float2*)(part_out + slot * H + d) = make_float2(x * inverse, y * inverse);
          if (d == 0) {
            const float log_sum = high < UNSEEN ? MASKED : high + fast_log2(total);
            if (part.complete()) lse[target] = log_sum < UNSEEN ? MASKED : log_sum * LN2;
            else part_lse[slot] = log_sum;
          }
        }
      }
      __syncthreads();
      if (!part.complete()) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) rows.flags[0] = atomicAdd(finished + part.from, 1);
        __syncthreads();
        if (rows.flags[0] == part.to - part.from) {  // all others have
          __threadfence();
          merge_parts<H, M, WARPS>(part_out, part_lse, out, lse, part, warp, lane, [&](int m) {
            return (run.row * Q + m / G) * N + run.item * G + m % G;
          });
        }
      }
      if (!begin_run()) break;
    }
    copy(stage);
  }
  cp_async_wait<0>();
}
