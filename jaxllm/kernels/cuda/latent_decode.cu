// Attention of one query token per row over paged latents (multi-head latent attention, absorbed): all query heads read
// the same H numbers of a token, of which the first VALUES are its value too (FlashMLA; FlashDecoding).
//
// What bounds it: a token is 2H bytes and, for each query head, 2 (H + VALUES) floating-point operations. With 128 heads
// that is 242 operations per byte, more than the 173 that an H200 does in the time of a byte: products decide. With 64
// and fewer, whose products are done 64 rows at a time all the same, memory decides.
//
// An item of work is a row's tile of 64 query heads; see shares.cuh. One CTA stays on each SM, of four warpgroups:
//   copy     brings blocks of BLOCK tokens into STAGES stages; each has warps of its own, so that none waits for others
//   scores   queries @ latents, softmax; leaves the weights, and by how much older results shrink
//   values   two of them: result = result * shrinking + weights @ latents, half of the VALUES numbers each
// so that the products of scores overlap with those of values of the block before, and the softmax with both.
//
// Macros: HEADS of queries; H; VALUES; O tokens of a page; W pages of a row; BLOCK: 64, or 32, which keeps more under way
// and makes more of the same reads of shared memory; CTAS; MIN_SHARE; WHOLE; SCALE; FIRST.
// Grid: R, and then enough to have CTAS; the number of rows R is read from it, so that one program serves all of them.
#include "hopper.cuh"

constexpr int TILE = 64, STAGES = 128 / BLOCK, Q = 1;
constexpr int ITEMS = (HEADS + TILE - 1) / TILE, M = HEADS < TILE ? HEADS : TILE;
constexpr int WARPS = 16, THREADS = WARPS * 32;
#include "shares.cuh"

// Shared memory: queries, stages of latents, weights, factors of rows, lse of rows, barriers, tables. Queries and
// latents lie in panels of 64 columns, rows of 128 bytes with the hardware's swizzle.
constexpr int PANELS = H / 64, ROW = 128, PANEL = BLOCK * ROW, STAGE = PANELS * PANEL, QUERY_PANEL = TILE * ROW;
constexpr int COPIERS = 128 / STAGES, AT_ONCE = COPIERS / 8;  // threads that fill a stage, and tokens of one turn
constexpr int KV_AT = PANELS * QUERY_PANEL, WEIGHTS_AT = KV_AT + STAGES * STAGE;
constexpr int FACTORS_AT = WEIGHTS_AT + TILE * BLOCK * 2;
constexpr int LSE_AT = FACTORS_AT + TILE * 4, BARRIERS_AT = LSE_AT + TILE * 4;
constexpr int TABLES_AT = BARRIERS_AT + 8 * (2 * STAGES + 2);
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static_assert(H % 64 == 0 && VALUES == 512 && HEADS % M == 0 && O % 8 == 0, "not what this kernel was written for");

struct Barriers {
  u32 at;

  DEVICE u32 full(int stage) const { return at + stage * 16; }
  DEVICE u32 freed(int stage) const { return at + stage * 16 + 8; }
  DEVICE u32 weights() const { return at + STAGES * 16; }
  DEVICE u32 weights_freed() const { return at + STAGES * 16 + 8; }
};

// Warps that fill stage `stage`: every STAGES-th block.
DEVICE void copy(
    u32 smem, const Barriers& barriers, const Rows& rows, Walk walk, const u16* kv, const int* pages, int stage,
    int thread
) {
  Run run = walk.take(rows, 0x7fffffff);
  int block = 0;
  auto step = [&]() {
    ++block;
    if (block >= run.blocks) {
      run = walk.take(rows, 0x7fffffff);
      block = 0;
    }
  };
  // A lane has the page of eight tokens.
  auto load_pages = [&]() {
    const int at = run.token + block * BLOCK + thread % (BLOCK / 8) * 8;
    return run.blocks && at <= run.last ? pages[(size_t)run.row * W + at / O] : 0;
  };
  const int column = thread % 8, above = thread / 8;
  const u32 to = smem + KV_AT + stage * STAGE;
  for (int i = 0; i < stage && run.blocks; ++i) step();
  int page = load_pages();
#pragma unroll 1
  for (int turn = 0; run.blocks; ++turn) {
    const int token = run.token + block * BLOCK + above, last = run.last;
    barrier_wait(barriers.freed(stage), turn & 1 ^ 1);
#pragma unroll
    for (int i = 0; i < BLOCK / AT_ONCE; ++i) {
      const int row = above + i * AT_ONCE, at = token + i * AT_ONCE;
      const u16* from = kv + ((size_t)__shfl_sync(~0u, page, i * AT_ONCE / 8) * O + at % O) * H + column * 8;
      const u32 here = to + row * ROW + ((column ^ row % 8) << 4), bytes = at <= last ? 16 : 0;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) cp_async_16(here + panel * PANEL, from + panel * 64, bytes);
    }
    cp_async_commit();
#pragma unroll 1
    for (int i = 0; i < STAGES && run.blocks; ++i) step();
    page = load_pages();
    cp_async_wait<0>();
    fence_products();
    barrier_arrive(barriers.full(stage));
  }
}

// A warpgroup that makes weights of scores.
DEVICE void make_weights(
    u8* shared, u32 smem, const Barriers& barriers, const Rows& rows, Walk walk, const u16* q, const int* first,
    int thread
) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  uint4* const weights = (uint4*)(shared + WEIGHTS_AT);
  float* const factors = (float*)(shared + FACTORS_AT);
  float* const logs = (float*)(shared + LSE_AT);
  const u64 query = matrix_descriptor(smem, ROW, 16, 8 * ROW);
  float s[BLOCK / 2];
  int blocks = 0, messages = 0;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
    named_sync(1, 128);  // all have used the queries before
    const u16* from = q + ((size_t)run.row * HEADS + run.item * TILE) * H;
#pragma unroll 4
    for (int i = 0; i < TILE * H / 8 / 128; ++i) {
      const int at = i * 128 + thread, m = at / (H / 8), chunk = at % (H / 8);
      const u32 to = smem + chunk / 8 * QUERY_PANEL + m * ROW + ((chunk % 8 ^ m % 8) << 4);
      cp_async_16(to, from + (m < M ? (size_t)at * 8 : 0), m < M ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_products();
    named_sync(1, 128);
    const int lowest = FIRST ? first[run.row] : 0;
    float top[2] = {MASKED, MASKED}, sum[2] = {0.f, 0.f};
#pragma unroll 1
    for (int block = 0; block < run.blocks; ++block, ++blocks) {
      const int stage = blocks % STAGES;
      barrier_wait(barriers.full(stage), blocks / STAGES & 1);
      const u64 keys = matrix_descriptor(smem + KV_AT + stage * STAGE, ROW, 16, 8 * ROW);
      wgmma_pin(s);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < H / 16; ++i) {
        const int inside = i % 4 * 32;
        Wgmma<BLOCK>::ss(s, query + (i / 4 * QUERY_PANEL + inside) / 16, keys + (i / 4 * PANEL + inside) / 16, i > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(s);
      const int token = run.token + block * BLOCK + lane % 4 * 2;
      if (token - lane % 4 * 2 + BLOCK > run.last || FIRST) {
#pragma unroll
        for (int i = 0; i < BLOCK / 2; ++i) {
          const int key = token + i / 4 * 8 + i % 2;
          s[i] = key <= run.last && (!FIRST || key >= lowest) ? s[i] * (float)(SCALE * LOG2E) : MASKED;
        }
      } else {
#pragma unroll
        for (int i = 0; i < BLOCK / 2; ++i) s[i] *= (float)(SCALE * LOG2E);
      }
      float keep[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = top[half], total = 0.f;
#pragma unroll
        for (int i = 0; i < BLOCK / 8; ++i) high = fmaxf(high, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        keep[half] = fast_exp2(top[half] - high);
        top[half] = high;
#pragma unroll
        for (int i = 0; i < BLOCK / 8; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[i * 4 + half * 2 + j];
            x = fast_exp2(x - high);
            total += x;
          }
        sum[half] = sum[half] * keep[half] + total;
      }
      barrier_wait(barriers.weights_freed(), messages & 1 ^ 1);
#pragma unroll
      for (int i = 0; i < BLOCK / 16; ++i)
        weights[i * 128 + thread] =
            make_uint4(pack_bf16(s[i * 8], s[i * 8 + 1]), pack_bf16(s[i * 8 + 2], s[i * 8 + 3]),
                       pack_bf16(s[i * 8 + 4], s[i * 8 + 5]), pack_bf16(s[i * 8 + 6], s[i * 8 + 7]));
      if (lane % 4 == 0) {
        factors[row] = keep[0];
        factors[row + 8] = keep[1];
      }
      barrier_arrive(barriers.weights());
      ++messages;
    }
    // At the end, what remains to be multiplied.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
    barrier_wait(barriers.weights_freed(), messages & 1 ^ 1);
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factors[row + half * 8] = 1.f / sum[half];
        logs[row + half * 8] = top[half] < UNSEEN ? MASKED : top[half] + fast_log2(sum[half]);
      }
    }
    barrier_arrive(barriers.weights());
    ++messages;
  }
}

// A warpgroup that has columns group * VALUES / 2 and so on of the results.
DEVICE void multiply_values(
    u8* shared, u32 smem, const Barriers& barriers, const Rows& rows, const Work& work, u16* out, float* lse,
    float* part_out, float* part_lse, int* finished, int group, int thread
) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  const uint4* const weights = (const uint4*)(shared + WEIGHTS_AT);
  const float* const factors = (const float*)(shared + FACTORS_AT);
  const float* const logs = (const float*)(shared + LSE_AT);
  Walk walk = work.walk;
  // Two halves: one product of 256 columns wants more registers than a thread has when it begins.
  float o[2][VALUES / 8];
  int blocks = 0, messages = 0;
#pragma unroll 1
  for (;;) {
    const Run run = walk.take(rows, 0x7fffffff);
    if (!run.blocks) break;
#pragma unroll
    for (int i = 0; i < VALUES / 8; ++i) o[0][i] = o[1][i] = 0.f;
#pragma unroll 1
    for (int block = 0; block < run.blocks; ++block, ++blocks) {
      barrier_wait(barriers.weights(), messages & 1);
      u32 p[BLOCK / 16][4];
#pragma unroll
      for (int i = 0; i < BLOCK / 16; ++i) {
        const uint4 four = weights[i * 128 + thread];
        p[i][0] = four.x, p[i][1] = four.y, p[i][2] = four.z, p[i][3] = four.w;
      }
      const float keep[2] = {factors[row], factors[row + 8]};
      const bool shrinks = __any_sync(~0u, keep[0] != 1.f || keep[1] != 1.f);
      if (lane == 0) barrier_arrive(barriers.weights_freed());
      ++messages;
      if (shrinks) {
#pragma unroll
        for (int i = 0; i < VALUES / 8; ++i) {
          o[0][i] *= keep[i / 2 % 2];
          o[1][i] *= keep[i / 2 % 2];
        }
      }
      const int stage = blocks % STAGES;
      barrier_wait(barriers.full(stage), blocks / STAGES & 1);
      const u64 values =
          matrix_descriptor(smem + KV_AT + stage * STAGE + group * (VALUES / 2 / 64) * PANEL, ROW, PANEL, 8 * ROW);
      wgmma_pin(o[0]);
      wgmma_pin(o[1]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < BLOCK / 16; ++i)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          Wgmma<VALUES / 4>::rs(o[side], p[i], values + (side * (VALUES / 4 / 64) * PANEL + i * 16 * ROW) / 16);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(o[0]);
      wgmma_pin(o[1]);
      if (lane == 0) barrier_arrive(barriers.freed(stage));
    }
    barrier_wait(barriers.weights(), messages & 1);
    const float inverse[2] = {factors[row], factors[row + 8]}, log[2] = {logs[row], logs[row + 8]};
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.weights_freed());
    ++messages;
    const Part part = work.part_of(rows, run);
    const size_t target = (size_t)run.row * HEADS + run.item * TILE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row + half * 8;
      if (m >= M) continue;
      const size_t slot = (size_t)part.slot * M + m;
#pragma unroll
      for (int i = 0; i < VALUES / 16; ++i) {
        const int dim = group * (VALUES / 2) + i * 8 + lane % 4 * 2;
        const float* const two = &o[i / (VALUES / 32)][i % (VALUES / 32) * 4 + half * 2];
        const float x = two[0] * inverse[half], y = two[1] * inverse[half];
        if (part.complete()) *(u32*)(out + (target + m) * VALUES + dim) = pack_bf16(x, y);
        else *(float2*)(part_out + slot * VALUES + dim) = make_float2(x, y);
      }
      if (group == 0 && lane % 4 == 0) {
        if (part.complete()) lse[target + m] = log[half] < UNSEEN ? MASKED : log[half] * LN2;
        else part_lse[slot] = log[half];
      }
    }
    if (!part.complete()) {
      __threadfence();
      named_sync(2, 256);
      if (group == 0 && thread == 0) rows.flags[0] = atomicAdd(finished + part.from, 1);
      named_sync(2, 256);
      if (rows.flags[0] == part.to - part.from) {  // all others have
        __threadfence();
        merge_parts<VALUES, M, 8>(part_out, part_lse, out, lse, part, group * 4 + thread / 32, lane, [&](int m) {
          return target + m;
        });
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) latent_decode(
    const u16* q,          // [R, HEADS, H]
    const u16* kv,         // [P, O, H]
    const int* pages,      // [R, W]
    const int* positions,  // [R]
    const int* first,      // [R]
    const int*,            // `finished`, which begins as zeros
    u16* out,              // [R, HEADS, VALUES]
    float* lse,            // [R, HEADS]
    float* part_out,       // [2 CTAS, M, VALUES]
    float* part_lse,       // [2 CTAS, M], to the base 2
    int* finished          // [CTAS], of the item that begins in the CTA and does not end there: CTAs that have finished
) {
  DYNAMIC_SHARED(shared);
  const u32 smem = shared_address(shared);
  const int cta = blockIdx.y * gridDim.x + blockIdx.x, group = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (cta >= CTAS) return;
  const Barriers barriers = {smem + BARRIERS_AT};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(barriers.full(stage), COPIERS);
      barrier_init(barriers.freed(stage), 8);  // the warps of values
    }
    barrier_init(barriers.weights(), 128);
    barrier_init(barriers.weights_freed(), 8);
    barrier_init_fence();
  }
  const Rows rows(shared + TABLES_AT, gridDim.x);
  const Work work(rows, positions, first, cta);  // its barriers show those above, too
#pragma unroll 1
  for (int r = cta; r < rows.count; r += CTAS) {  // rows that see nothing
    if (rows.last[r] >= 0) continue;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS * VALUES / 2; i += THREADS)
      ((u32*)out)[(size_t)r * (HEADS * VALUES / 2) + i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS; i += THREADS) lse[r * HEADS + i] = MASKED;
  }
  if (group == 0) {
    registers_fewer<40>();
    copy(smem, barriers, rows, work.walk, kv, pages, thread / COPIERS, thread % COPIERS);
  } else if (group == 1) {
    registers_fewer<104>();
    make_weights(shared, smem, barriers, rows, work.walk, q, first, thread);
  } else {
    registers_more<184>();
    multiply_values(
        shared, smem, barriers, rows, work, out, lse, part_out, part_lse, finished, group - 2, thread
    );
  }
}
