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
#include "decode_tiles.cuh"
#include "shares.cuh"

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
