// How the blocks of threads (CTAs) of a decode attention kernel share its work, and merge what they share.
//
// The work is a list of items: those of row 0, then those of row 1, ... . An item has blocks of BLOCK tokens; how many
// is known when the kernel runs, and so is how CTAs share the list:
//   - where no row is longer than WHOLE blocks, or whole items fill the CTAs evenly, CTA c has items c, c + CTAS, ... :
//     nothing has to be merged, and what the first item needs can be fetched before anything else is known
//   - else each CTA has an equal, contiguous share of all blocks, so that neither long nor short rows, nor padding,
//     leave part of the GPU idle. CTAs that share an item leave partial results, each at most two, and the last of them
//     to finish merges those of the item.
//
// With ITEMS_IN_EQUAL_PARTS, items of one length are shared so that no CTA has parts of two, where nearly all CTAs have one.
//
// With COUNTED_BY_WARPS, 1: each warp counts rows for itself, without barriers; for at most 128 rows of one query token.
//
// Macros: CTAS; MIN_SHARE, the fewest blocks worth a CTA; WHOLE; FIRST (queries have a first visible key).
// Constants of the includer: ITEMS of a row, BLOCK, Q query tokens of a row, WARPS and THREADS.
#pragma once
#include "ptx.cuh"

#ifndef COUNTED_BY_WARPS
#define COUNTED_BY_WARPS 0
#endif

constexpr float MASKED = -1e30f, UNSEEN = -1e29f;

// The rows of a call, in shared memory: their last visible keys (-1: none), their first blocks, and the blocks of one
// item before each, which are only counted where that matters. The tables are filled by Work.
struct Rows {
  int count;
  int* flags;   // [2 WARPS]
  int* last;    // [count]
  int* before;  // [count + 1]
  int* low;     // [count], only where not all are 0

  DEVICE Rows(u8* tables, int count) : count(count) {
    flags = (int*)tables;
    last = flags + 2 * WARPS;
    before = last + count;
    low = before + count + 1;
  }
  DEVICE int first_block(int row) const { return FIRST ? low[row] : 0; }
  DEVICE int blocks(int row) const { return last[row] < 0 ? 0 : last[row] / BLOCK - first_block(row) + 1; }
};

// Blocks of one item that follow each other.
struct Run {
  int row, item, blocks;  // item: of the row
  int token, last;        // first token of the first block; last visible one of the row
};

constexpr int ROWS_OF_LANE = 4;

// What a CTA still has to do: from block `skip` of item `item`, at most `budget` blocks.
struct Walk {
  int item, skip, budget;
  bool whole;

  // The next blocks, at most `most`; none at the end.
  DEVICE Run take(const Rows& rows, int most) {
    Run run = {0, 0, 0, 0, -1};
#pragma unroll 1
    while (item < rows.count * ITEMS && budget > 0) {
      const int row = item / ITEMS, left = rows.blocks(row) - skip;
      if (left > 0) {
        run.row = row;
        run.item = item % ITEMS;
        run.token = (rows.first_block(row) + skip) * BLOCK;
        run.last = rows.last[row];
        run.blocks = min(min(left, most), budget);
        budget -= run.blocks;
        skip += run.blocks;
        if (run.blocks == left) {
          item += whole ? CTAS : 1;
          skip = 0;
        }
        break;
      }
      item = whole ? item + CTAS : (row + 1) * ITEMS;  // the row sees nothing
    }
    return run;
  }
};

// A run as a part of its item: CTAs `from` to `to` have one each, and this one's goes to `slot` of 2 CTAS.
struct Part {
  int from, to, slot;

  DEVICE bool complete() const { return from == to; }
  DEVICE int slot_of(int part) const { return 2 * (from + part) + (part == 0); }
  DEVICE int count() const { return to - from + 1; }
};

// What CTA `cta` has to do; called by all threads.
struct Work {
  Walk walk;
  int cta, total, ctas;  // blocks of all items, and CTAs that share them
  bool pairs;            // each item has two CTAs, which have nothing else

  DEVICE Work(const Rows& rows, const int* positions, const int* first, int cta) : cta(cta), total(0), ctas(CTAS), pairs(false) {
    walk.item = cta;
    walk.skip = 0;
    walk.budget = 0x7fffffff;
    int before[ROWS_OF_LANE], longest;
    if (COUNTED_BY_WARPS) {
      longest = count_alone(rows, positions, first, before, total);
      walk.whole = longest <= WHOLE;
      if (walk.whole) return;
    } else {
      walk.whole = look(rows, positions, first);
      if (walk.whole) return;
      longest = count(rows);
      total = rows.before[rows.count];
    }
    total *= ITEMS;
    const int turns = (rows.count * ITEMS + CTAS - 1) / CTAS;
    walk.whole = 0.95f * turns * longest * CTAS <= total;
    if (walk.whole) return;
    ctas = min(CTAS, (total + MIN_SHARE - 1) / MIN_SHARE);
#ifdef ITEMS_IN_EQUAL_PARTS
    const int items = rows.count * ITEMS;
    if (total == items * longest) {
      int each = ctas / items;
      while (each > 1 && longest % each) --each;
      if (each * items >= 0.95f * ctas) ctas = each * items, pairs = each == 2;
    }
#endif
    if (cta >= ctas) {
      walk.budget = 0;
      return;
    }
    const int start = begin(cta);
    int low = 0, high = rows.count;  // before[low] * ITEMS <= start < before[high] * ITEMS
    if (COUNTED_BY_WARPS) {
      low = -1;
#pragma unroll
      for (int i = 0; i < ROWS_OF_LANE; ++i) low += __popc(__ballot_sync(~0u, before[i] * ITEMS <= start));
    }
#pragma unroll 1
    while (!COUNTED_BY_WARPS && high - low > 1) {
      const int middle = (low + high) / 2;
      if (rows.before[middle] * ITEMS <= start) low = middle;
      else high = middle;
    }
    const int blocks = rows.before[low + 1] - rows.before[low], skip = start - rows.before[low] * ITEMS;
    walk.item = low * ITEMS + skip / blocks;
    walk.skip = skip % blocks;
    walk.budget = begin(cta + 1) - start;
  }

  // CTA c has blocks [begin(c), begin(c + 1)) of the list.
  DEVICE int begin(int cta) const { return total / ctas * cta + min(cta, total % ctas); }
  DEVICE int owner(int block) const {
    const int each = total / ctas, more = total % ctas;  // the first `more` have one more
    return block < more * (each + 1) ? block / (each + 1) : more + (block - more * (each + 1)) / each;
  }

  DEVICE Part part_of(const Rows& rows, const Run& run) const {
    if (walk.whole) return {0, 0, 0};
    const int count = rows.before[run.row + 1] - rows.before[run.row];
    const int start = rows.before[run.row] * ITEMS + run.item * count;
    const int from = owner(start);
    return {from, owner(start + count - 1), 2 * cta + (from == cta)};
  }

  // The rows that a thread counts.
  DEVICE static void rows_of_thread(const Rows& rows, int& from, int& to) {
    const int each = (rows.count + THREADS - 1) / THREADS;
    from = min((int)threadIdx.x * each, rows.count);
    to = min(from + each, rows.count);
  }

  // Fills the tables, by each warp alone: all of them write the same. before: the blocks before rows of this lane, whose
  // rows follow those of the lane below, and very many for what are none; total: of all. The longest row.
  DEVICE static int count_alone(
      const Rows& rows, const int* positions, const int* first, int (&before)[ROWS_OF_LANE], int& total
  ) {
    static_assert(!COUNTED_BY_WARPS || Q == 1, "one query token of a row");
    const int lane = threadIdx.x % 32, each = (rows.count + 31) / 32;
    int last[ROWS_OF_LANE], low[ROWS_OF_LANE], upto = 0, longest = 0;
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; ++i) {
      const int r = lane * each + i;
      const bool real = i < each && r < rows.count;
      last[i] = real ? positions[r] : -1;
      low[i] = FIRST && real ? max(first[r], 0) : 0;
    }
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; ++i) {
      const int r = lane * each + i;
      const bool real = i < each && r < rows.count;
      if (last[i] < low[i]) last[i] = -1;
      low[i] = last[i] < 0 ? 0 : low[i] / BLOCK;
      const int blocks = last[i] < 0 ? 0 : last[i] / BLOCK - low[i] + 1;
      before[i] = real ? upto : 0x7fffffff / ITEMS;
      upto += blocks;
      longest = max(longest, blocks);
      if (real) rows.last[r] = last[i];
      if (FIRST && real) rows.low[r] = low[i];
    }
    const int mine = upto;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(~0u, upto, by);
      if (lane >= by) upto += other;
      longest = max(longest, __shfl_xor_sync(~0u, longest, by));
    }
#pragma unroll
    for (int i = 0; i < ROWS_OF_LANE; ++i) {
      const int r = lane * each + i;
      if (i >= each || r >= rows.count) continue;
      before[i] += upto - mine;
      rows.before[r] = before[i];
    }
    total = __shfl_sync(~0u, upto, 31);
    if (lane == 0 && rows.count) rows.before[rows.count] = total;
    __syncwarp();
    return longest;
  }

  // Fills the tables but for `before`; true if no row has more than WHOLE blocks.
  DEVICE static bool look(const Rows& rows, const int* positions, const int* first) {
    int from, to, longest = 0;
    rows_of_thread(rows, from, to);
#pragma unroll 1
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
      if (FIRST) rows.low[r] = last < 0 ? 0 : low / BLOCK;
      longest = max(longest, rows.blocks(r));
    }
    const bool mine = __any_sync(~0u, longest > WHOLE);
    if (threadIdx.x % 32 == 0) rows.flags[threadIdx.x / 32] = mine;
    __syncthreads();
    bool any = false;
#pragma unroll 4
    for (int w = 0; w < WARPS; ++w) any |= rows.flags[w] != 0;
    return !any;
  }

  // Fills `before`; the longest row.
  DEVICE static int count(const Rows& rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int from, to, mine = 0, longest = 0;
    rows_of_thread(rows, from, to);
#pragma unroll 1
    for (int r = from; r < to; ++r) {
      rows.before[r] = mine;
      longest = max(longest, rows.blocks(r));
      mine += rows.blocks(r);
    }
    int upto = mine;  // over the threads
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(~0u, upto, by);
      if (lane >= by) upto += other;
      longest = max(longest, __shfl_xor_sync(~0u, longest, by));
    }
    __syncthreads();  // the flags were read
    if (lane == 31) {
      rows.flags[warp] = upto;
      rows.flags[WARPS + warp] = longest;
    }
    __syncthreads();
    int offset = upto - mine;
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) offset += rows.flags[w];
      longest = max(longest, rows.flags[WARPS + w]);
    }
#pragma unroll 1
    for (int r = from; r < to; ++r) rows.before[r] += offset;
    if (threadIdx.x == THREADS - 1) rows.before[rows.count] = offset + mine;
    __syncthreads();
    return longest;
  }
};

// Merges the parts of an item, MROWS results of DIMS numbers, by MWARPS warps, whose number here is `warp`.
//   part_out [2 CTAS, MROWS, DIMS], part_lse [2 CTAS, MROWS] to the base 2; out [.., DIMS], lse [..]
//   target(m): where result m goes
template <int DIMS, int MROWS, int MWARPS, class Target>
DEVICE void merge_parts(
    const float* part_out, const float* part_lse, u16* out, float* lse, const Part& part, int warp, int lane,
    Target target
) {
  constexpr int FOURS = (DIMS + 127) / 128;  // of dims of a lane
  // Parts whose loads are under way, as the includers' registers allow.
  constexpr int AT_ONCE = DIMS > 256 ? 4 : DIMS > 128 ? 2 : MWARPS > 8 ? (MROWS > 8 ? 4 : 8) : 16;
  const int parts = part.count();
#pragma unroll 1
  for (int m = warp; m < MROWS; m += MWARPS) {
    float high = MASKED;
#pragma unroll 1
    for (int i = lane; i < parts; i += 32) high = fmaxf(high, __ldcg(part_lse + (size_t)part.slot_of(i) * MROWS + m));
#pragma unroll
    for (int by = 16; by; by /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, by));
    float total = 0.f, x[FOURS][4] = {};
#pragma unroll 1
    for (int base = 0; base < parts; base += 32) {
      float mine = 0.f;
      if (base + lane < parts)
        mine = fast_exp2(__ldcg(part_lse + (size_t)part.slot_of(base + lane) * MROWS + m) - high);
      total += mine;
#pragma unroll 1
      for (int i = 0; i < 32 && base + i < parts; i += AT_ONCE) {
        float4 four[AT_ONCE][FOURS];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const float* from = part_out + ((size_t)part.slot_of(min(base + i + j, parts - 1)) * MROWS + m) * DIMS;
#pragma unroll
          for (int n = 0; n < FOURS; ++n) four[j][n] = __ldcg((const float4*)(from + min(n * 128 + 4 * lane, DIMS - 4)));
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const float weight = __shfl_sync(~0u, mine, i + j);  // 0 past the end
#pragma unroll
          for (int n = 0; n < FOURS; ++n) {
            x[n][0] += weight * four[j][n].x;
            x[n][1] += weight * four[j][n].y;
            x[n][2] += weight * four[j][n].z;
            x[n][3] += weight * four[j][n].w;
          }
        }
      }
    }
#pragma unroll
    for (int by = 16; by; by /= 2) total += __shfl_xor_sync(~0u, total, by);
    const size_t at = target(m);
    const float inverse = 1.f / total;
#pragma unroll
    for (int n = 0; n < FOURS; ++n) {
      const int dim = n * 128 + 4 * lane;
      if (dim < DIMS)
        *(uint2*)(out + at * DIMS + dim) = make_uint2(
            pack_bf16(x[n][0] * inverse, x[n][1] * inverse), pack_bf16(x[n][2] * inverse, x[n][3] * inverse)
        );
    }
    if (lane == 0) lse[at] = high < UNSEEN ? MASKED : (high + fast_log2(total)) * 0.6931471805599453f;
  }
}
