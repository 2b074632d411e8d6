// Attention of one token, in the middle of a layer that is one launch. Sizes come from the header before it: moe_layer.cuh
// or dense_layer.cuh.
//
// Attention reads pages straight to registers. A unit is 16 tokens of a KV head, with all its query heads, for one warp;
// heads are the rows of products. A contraction may take its numbers in any order as long as both sides take the same, so
// a lane reads 16 consecutive bytes of a key; of values it reads the same 16 bytes of two tokens, and mixes them. A block
// has units of one KV head. A short context is one block's; a long one's parts are merged by one block for each head.
#pragma once
#include "one_token.cuh"

constexpr float MASKED = -1e30f;
constexpr int KEY_PARTS = H / 32, VALUE_PARTS = H / 64;  // of 16 bytes for a lane
static_assert(H == 64 || H == 128, "heads");

// A lane's part of a norm over a head, and of the angles' cosines and sines.
struct Turn {
  float2 weight[2], cosine, sine;
};
// By a warp: a head of the token, normed and rotated where it has to be. told: its two halves.
DEVICE void prepare_head(const uint2* told, u16* to, u16* also, const Turn& turn, bool rotates, float eps) {
  const int lane = threadIdx.x % (H / 4);  // of a head of 64 numbers, two lanes have the same
  u32 two[2];
  float x[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    two[half] = two_of(told[half]);
    x[half][0] = low_of(two[half]);
    x[half][1] = high_of(two[half]);
  }
  if (rotates) {
    if (NORM_HEADS) {
      float sum = square(two[0]) + square(two[1]);
#pragma unroll
      for (int by = H / 8; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      const float factor = rsqrtf(sum / H + eps);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 normed = pack_bf16(x[half][0] * factor * turn.weight[half].x, x[half][1] * factor * turn.weight[half].y);
        x[half][0] = low_of(normed);
        x[half][1] = high_of(normed);
      }
    }
    const float a[2] = {x[0][0], x[0][1]}, b[2] = {x[1][0], x[1][1]};
    const float2 c = turn.cosine, s = turn.sine;
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

// The first IDLE blocks, which have no products (row_pairs.cuh), have room for units where others have their rings: for this
// many of each warp, after its first. They come while the queries are made, to the lanes that need them.
constexpr int UNIT_BYTES = 2 * UNIT * H * 2, ROOM = IDLE ? SLOTS * SLOT / UNIT_BYTES : 0;
static_assert(IDLE == 0 || IDLE == KV, "an idle block for each KV head");
DEVICE void copy_units(u8* shared, const int* pages, const u16* pool, int tokens, int part, int parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  u32 to = shared_address(shared + warp * (SLOTS * SLOT) + lane * 16);
#pragma unroll 1
  for (int turn = 1; turn <= ROOM; ++turn) {
    const int unit = (turn * parts + part) * WARPS + warp;
    if (unit * UNIT >= tokens) break;
    const size_t page = __ldg(pages + unit * UNIT / O);
    const u16* const keys = pool + ((page * 2 * KV + blockIdx.x % KV) * O + unit * UNIT % O) * H;
    const u16* const values = keys + (size_t)KV * O * H;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < KEY_PARTS; ++i, to += 512) cp_async_16(to, keys + (n * 8 + row) * H + i * 32 + quarter * 8, 16);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < VALUE_PARTS; ++i, to += 512)
        cp_async_16(to, values + (quarter * 2 + t % 2 + t / 2 * 8) * H + i * 64 + row * 8, 16);
  }
  cp_async_commit();
}

// Attention of a KV head's queries over the units of this block: part `part` of `parts`. Where there are no other parts,
// its result is told; otherwise `found` [BLOCKS, GROUP, H] and `sums` [BLOCKS, GROUP, 2] get this part of it.
DEVICE void attend(
    u8* shared, u32* words, const float* q_norm, const float* k_norm, const float* cosine, const float* sine,
    const int* page, const int* slot, const int* pages, u16* pool, float* found, float* sums, int tokens, int part,
    int parts, const Timeline& timeline, u32 mark = TOLD
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
  uint4 k[2][KEY_PARTS], v[4][VALUE_PARTS];
  const uint4 zero = make_uint4(0, 0, 0, 0);
  auto keys_of = [&](int unit, int turn) {
    return pool + (((size_t)__shfl_sync(~0u, batch, turn % 32) * 2 * KV + head) * O + unit * UNIT % O) * H;
  };
  auto load_keys = [&](const u16* keys) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < KEY_PARTS; ++i) k[n][i] = __ldcg((const uint4*)(keys + (n * 8 + row) * H + i * 32 + quarter * 8));
  };
  // What has come to the room of this block; turn: of the warp's units, from 1.
  const bool has_room = ROOM && (int)blockIdx.x < IDLE;
  const uint4* const room = (const uint4*)(shared + warp * (SLOTS * SLOT)) + lane;
  auto take_keys = [&](int turn) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < KEY_PARTS; ++i) k[n][i] = room[(turn - 1) * (UNIT_BYTES / 16) + (n * KEY_PARTS + i) * 32];
  };
  auto take_values = [&](int turn, int unit) {
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < VALUE_PARTS; ++i) {
        const uint4 x = room[(turn - 1) * (UNIT_BYTES / 16) + (2 * KEY_PARTS + t * VALUE_PARTS + i) * 32];
        v[t][i] = unit * UNIT + quarter * 2 + t % 2 + t / 2 * 8 < tokens ? x : zero;
      }
  };
  auto load_values = [&](const u16* keys, int unit) {
    const u16* const values = keys + (size_t)KV * O * H;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int at = quarter * 2 + t % 2 + t / 2 * 8;
#pragma unroll
      for (int i = 0; i < VALUE_PARTS; ++i)  // what follows the last token may be anything
        v[t][i] = unit * UNIT + at < tokens ? __ldcg((const uint4*)(values + at * H + i * 64 + row * 8)) : zero;
    }
  };
  // They come while the queries are made elsewhere.
  if (first < units) {
    const u16* const keys = keys_of(first, 0);
    load_keys(keys);
    load_values(keys, first);
  }

  // The block with the last unit writes the new key and value, before it reads any. A warp waits for all its heads at once.
  const bool writes = units ? (units - 1) / WARPS % parts == part : part == 0;
  const int heads = GROUP + (writes ? 2 : 0);
  constexpr int EACH = (GROUP + 2 + WARPS - 1) / WARPS;
  if (warp < heads) {
    const size_t place = ((size_t)__ldg(page) * 2 * KV + head) * O + __ldg(slot);
    auto number = [&](int n) { return min(warp + n * WARPS, heads - 1); };
    const int pair = lane % (H / 4);
    Turn turn[EACH];
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      turn[n].cosine = __ldg((const float2*)cosine + pair);
      turn[n].sine = __ldg((const float2*)sine + pair);
      if (NORM_HEADS)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          turn[n].weight[half] = __ldg((const float2*)(number(n) < GROUP ? q_norm : k_norm) + half * H / 4 + pair);
    }
    uint2 told[2 * EACH];
    collect(told, [&](int i) {
      const int of = number(i / 2);
      const int row = of < GROUP ? head * GROUP + of : HEADS + (of - GROUP) * KV + head;
      return words + TOLD_QKV + row * H + i % 2 * H / 2 + pair * 2;
    }, mark);
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int of = warp + n * WARPS;
      if (of >= heads) break;
      u16* const to = of < GROUP ? queries + of * WIDE : pool + (place + (size_t)(of - GROUP) * KV * O) * H;
      prepare_head(told + 2 * n, to, of < GROUP ? nullptr : new_ones + (of - GROUP) * H, turn[n], of <= GROUP, EPS);
    }
  }
  if (has_room) cp_async_wait<0>();
  __syncthreads();
  timeline.mark(3);
  uint4 query[KEY_PARTS];
#pragma unroll
  for (int i = 0; i < KEY_PARTS; ++i) query[i] = row < GROUP ? *(const uint4*)(queries + row * WIDE + i * 32 + quarter * 8) : zero;

  float out[VALUE_PARTS][8][4] = {}, top = MASKED, sum = 0.f;
#pragma unroll 1
  for (int unit = first, turn = 0; unit < units; unit += step, ++turn) {
    const int token = unit * UNIT, newest = tokens - 1 - token;
    if (newest < UNIT) {  // in the pool it may not be seen yet
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < KEY_PARTS; ++i)
          if (n * 8 + row == newest) k[n][i] = *(const uint4*)(new_ones + i * 32 + quarter * 8);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int i = 0; i < VALUE_PARTS; ++i)
          if (quarter * 2 + t % 2 + t / 2 * 8 == newest) v[t][i] = *(const uint4*)(new_ones + H + i * 64 + row * 8);
    }
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < KEY_PARTS; ++i) {
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
      if (has_room && turn < ROOM) take_keys(turn + 1);
      else load_keys(next);
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
    for (int i = 0; i < VALUE_PARTS; ++i) {
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
    if (next && has_room && turn < ROOM) take_values(turn + 1, unit + step);
    else if (next) load_values(next, unit + step);
  }
  if (has_room) timeline.mark(4);
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
    for (int i = 0; i < VALUE_PARTS; ++i)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 a = make_float4(out[i][0][n], out[i][1][n], out[i][2][n], out[i][3][n]);
        const float4 b = make_float4(out[i][4][n], out[i][5][n], out[i][6][n], out[i][7][n]);
        to[i * 16 + n * 2 + (last_first ? 1 : 0)] = last_first ? b : a;
        to[i * 16 + n * 2 + (last_first ? 0 : 1)] = last_first ? a : b;
      }
  }
  __syncthreads();
  if (has_room) timeline.mark(5);
  for (int at = threadIdx.x; at < GROUP * H / 4; at += THREADS) {  // four dims of a head
    const int m = at / (H / 4), dim = at % (H / 4) * 4;
    float most = MASKED, total = 0.f;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    float2 of_warp[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      of_warp[w] = *(const float2*)(of_warps + (w * GROUP + m) * 2);
      most = fmaxf(most, of_warp[w].x);
    }
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float by = fast_exp2(of_warp[w].x - most);
      const float4 four = *(const float4*)(results + (w * GROUP + m) * WIDE + dim);
      total += of_warp[w].y * by;
      x = make_float4(x.x + four.x * by, x.y + four.y * by, x.z + four.z * by, x.w + four.w * by);
    }
    if (parts == 1) {
      const float by = total > 0.f ? 1.f / total : 0.f;
      u32* const to = words + TOLD_HEADS + (head * GROUP + m) * H + dim;
      tell(to, words_of(pack_bf16(x.x * by, x.y * by), mark));
      tell(to + 2, words_of(pack_bf16(x.z * by, x.w * by), mark));
    } else {
      const size_t of = (size_t)blockIdx.x * GROUP + m;
      *(float4*)(found + of * H + dim) = x;
      if (dim == 0) *(float2*)(sums + of * 2) = make_float2(most, total);
    }
  }
}

// The parts of the heads that this block merges.
DEVICE void merge(const float* found, const float* sums, u32* words, int parts, u32 mark = TOLD) {
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
      tell(words + TOLD_HEADS + head * H + dim, word_of(pack_bf16(x / total, 0.f), mark));
    }
  }
}
