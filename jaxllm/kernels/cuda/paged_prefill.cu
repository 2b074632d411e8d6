// Prefill attention over paged keys and values with wgmma: FlashAttention-3 (arXiv 2407.08608).
//
// One block stays on each multiprocessor and takes tile after tile. Its first warpgroup copies queries, keys and values
// into shared memory; two others have 64 rows each. Keys and values in bfloat16 are brought by the tensor memory
// accelerator, by a map of the pool that each block makes: instructions of threads that copy would keep those of the
// products waiting. Blocks of keys come from the last visible one to the first. The scores of a block are
// computed together with the output of the block before, so that the exponentials of the one overlap with the products
// of the other. The two warpgroups fall out of step by themselves: taking turns in starting products won nothing.
//
// Macros: those of prefill.cuh with BLOCK_M = 128; STAGES (buffers for keys, and as many for values), FP8 (pages are e4m3)
#include "hopper.cuh"
#include "prefill.cuh"
#include "tensor_map.cuh"

constexpr int GROUPS = 2;  // warpgroups that multiply
constexpr int THREADS = (1 + GROUPS) * 128;
static_assert(BLOCK_M == GROUPS * 64, "a warpgroup has 64 rows");

// Shared memory: queries, STAGES of keys, STAGES of values, what is copied and not yet converted, barriers.
constexpr int K_AT = Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, PACKED_AT = V_AT + STAGES * KV_BYTES;
constexpr int PACKED_BYTES = FP8 ? KV_BYTES / 2 : 0, BARRIERS_AT = PACKED_AT + 2 * PACKED_BYTES;
constexpr int Q_ATOMS = BLOCK_M * PANEL_ROW, KV_ATOMS = BLOCK_N * PANEL_ROW;  // bytes of a panel
constexpr int PER_PANEL = PANEL / 16;        // products along a row of a panel

constexpr int divisor(int a, int b) { return b ? divisor(b, a % b) : a; }
constexpr int BOX = divisor(PAGE, BLOCK_N);  // keys of a copy: of one page, in one block

// A ring of buffers, or the one of the queries, each with two barriers.
struct Ring {
  u32 barriers;
  int slots, slot;
  u32 phase;

  DEVICE u32 full() const { return barriers + slot * 16; }
  DEVICE u32 freed() const { return barriers + slot * 16 + 8; }
  DEVICE void advance() {
    slot++;
    if (slot == slots) slot = 0, phase ^= 1;
  }
};

// The items of a block of threads: the schedule starts with the longest, and blocks take turns forth and back.
DEVICE int item_of(int turn) {
  return turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

struct Rings {
  Ring q, k, v;

  DEVICE explicit Rings(u32 barriers)
      : q{barriers, 1, 0, 0}, k{barriers + 16, STAGES, 0, 0}, v{barriers + 16 + STAGES * 16, STAGES, 0, 0} {}
};

// The pool as boxes of keys; see `copy_box`.
DEVICE Array4 boxes_of(const u16* kv, int pages) {
  return {kv,
          {HEAD_DIM, PAGE, 2 * KV_HEADS, (u32)pages},
          {HEAD_DIM * 2, PAGE * HEAD_DIM * 2, PAGE_ELEMENTS * 2},
          {PANEL, BOX, 1, 1}};
}

// One block of keys (part 0) or values (part 1). Boxes that begin after the last key that the tile sees are zeros. All
// lanes of a warp call it.
DEVICE void load_boxes(u32 to, const u8* map, const Pages& pages, int part, const Tile& tile, u32 full, int lane) {
  const int base = pages.block * BLOCK_N;
  if (lane == 0) barrier_expect(full, KV_BYTES);
#pragma unroll
  for (int i = 0; i < BLOCK_N; i += BOX) {
    const int key = base % PAGE + i;
    const int page = __shfl_sync(0xffffffffu, pages.id, key / PAGE);
    if (lane) continue;
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
      copy_box(to + i * PANEL_ROW + panel * KV_ATOMS, map, panel * PANEL, key % PAGE, part * KV_HEADS + tile.head,
               base + i <= tile.last_key ? page : -1, full);
  }
}

// Makes zeros of the values after the last key that a tile sees which came with it: its probabilities are zeros, and a
// product of those must not become NaN, whatever a page was left with. All threads that multiply call it.
DEVICE void clear_values(u8* values, const Tile& tile, int thread) {
  const int first = tile.last_key % BLOCK_N + 1, count = (BOX - first % BOX) * CHUNKS;
  for (int i = thread; i < count; i += GROUPS * 128)
    *reinterpret_cast<uint4*>(values + chunk_offset(first + i / CHUNKS, 0, i % CHUNKS, BLOCK_N)) = make_uint4(0, 0, 0, 0);
  fence_products();
  named_sync(1, GROUPS * 128);
}

// The warpgroup that copies. Copies of bf16 tell that they have landed themselves, so that as many are under way as there
// are buffers; those of e4m3 have to be converted, one while the next is under way.
struct Copier {
  u8* memory;
  u32 smem;
  const u16* kv;
  const u8* map;
  const Tile* tile;
  int thread;
  u32 full, freed, phase;  // of the copy that is to be converted: what to tell, and what to wait for before
  u32 to;                  // where it then goes; 0: there is none
  int copies;

  template <int LATER>
  DEVICE void convert() {
    if (!FP8 || !to) return;
    cp_async_wait<LATER>();
    barrier_wait(freed, phase);
    unpack_block<128>(memory + to, memory + PACKED_AT + (copies - 1) % 2 * PACKED_BYTES, thread);
    fence_products();
    barrier_arrive(full);
  }
  DEVICE void begin(const Ring& ring) { barrier_wait(ring.freed(), ring.phase ^ 1); }
  DEVICE void end(Ring& ring) {
    cp_async_arrive(ring.full());
    ring.advance();
  }
  DEVICE void block(Ring& ring, u32 buffers, const Pages& pages, int part) {
    const u32 place = buffers + ring.slot * KV_BYTES;
    if (!FP8) {
      if (thread < 32) {
        begin(ring);
        load_boxes(smem + place, map, pages, part, *tile, ring.full(), thread);
      }
      return ring.advance();
    }
    const u32 packed = smem + PACKED_AT + copies % 2 * PACKED_BYTES;
    load_packed<128>(packed, reinterpret_cast<const u8*>(kv), pages, part, *tile, thread);
    cp_async_commit();
    convert<1>();
    full = ring.full(), freed = ring.freed(), phase = ring.phase ^ 1, to = place;
    copies++;
    ring.advance();
  }
};

DEVICE void copy(u8* memory, u32 smem, Rings rings, const u16* __restrict__ q, const u16* __restrict__ kv,
                 const u8* map, const int* __restrict__ page_table, const int* __restrict__ schedule,
                 u16* __restrict__ out, float* __restrict__ lse, int thread) {
  Copier copier{memory, smem, kv, map, nullptr, thread, 0, 0, 0, 0, 0};
  const int items = num_items(schedule), lane = thread % 32;
  Tile next(schedule, item_of(0));
  Pages pages(page_table, next);
  pages.fetch(next.last_block(), lane);
  for (int turn = 0; item_of(turn) < items; turn++) {
    const Tile tile = next;
    next = Tile(schedule, min(item_of(turn + 1), items - 1));  // its loads, and then its pages', are not waited for
    if (tile.empty()) {
      store_nothing(tile, thread, out, lse);
      pages = Pages(page_table, next);
      pages.fetch(next.last_block(), lane);
      continue;
    }
    copier.tile = &tile;
    const int last = tile.last_block(), first = tile.first_block();
    Pages before = pages;  // of the values, which come one block after the keys
    for (int block = last; block >= first - 1; block--) {
      const Pages here = pages;
      if (block > first) pages.fetch(block - 1, lane);
      if (block == first) {
        pages = Pages(page_table, next);
        pages.fetch(next.last_block(), lane);
      }
      if (block >= first) copier.block(rings.k, K_AT, here, 0);
      if (block == last) {  // after the keys: their buffers are free before that of the queries is
        copier.begin(rings.q);
        load_queries<128>(smem, q, tile, thread);
        copier.end(rings.q);
      } else {
        copier.block(rings.v, V_AT, before, 1);
      }
      before = here;
    }
  }
  copier.convert<0>();
}

DEVICE void multiply(u8* memory, u32 smem, Rings rings, const int* __restrict__ lasts, const int* __restrict__ firsts,
                     const int* __restrict__ schedule, u16* __restrict__ out, float* __restrict__ lse, int group,
                     int thread) {
  const int lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4;
  const u64 q_matrix = matrix_descriptor(smem + group * 64 * PANEL_ROW, PANEL_ROW, 16, 8 * PANEL_ROW);
  const u64 k_matrices = matrix_descriptor(smem + K_AT, PANEL_ROW, 16, 8 * PANEL_ROW);
  const u64 v_matrices = matrix_descriptor(smem + V_AT, PANEL_ROW, KV_ATOMS, 8 * PANEL_ROW);

  float o[HEAD_DIM / 2], s[BLOCK_N / 2];
  u32 p[BLOCK_N / 16][4];
  Softmax softmax;

  auto wait_for = [&](const Ring& ring) { barrier_wait(ring.full(), ring.phase); };
  // Starts s = queries @ keys.
  auto start_scores = [&]() {
    wgmma_pin(s);
    wgmma_fence();
    const u64 k_matrix = k_matrices + rings.k.slot * (KV_BYTES / 16);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
      const int in_panel = i % PER_PANEL * 32, panel = i / PER_PANEL;
      const u64 keys = k_matrix + (panel * KV_ATOMS + in_panel) / 16;
      Wgmma<BLOCK_N>::ss(s, q_matrix + (panel * Q_ATOMS + in_panel) / 16, keys, i > 0);
    }
    wgmma_commit();
  };
  // Starts o += p @ values, or o = p @ values.
  auto start_output = [&](bool first_output) {
    wgmma_pin(o);
    wgmma_fence();
    const u64 v_matrix = v_matrices + rings.v.slot * (KV_BYTES / 16);
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++)
      Wgmma<HEAD_DIM>::rs(o, p[i], v_matrix + i * 16 * PANEL_ROW / 16, i > 0 || !first_output);
    wgmma_commit();
  };
  auto free_buffer = [&](Ring& ring) {
    if (lane == 0) barrier_arrive(ring.freed());
    ring.advance();
  };
  auto pack = [&]() {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) p[i][j] = pack_bf16(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1]);
  };

  // The next tile that sees anything.
  const int items = num_items(schedule);
  Tile tile(schedule, item_of(0)), next = tile;
  int turn = 0;
  auto find_next = [&]() {
    for (; item_of(turn) < items; turn++) {
      next = Tile(schedule, item_of(turn));
      if (!next.empty()) break;
    }
    return item_of(turn++) < items;
  };
  auto wait_for_tile = [&]() {
    wait_for(rings.q);
    wait_for(rings.k);
    fence_products();
  };

  bool more = find_next();
  if (!more) return;
  wait_for_tile();
  start_scores();
  while (more) {
    tile = next;
    const Visible rows[2] = {{lasts, firsts, tile.token(row)}, {lasts, firsts, tile.token(row + 8)}};
    const int last = tile.last_block(), first = tile.first_block();
    softmax.reset();
    wgmma_wait<0>();
    wgmma_pin(s);
    free_buffer(rings.k);
    if (last == first) free_buffer(rings.q);
    softmax.step(s, tile.masked(last), last * BLOCK_N, rows, lane);
    pack();
    more = find_next();
    if (!FP8 && (tile.last_key + 1) % BOX) {
      wait_for(rings.v);
      clear_values(memory + V_AT + rings.v.slot * KV_BYTES, tile, group * 128 + thread);
    }
    for (int block = last - 1; block >= first; block--) {
      wait_for(rings.k);
      wait_for(rings.v);
      start_scores();
      start_output(block == last - 1);
      wgmma_wait<1>();
      wgmma_pin(s);
      free_buffer(rings.k);
      if (block == first) free_buffer(rings.q);
      softmax.step(s, tile.masked(block), block * BLOCK_N, rows, lane);
      wgmma_pin(s);
      hold_until_known(softmax.sum[0] + softmax.sum[1]);  // the exponentials overlap with the products
      wgmma_wait<0>();
      wgmma_pin(o);
      free_buffer(rings.v);
      if (softmax.rescaled) rescale(o, softmax.keep);
      pack();
    }
    wait_for(rings.v);
    start_output(last == first);
    if (more) wait_for_tile();
    start_scores();  // of the next tile, while this one is stored; after the last one, of nothing
    wgmma_wait<1>();
    wgmma_pin(o);
    free_buffer(rings.v);
    softmax.finish();
    store(o, softmax, rows, tile, row, lane, out, lse);
  }
  wgmma_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) paged_prefill(
    const u16* __restrict__ q, const u16* __restrict__ kv, const int* __restrict__ page_table,
    const int* __restrict__ lasts, const int* __restrict__ firsts, const int* __restrict__ schedule,
    u16* __restrict__ out, float* __restrict__ lse, u8* __restrict__ maps) {
  DYNAMIC_SHARED(memory);
  // What all threads of a warp know to be the same is computed in uniform registers: next to nothing then stands between
  // a wait and the first product after it.
  const u32 smem = __shfl_sync(0xffffffffu, shared_address(memory), 0);
  const int thread = threadIdx.x % 128, group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const Rings rings(smem + BARRIERS_AT);
  u8* const map = maps + blockIdx.x * 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 1 + 2 * STAGES; i++) {
      barrier_init(smem + BARRIERS_AT + i * 16, i == 0 || FP8 ? 128 : 1);  // full: the threads that copy
      barrier_init(smem + BARRIERS_AT + i * 16 + 8, GROUPS * 4);           // freed: the warps that multiply
    }
    barrier_init_fence();
  }
  if (!FP8 && threadIdx.x < 32) make_map(smem, map, boxes_of(kv, schedule[3]), threadIdx.x);
  __syncthreads();
  if (group == 0) {
    registers_fewer<56>();
    copy(memory, smem, rings, q, kv, map, page_table, schedule, out, lse, thread);
  } else {
    registers_more<224>();
    multiply(memory, smem, rings, lasts, firsts, schedule, out, lse, group - 1, thread);
  }
}
