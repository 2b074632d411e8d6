// What the two prefill attention kernels share: the tile of work, its rows, shared memory layout, softmax, results.
//
// A tile is BLOCK_M consecutive rows of one prompt row and one KV head. The rows of a prompt row are its query tokens
// times the GROUP query heads of the KV head, token by token, so that all heads that read a key share its load and a
// tile spans few tokens, hence few partly visible blocks.
//
// Macros: HEAD_DIM GROUP KV_HEADS PAGE SCALE_LOG2 SOFTCAP (0: none) BLOCK_M BLOCK_N; BEFORE (tokens that queries and
// results have before those of the first row)
#pragma once
#include "ptx.cuh"

constexpr int HEADS = KV_HEADS * GROUP;  // query heads
constexpr int CHUNKS = HEAD_DIM / 8;     // of 16 bytes, of a head

// Keys, values and queries lie in shared memory in panels of 64 columns (32 where the head is no multiple of 64), a row
// of a panel after the other, the 16-byte chunks of a row permuted by the hardware's 128-byte (64-byte) swizzle.
constexpr int PANEL = HEAD_DIM % 64 == 0 ? 64 : 32;
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int PANEL_ROW = PANEL * 2;  // bytes

constexpr int Q_BYTES = BLOCK_M * HEAD_DIM * 2;
constexpr int KV_BYTES = BLOCK_N * HEAD_DIM * 2;
constexpr int PAGE_ELEMENTS = 2 * KV_HEADS * PAGE * HEAD_DIM;  // of a page of the pool

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
#define NONE __uint_as_float(0xff800000u)  // minus infinity
constexpr float SEES_NOTHING = -1e30f;
constexpr float HEADROOM = 8.0f;
// Scores are multiplied by this in the exponent; a soft cap has already scaled them.
constexpr float EXPONENT = SOFTCAP > 0 ? 1.0f : SCALE_LOG2;

// Byte offset of chunk c of row r + further in an array of `rows` rows; `further` is a multiple of 8, so that all the
// rows of one thread share the part that depends on its lane.
DEVICE u32 chunk_offset(int r, int further, int c, int rows) {
  const u32 permuted = r * PANEL_ROW >> 7 & (PANEL_ROW / 16 - 1);
  return r * PANEL_ROW + ((c % (PANEL / 8) ^ permuted) << 4) + (c / (PANEL / 8) * rows + further) * PANEL_ROW;
}

// The schedule is lines of eight numbers. The first one: tiles, pages of a row, query tokens of a row, pages of the pool.
// Then one for each tile: its prompt row, its first row there, the first and last key that any of its rows sees (none:
// last < 0), and the first and last key that all of its rows see which see any.
DEVICE int num_items(const int* __restrict__ schedule) { return schedule[0] * KV_HEADS; }

// A tile of one KV head.
struct Tile {
  int width, queries, row, start, first_key, last_key, full_from, full_to, head;

  DEVICE Tile(const int* __restrict__ schedule, int item) {
    width = schedule[1], queries = schedule[2];
    const int* line = schedule + 8 + item / KV_HEADS * 8;
    row = line[0], start = line[1], first_key = line[2], last_key = line[3], full_from = line[4], full_to = line[5];
    head = item % KV_HEADS;
  }
  DEVICE bool empty() const { return last_key < 0; }
  DEVICE int first_block() const { return first_key / BLOCK_N; }
  DEVICE int last_block() const { return last_key / BLOCK_N; }
  DEVICE bool masked(int block) const {
    return block * BLOCK_N < full_from || block * BLOCK_N + BLOCK_N - 1 > full_to;
  }
  // Index of the tile's row r into arrays [BEFORE + R * Q, N]; -1 past the end.
  DEVICE long long query(int r) const {
    const int at = start + r;
    if (at >= queries * GROUP) return -1;
    return (BEFORE + (long long)row * queries + at / GROUP) * HEADS + head * GROUP + at % GROUP;
  }
  // Index of its token into arrays [R, Q]; past the end, of the last one.
  DEVICE int token(int r) const { return row * queries + min(start + r, queries * GROUP - 1) / GROUP; }
};

// The keys that a row sees; first > last where it sees none.
struct Visible {
  int first, last;

  DEVICE Visible(const int* __restrict__ lasts, const int* __restrict__ firsts, int token) {
    last = lasts[token];
    first = max(firsts[token], 0);
  }
  DEVICE bool any() const { return first <= last; }
};

// The i-th chunk of an array that a thread of THREADS copies.
template <int THREADS>
struct Chunk {
  int r, further, c;

  DEVICE Chunk(int i, int thread) {
    constexpr int STEP = THREADS / CHUNKS;
    if (THREADS % CHUNKS == 0 && STEP % 8 == 0) {
      r = thread / CHUNKS, further = i * STEP, c = thread % CHUNKS;
    } else {
      const int at = i * THREADS + thread;
      r = at / CHUNKS, further = 0, c = at % CHUNKS;
    }
  }
  DEVICE int row() const { return r + further; }
  DEVICE u32 offset(int rows) const { return chunk_offset(r, further, c, rows); }
};

// The queries of a tile; rows past the end are zeros. Called by THREADS threads.
template <int THREADS>
DEVICE void load_queries(u32 to, const u16* __restrict__ q, const Tile& tile, int thread) {
#pragma unroll 4
  for (int i = 0; i < BLOCK_M * CHUNKS / THREADS; i++) {
    const Chunk<THREADS> chunk(i, thread);
    const long long from = tile.query(chunk.row());
    cp_async_16(to + chunk.offset(BLOCK_M), q + (from < 0 ? 0 : from) * HEAD_DIM + chunk.c * 8, from < 0 ? 0 : 16);
  }
}

// Pages of one block of keys, a lane each; fetched ahead, because their loads must not wait for this one.
struct Pages {
  static_assert(BLOCK_N / PAGE + 2 <= 32, "pages of a block must fit into a warp");
  const int* line;
  int width, block, id;

  DEVICE Pages(const int* __restrict__ page_table, const Tile& tile)
      : line(page_table + (long long)tile.row * tile.width), width(tile.width), block(0), id(0) {}
  DEVICE void fetch(int wanted, int lane) {
    const int at = wanted * BLOCK_N / PAGE + lane;
    block = wanted;
    id = wanted >= 0 && lane < BLOCK_N / PAGE + 2 && at < width ? line[at] : 0;
  }
};

// Where the pool has a key or value of a block that begins at `base`.
DEVICE long long pool_offset(const Pages& pages, const Tile& tile, int part, int key, int base) {
  const long long page = __shfl_sync(0xffffffffu, pages.id, key / PAGE - base / PAGE);
  return (((page * 2 + part) * KV_HEADS + tile.head) * PAGE + key % PAGE) * HEAD_DIM;
}

// One block of keys (part 0) or values (part 1); keys after the last that the tile sees are zeros.
template <int THREADS>
DEVICE void load_block(u32 to, const u16* __restrict__ kv, const Pages& pages, int part,
                       const Tile& tile, int thread) {
  static_assert(BLOCK_N * CHUNKS % THREADS == 0, "threads must share a block evenly");
  constexpr int STEP = THREADS / CHUNKS;
  // Rows of a page that follow each other in every block.
  constexpr int ROWS = PAGE % BLOCK_N == 0 ? BLOCK_N : BLOCK_N % PAGE == 0 ? PAGE : PAGE % 16 == 0 && BLOCK_N % 16 == 0 ? 16 : 8;
  const int base = pages.block * BLOCK_N;
  if (THREADS % CHUNKS == 0 && STEP % 8 == 0 && ROWS % STEP == 0 && BLOCK_N % ROWS == 0) {
    // An address for each run of rows: the others of a thread are so far from it that the instructions know.
    const int r = thread / CHUNKS, c = thread % CHUNKS, left = tile.last_key - base - r;
    const u16* mine = kv + ((part * KV_HEADS + tile.head) * PAGE + r) * HEAD_DIM + c * 8;
    const u32 at = to + chunk_offset(r, 0, c, BLOCK_N);
#pragma unroll
    for (int further = 0; further < BLOCK_N; further += ROWS) {
      const int key = base % PAGE + further;
      const int page = __shfl_sync(0xffffffffu, pages.id, key / PAGE);
      const u16* from = mine + (long long)page * PAGE_ELEMENTS + key % PAGE * HEAD_DIM;
#pragma unroll
      for (int i = 0; i < ROWS; i += STEP)
        cp_async_16(at + (further + i) * PANEL_ROW, from + i * HEAD_DIM, further + i <= left ? 16 : 0);
    }
    return;
  }
#pragma unroll 4
  for (int i = 0; i < BLOCK_N * CHUNKS / THREADS; i++) {
    const Chunk<THREADS> chunk(i, thread);
    const int key = base + chunk.row();
    const long long from = pool_offset(pages, tile, part, key, base);
    cp_async_16(to + chunk.offset(BLOCK_N), kv + from + chunk.c * 8, key <= tile.last_key ? 16 : 0);
  }
}

// Pages of e4m3 are copied as they are, each thread then converts what it has copied: sixteen elements at a time.
constexpr int WIDE_CHUNKS = HEAD_DIM / 16;

template <int THREADS>
DEVICE void load_packed(u32 to, const u8* __restrict__ kv, const Pages& pages, int part, const Tile& tile,
                        int thread) {
  static_assert(BLOCK_N * WIDE_CHUNKS % THREADS == 0, "threads must share a block evenly");
  const int base = pages.block * BLOCK_N;
#pragma unroll 4
  for (int i = 0; i < BLOCK_N * WIDE_CHUNKS / THREADS; i++) {
    const int at = i * THREADS + thread, key = base + at / WIDE_CHUNKS;
    const long long from = pool_offset(pages, tile, part, key, base);
    cp_async_16(to + at * 16, kv + from + at % WIDE_CHUNKS * 16, key <= tile.last_key ? 16 : 0);
  }
}

// Two e4m3, the bytes of a word that the selector picks, to two bf16: exact. With the exponent's bits moved to where
// bf16 has its own, a number is 2^-120 of what it was.
DEVICE u32 e4m3_to_bf16(u32 word, u32 selector) {
  const u32 high = select_bytes(word, 0, selector);
  return multiply_bf16((high & 0x80008000u) | (high & 0x7f007f00u) >> 4, 0x7b807b80u);
}

template <int THREADS>
DEVICE void unpack_block(u8* to, const u8* from, int thread) {
#pragma unroll 2
  for (int i = 0; i < BLOCK_N * WIDE_CHUNKS / THREADS; i++) {
    const int at = i * THREADS + thread, r = at / WIDE_CHUNKS, c = at % WIDE_CHUNKS * 2;
    const uint4 packed = *reinterpret_cast<const uint4*>(from + at * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 low = half ? packed.z : packed.x, high = half ? packed.w : packed.y;
      *reinterpret_cast<uint4*>(to + chunk_offset(r, 0, c + half, BLOCK_N)) =
          make_uint4(e4m3_to_bf16(low, 0x1404), e4m3_to_bf16(low, 0x3424), e4m3_to_bf16(high, 0x1404),
                     e4m3_to_bf16(high, 0x3424));
    }
  }
}

// A bit for each element that a thread has of a row of an accumulator (of columns 0, 1, 8, 9, 16...): those before a
// column. Selecting by bits takes half the instructions that comparing columns does.
DEVICE u32 bits_before(int column) {
  const int at = max(column, 0), count = at / 8 * 2 + min(at % 8, 2);
  return (u32)((1ull << min(count, 32)) - 1);
}

// Online softmax of the two rows that a thread has in an accumulator of 16 (64) rows: elements 0, 1 of each four are
// columns 2 * (lane % 4) and the next of row lane / 4, elements 2, 3 of row lane / 4 + 8.
//
// Probabilities are relative to a maximum that a row had, not to the one it has: as long as no score of the warp's rows is
// 2^HEADROOM times above, nothing that was accumulated is rescaled (as in FlashAttention-4). The quotient is the same.
struct Softmax {
  float max[2], sum[2], keep[2];
  bool rescaled;

  DEVICE void reset() {
    max[0] = max[1] = NONE, sum[0] = sum[1] = 0.0f;
  }

  // Scores to probabilities; what was accumulated before is to be multiplied by keep, if `rescaled`: else that is 1.
  template <int N>
  DEVICE void step(float (&s)[N], bool masked, int base, const Visible (&rows)[2], int lane) {
    static_assert(N <= 64, "a bit for each element of a row");
    if (SOFTCAP > 0) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        // tanh(x) = 1 - 2 / (1 + exp(2x)); the hardware's tanh is too coarse for caps as large as 50.
        const float e = fast_exp2(s[i] * (SOFTCAP > 0 ? 2.0f * SCALE_LOG2 / SOFTCAP : 0.0f));
        s[i] = SOFTCAP * LOG2E * (1.0f - 2.0f * fast_reciprocal(1.0f + e));
      }
    }
    if (masked) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int shift = base + lane % 4 * 2;
        const u32 visible = bits_before(rows[half].last - shift + 1) & ~bits_before(rows[half].first - shift);
#pragma unroll
        for (int i = 0; i < N / 4; i++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (!(visible >> (i * 2 + e) & 1)) s[i * 4 + half * 2 + e] = NONE;
      }
    }
    float tops[2][2] = {{max[0], NONE}, {max[1], NONE}};  // four chains: each maximum waits for the one before
#pragma unroll
    for (int i = 0; i < N / 4; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float& top = tops[half][i % 2];
        top = fmaxf(top, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
      }
    float top[2];
    bool above = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[half] = fmaxf(tops[half][0], tops[half][1]);
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
      above |= !((top[half] - HEADROOM / EXPONENT) <= max[half]);
    }
    rescaled = __any_sync(0xffffffffu, above);
    keep[0] = keep[1] = 1.0f;
    if (rescaled) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        keep[half] = fast_exp2(max[half] * EXPONENT - (top[half] == NONE ? 0.0f : top[half] * EXPONENT));
        max[half] = top[half];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float zero = max[half] == NONE ? 0.0f : max[half] * EXPONENT;  // a row may see nothing of this block
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < N / 4; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& p = s[i * 4 + half * 2 + e];
          p = fast_exp2(p * EXPONENT - zero);
          total += p;
        }
      sum[half] = sum[half] * keep[half] + total;
    }
  }

  // Sums over the threads of a row.
  DEVICE void finish() {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    }
  }
};

// Elements i..i + 3 of an accumulator: one tile of mma.sync.
template <int N>
DEVICE float (&four(float (&x)[N], int i))[4] {
  return *reinterpret_cast<float(*)[4]>(&x[i]);
}

template <int N>
DEVICE void rescale(float (&o)[N], const float (&keep)[2]) {
#pragma unroll
  for (int i = 0; i < N; i++) o[i] *= keep[i / 2 % 2];
}

// Words of the four lanes of a row, transposed: lane i of the four gets word i of each.
DEVICE void transpose(u32 (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const u32 other = __shfl_xor_sync(0xffffffffu, lane & bit ? w[i] : w[i + bit], bit);
      if (lane & bit) {
        w[i] = other;
      } else {
        w[i + bit] = other;
      }
    }
}

// Writes a thread's part of the two rows r and r + 8 of a tile.
template <int N>
DEVICE void store(const float (&o)[N], const Softmax& softmax, const Visible (&rows)[2], const Tile& tile, int r,
                  int lane, u16* __restrict__ out, float* __restrict__ lse) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const long long at = tile.query(r + half * 8);
    const bool any = !tile.empty() && rows[half].any();
    const float inverse = any ? 1.0f / softmax.sum[half] : 0.0f;
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float* pair = &o[i * 16 + j * 4 + half * 2];
        words[j] = any ? pack_bf16(pair[0] * inverse, pair[1] * inverse) : 0;
      }
      transpose(words, lane);  // now eight columns that follow each other
      if (at < 0) continue;
      *reinterpret_cast<uint4*>(out + at * HEAD_DIM + i * 32 + lane % 4 * 8) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (lane % 4 == 0 && at >= 0) {
      const float log2 = softmax.max[half] * EXPONENT + fast_log2(softmax.sum[half]);
      lse[at] = any ? log2 * LN2 : SEES_NOTHING;
    }
  }
}

// Writes the results of a tile that sees nothing: a thread for each row.
DEVICE void store_nothing(const Tile& tile, int thread, u16* __restrict__ out, float* __restrict__ lse) {
  const long long at = tile.query(thread);
  if (thread >= BLOCK_M || at < 0) return;
  for (int c = 0; c < CHUNKS; c++) *reinterpret_cast<uint4*>(out + at * HEAD_DIM + c * 8) = make_uint4(0, 0, 0, 0);
  lse[at] = SEES_NOTHING;
}
