// Two warpgroups with half of each result of attention over latents take turns: see latent_many.cu.
//
// Macros: H; VALUES; CLUSTER; VALUES_FIRST; FIRST. Constants of the includer: BLOCK; TILE; M; STAGES;
// QUERY_PANEL; KV_AT and TOLD_AT, where stages and what blocks' weights go with are; TO_EXPONENT; NOTHING. A function of it:
// phase_ends(shared, which).
#pragma once
#include "latent_copies.cuh"

// A warpgroup: half of the results, and the weights of every other block.
struct Attention {
  u8* shared;
  u32 smem;
  int group, thread, lane, row;
  float o[VALUES / 4], s[BLOCK / 2];
  u32 theirs[BLOCK / 16][4], mine[BLOCK / 16][4];  // weights
  float top[2], own_top[2], sum[2];                // own: of the last block whose weights this warpgroup made

  DEVICE Attention(u8* shared, u32 smem, int group, int thread)
      : shared(shared), smem(smem), group(group), thread(thread), lane(thread % 32), row(thread / 32 * 16 + lane / 4) {}

  DEVICE float2* told(int stage) const { return (float2*)(shared + TOLD_AT) + stage * TILE; }
  DEVICE uint4* weights(int stage) const { return (uint4*)(shared + KV_AT + stage * STAGE + WEIGHTS_IN_STAGE); }

  DEVICE void load_queries(const u16* from) {
    const int m = (group * 128 + thread) / 8, chunk = thread % 8;
    const u32 to = smem + m * ROW + ((chunk ^ m % 8) << 4);
#pragma unroll
    for (int i = 0; i < TILE; i += 32) {
      const bool real = m + i < M;
      const u16* const row = from + (real ? m + i : 0) * H + chunk * 8;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
        cp_async_16(to + panel * QUERY_PANEL + i * ROW, row + panel * 64, real ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_products();
    named_sync(3, 256);
  }

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) o[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = own_top[i] = MASKED, sum[i] = 0.f;
  }

  // Begins the scores of this warpgroup's next block, panel by panel as they come: those of its own columns first, whose
  // room came free before. count: of all its CTA's blocks before.
  DEVICE void multiply_keys(int count) {
    const int stage = uniform(stage_of(count));
    const u32 phase = phase_of(count), own = uniform(group) * HALF, panels = uniform(smem) + KV_AT + stage * STAGE;
    const u64 keys = matrix_descriptor(panels, ROW, 16, 8 * ROW);
    const u64 query = matrix_descriptor(uniform(smem), ROW, 16, 8 * ROW);
    wgmma_pin(s);
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
      const int panel = i < 2 * HALF ? i ^ own : i;
      barrier_wait(panel_full(smem, stage, panel), phase);
      const u64 a = descriptor_at(query, panel * QUERY_PANEL), b = descriptor_at(keys, panel * PANEL);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) Wgmma<BLOCK>::ss(s, descriptor_at(a, k * 32), descriptor_at(b, k * 32), i + k > 0);
    }
    wgmma_commit();
  }

  // Begins result += weights @ values.
  DEVICE void multiply_values(int stage, const u32 (&p)[BLOCK / 16][4]) {
    const u32 panels = uniform(smem) + KV_AT + uniform(stage) * STAGE + uniform(group) * HALF * PANEL;
    const u64 values = matrix_descriptor(panels, ROW, PANEL, 8 * ROW);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i) Wgmma<VALUES / 2>::rs(o, p[i], descriptor_at(values, i * 16 * ROW));
    wgmma_commit();
  }

  // After products with values: this warpgroup's half of the stage may be overwritten.
  DEVICE void free(int stage) {
    wgmma_pin(o);
    if (lane < CLUSTER) {
      if (CLUSTER == 1) barrier_arrive(half_freed(smem, stage, group));
      else cluster_arrive(half_freed(smem, stage, group), lane);
    }
  }

  DEVICE void shrink(float first, float second) {
    if (!__any_sync(~0u, first != 1.f || second != 1.f)) return;
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) o[i] *= i / 2 % 2 ? second : first;
  }

  // The other warpgroup's weights of its block, `count`; results shrink to what goes with them.
  DEVICE void take_weights(int count) {
    const int stage = stage_of(count);
    barrier_wait(weights_ready(smem, stage), phase_of(count));
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i) {
      const uint4 four = weights(stage)[i * 128 + thread];
      theirs[i][0] = four.x, theirs[i][1] = four.y, theirs[i][2] = four.z, theirs[i][3] = four.w;
    }
    const float2 first = told(stage)[row], second = told(stage)[row + 8];
    top[0] = first.x, top[1] = second.x;
    shrink(first.y, second.y);
  }

  // Makes weights of the scores of tokens from `token` on, of which those from `lowest` to `last` are seen. keep: by how
  // much results shrink.
  DEVICE void make_weights(int token, int lowest, int last, float (&keep)[2]) {
    if (token + BLOCK - 1 > last || FIRST && token < lowest) {
#pragma unroll
      for (int i = 0; i < BLOCK / 2; ++i) {
        const int key = token + lane % 4 * 2 + i / 4 * 8 + i % 2;
        if (key > last || FIRST && key < lowest) s[i] = NOTHING;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = s[half * 2];
#pragma unroll
      for (int i = 0; i < BLOCK / 8; ++i) high = fmaxf(high, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      high = fmaxf(top[half], high * TO_EXPONENT);
      keep[half] = fast_exp2(top[half] - high);
#pragma unroll
      for (int i = 0; i < BLOCK / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[i * 4 + half * 2 + j];
          x = fast_exp2(x * TO_EXPONENT - high);
        }
      sum[half] *= fast_exp2(own_top[half] - high);
      top[half] = own_top[half] = high;
    }
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mine[i][j] = pack_bf16(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1]);
  }

  // Adds them up, which nobody waits for.
  DEVICE void add_weights() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < BLOCK / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) total[j] += s[i * 4 + half * 2 + j];
      sum[half] += total[0] + total[1];
    }
  }

  // Tells the other warpgroup of them.
  DEVICE void tell_weights(int stage, int token, int last, const float (&keep)[2]) {
    const bool tail = token + BLOCK - 1 > last;
    named_sync(1 + group, 128);  // all have the scores: the last panel is read
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i)
      weights(stage)[i * 128 + thread] = make_uint4(mine[i][0], mine[i][1], mine[i][2], mine[i][3]);
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) told(stage)[row + half * 8] = make_float2(top[half], keep[half]);
    }
    if (tail) {  // what nobody sees may be anything, also NaNs
      const int seen = last - token + 1;
#pragma unroll 1
      for (int at = thread; at < (BLOCK - seen) * VALUES / 8; at += 128) {
        const int panel = at % (VALUES / 64), chunk = at / (VALUES / 64);
        *(uint4*)(shared + KV_AT + stage * STAGE + panel * PANEL + seen * ROW + chunk * 16) = make_uint4(0, 0, 0, 0);
      }
      fence_products();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(weights_ready(smem, stage));
    if (tail) named_sync(1 + group, 128);
  }

  // Block `block` of a run, of this warpgroup, and the values of the one before, of the other; BEFORE: whether there is one.
  template <bool BEFORE>
  DEVICE void step(int before, const Run& run, int block, int lowest) {
    const int count = before + block;
    if (BEFORE && VALUES_FIRST) {
      multiply_their_values(count - 1);
      wgmma_wait<0>();  // not after the keys, which may be late
      end_their_values(count - 1);
      multiply_keys(count);
      phase_ends(shared, 2);
      wgmma_wait<0>();
    } else {
      multiply_keys(count);
      phase_ends(shared, 2);
      if (BEFORE) {
        multiply_their_values(count - 1);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
    }
    wgmma_pin(s);
    phase_ends(shared, 4);
    float keep[2];
    make_weights(run.token + block * BLOCK, lowest, run.last, keep);
    phase_ends(shared, 5);
    if (BEFORE && !VALUES_FIRST) {
      wgmma_wait<0>();
      end_their_values(count - 1);
    }
    tell_weights(stage_of(count), run.token + block * BLOCK, run.last, keep);
    phase_ends(shared, 10);
    shrink(keep[0], keep[1]);
    multiply_values(stage_of(count), mine);
    add_weights();
    wgmma_wait<0>();
    keep_weights(mine);
    free(stage_of(count));
    phase_ends(shared, 7);
  }

  // Begins products of block `count`, of the other warpgroup; and what comes after their end.
  DEVICE void multiply_their_values(int count) {
    take_weights(count);
    phase_ends(shared, 3);
    multiply_values(stage_of(count), theirs);
  }
  DEVICE void end_their_values(int count) {
    keep_weights(theirs);
    free(stage_of(count));
    phase_ends(shared, 6);
  }

  // Products read registers behind the compiler's back: until here they hold the weights.
  DEVICE static void keep_weights(u32 (&p)[BLOCK / 16][4]) {
#pragma unroll
    for (int i = 0; i < BLOCK / 16; ++i) wgmma_pin(p[i]);
  }

  // All blocks of a run. before: blocks of the runs before it.
  DEVICE void attend(int before, const Run& run, int lowest) {
    int block = (group ^ before) & 1;
    if (block == 0) {
      step<false>(before, run, block, lowest);
      block += 2;
    }
#pragma unroll 1
    for (; block < run.blocks; block += 2) step<true>(before, run, block, lowest);
    if (block > run.blocks) return;
    multiply_their_values(before + block - 1);  // the last block is the other's
    wgmma_wait<0>();
    end_their_values(before + block - 1);
  }
};
