// Prefill attention over paged keys and values with mma.sync: FlashAttention-2 (arXiv 2307.08691).
//
// Needs nothing of Hopper; beside it stands paged_prefill.cu, which does. A block has WARPS warps of 16 * TALL rows each;
// keys and values come through STAGES buffers, from the last visible block to the first.
//
// Macros: those of prefill.cuh, WARPS TALL STAGES
#include "prefill.cuh"

constexpr int THREADS = WARPS * 32;
static_assert(BLOCK_M == WARPS * TALL * 16, "a row for each thread quad");

extern "C" __global__ void __launch_bounds__(THREADS) paged_prefill_mma(
  const u16* __restrict__ q, const u16* __restrict__ kv, const int* __restrict__ page_table,
  const int* __restrict__ lasts, const int* __restrict__ firsts, const int* __restrict__ schedule,
  u16* __restrict__ out, float* __restrict__ lse) {
  DYNAMIC_SHARED(smem);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const u32 q_smem = shared_address(smem), kv_smem = q_smem + Q_BYTES;
  const Tile tile(schedule, blockIdx.x);
  const int row = warp * TALL * 16 + lane / 4;

  float o[TALL][HEAD_DIM / 2];
  Softmax softmax[TALL];
  Visible rows[TALL][2] = {
    {{lasts, firsts, tile.token(row)}, {lasts, firsts, tile.token(row + 8)}},
#if TALL == 2
    {{lasts, firsts, tile.token(row + 16)}, {lasts, firsts, tile.token(row + 24)}},
#endif
  };
#pragma unroll
  for (int t = 0; t < TALL; t++) {
    softmax[t].reset();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[t][i] = 0.0f;
  }
  if (!tile.empty()) {
    const int first = tile.first_block(), last = tile.last_block();
    Pages pages(page_table, tile);
    auto load = [&](int slot) {
      const u32 to = kv_smem + slot * 2 * KV_BYTES;
      if (pages.block >= first) {
        load_block<THREADS>(to, kv, pages, 0, tile, thread);
        load_block<THREADS>(to + KV_BYTES, kv, pages, 1, tile, thread);
      }
      cp_async_commit();
      pages.fetch(pages.block - 1, lane);
    };
    pages.fetch(last, lane);
    load_queries<THREADS>(q_smem, q, tile, thread);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s);

    int slot = 0;
    for (int block = last; block >= first; block--) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(slot == 0 ? STAGES - 1 : slot - 1);  // the buffer that was read in the step before
      const u32 k_smem = kv_smem + slot * 2 * KV_BYTES, v_smem = k_smem + KV_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;

      float s[TALL][BLOCK_N / 2];
#pragma unroll
      for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) s[t][i] = 0.0f;
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; k++) {
        u32 a[TALL][4];
#pragma unroll
        for (int t = 0; t < TALL; t++) {
          ldmatrix_x4(a[t], q_smem + chunk_offset(lane % 16, (warp * TALL + t) * 16, k * 2 + lane / 16, BLOCK_M));
        }
#pragma unroll
        for (int n = 0; n < BLOCK_N / 16; n++) {
          u32 b[4];
          ldmatrix_x4(b, k_smem + chunk_offset(lane / 16 * 8 + lane % 8, n * 16, k * 2 + lane / 8 % 2, BLOCK_N));
#pragma unroll
          for (int t = 0; t < TALL; t++) {
            mma_bf16(four(s[t], n * 8), a[t], b[0], b[1]);
            mma_bf16(four(s[t], n * 8 + 4), a[t], b[2], b[3]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < TALL; t++) {
        softmax[t].step(s[t], tile.masked(block), block * BLOCK_N, rows[t], lane);
        rescale(o[t], softmax[t].keep);
      }
#pragma unroll
      for (int k = 0; k < BLOCK_N / 16; k++) {
        u32 a[TALL][4];
#pragma unroll
        for (int t = 0; t < TALL; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) a[t][i] = pack_bf16(s[t][k * 8 + i * 2], s[t][k * 8 + i * 2 + 1]);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 16; n++) {
          u32 b[4];
          ldmatrix_x4_trans(b, v_smem + chunk_offset(lane % 16, k * 16, n * 2 + lane / 16, BLOCK_N));
#pragma unroll
          for (int t = 0; t < TALL; t++) {
            mma_bf16(four(o[t], n * 8), a[t], b[0], b[1]);
            mma_bf16(four(o[t], n * 8 + 4), a[t], b[2], b[3]);
          }
        }
      }
    }
    cp_async_wait<0>();
  }
#pragma unroll
  for (int t = 0; t < TALL; t++) {
    softmax[t].finish();
    store(o[t], softmax[t], rows[t], tile, row + t * 16, lane, out, lse);
  }
}
