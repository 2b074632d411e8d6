// The sum of what every GPU of a group has, on every GPU, plus a residual, for sums that are too small for bandwidth to
// matter much. The parts are added in the order of the ranks in float32 and rounded once: all GPUs have the same bits.
//
//   SHOTS 1  each GPU sends its part to all others and adds up what it got: one trip over NVLink ("one-shot", as
//            TensorRT-LLM and vLLM call it)
//   SHOTS 2  each GPU adds up a share of the sum, and sends the others its result: two trips, with 2 / RANKS of the bytes
//
// Each of the two trips is a collective of its own as well (TRIPS): SCATTER leaves every GPU with its rows of the sum, and
// GATHER gives every GPU's rows to all others. A GPU's share is then a range of rows, and not every RANKS-th row.
//
// A thread takes a unit of 16 bytes; with two shots one of each GPU's share. SLOT threads of a block are a slot. The memory
// of a GPU begins with one counter for each slot; then come the places of packets (peer.cuh), two sets (phases) of one for
// each shot, sender, slot and thread. The counter says how many sums a slot has taken part in; its parity is the phase of
// the slot's packets. The kernel counts by itself, so that a CUDA graph can be launched again and again.
//
//   NUMBERED 1  a unit is two packets, with the sum's number in every second word: who finds the number has the data
//   NUMBERED 0  a unit is one packet, and half as many bytes cross the wire: a place begins with words of ones, which no
//               data has (NaNs of all ones become others), and gets them back from who has read it
//
// Why two phases are enough. All GPUs launch the same sums in the same order, one after the other, so that their counters
// agree. When a GPU sends in sum n of a slot, it has ended sum n - 1, for which every GPU's part of that slot was needed;
// each of the others had therefore begun sum n - 1, and so ended sum n - 2, the last one that read the places which are
// written now. And a place of the phase never holds the number n before: it has that of an older sum, or 0; or else ones,
// since sum n - 2 ended.
//
// No GPU waits for ever: after TIMEOUT_MS the result is NaN and the group's word in host memory tells the engine; who
// finds it there while waiting gives up as well.
//
// With NORM a cluster of blocks takes a row, or one of each GPU's share, and also writes what a norm makes of it, as
// rounded: one multiprocessor takes as long to send and to look for the packets of a long row as the trip takes.
//
// SCALED: a part is a product of operands in e4m3, still to be multiplied with scales of its rows and columns, and rounded.
// QUANT: what the norm makes goes on as e4m3, with a scale for each row, as `quantize_tokens` of linear/quantized.py has it.
//
// Macros: RANKS; SHOTS; TRIPS: BOTH, or one of the two shots; NUMBERED; UNITS of this sum, of all GPUs' shares; ROW: those of a block, or of a block and a GPU's share; CLUSTER: blocks
// that have a row together (1 without NORM); THREADS of a block, a multiple of SLOT; SLOT; SLOTS that the memory has places
// for; FLOAT (float32, else bfloat16); RESIDUAL (there is one); NORM, EPS; SCALED and QUANT (only with NORM); TIMEOUT_MS. Grid: enough blocks for the units.
#pragma once
#include "cluster.cuh"
#include "peer.cuh"
#include "quantize.cuh"

constexpr int PACKET = 16;
constexpr size_t COUNTER_BYTES = (SLOTS * 4 + 127) / 128 * 128;

DEVICE u32 own_slot() { return blockIdx.x * (THREADS / SLOT) + threadIdx.x / SLOT; }

enum Trips { BOTH, SCATTER, GATHER };
constexpr int PARTS = SHOTS == 2 ? RANKS : 1;                      // units of a thread
constexpr int RESULTS = SHOTS == 2 && TRIPS != SCATTER ? RANKS : 1;  // those of its results
static_assert(TRIPS == BOTH || (SHOTS == 2 && UNITS % RANKS == 0), "one of two trips, with as many rows on every GPU");
static_assert(NORM || !(SCALED || QUANT), "rows are known where there is a norm");
static_assert(TRIPS != GATHER || !(RESIDUAL || NORM), "what is gathered is left as it is");
constexpr int TOGETHER = RANKS < 4 ? RANKS : 4;  // senders that a thread waits for at a time: more take registers
constexpr int WARPS = THREADS / 32;
constexpr int HALVES = NUMBERED ? 2 : 1;  // packets of a unit
constexpr u64 ONES = ~0ull;

// What a thread needs to know of a sum.
struct Sum {
  u8* memory;
  u32* failed;
  u32 number, phase;
  int rank;
};

// Where a thread's packets of one sender lie: `half` of its unit.
DEVICE u8* place_of(u8* memory, u32 phase, int shot, int sender, int half) {
  const size_t row = ((((size_t)phase * 2 + shot) * RANKS + sender) * SLOTS + own_slot()) * HALVES + half;
  return memory + COUNTER_BYTES + (row * SLOT + threadIdx.x % SLOT) * PACKET;
}

// Data that is not words of ones.
DEVICE u32 other(u32 word) { return word == ~0u ? ~0u - 1 : word; }

DEVICE void send(const Sum& sum, u8* to, int shot, const uint4& data) {
  u8* const place = place_of(to, sum.phase, shot, sum.rank, 0);
  if (NUMBERED) {
    const u64 mark = (u64)sum.number << 32;
    packet_send(place, mark | data.x, mark | data.y);
    packet_send(place + SLOT * PACKET, mark | data.z, mark | data.w);
  } else {
    packet_send(place, (u64)other(data.y) << 32 | other(data.x), (u64)other(data.w) << 32 | other(data.z));
  }
}

// Whether both words of half of a packet have come.
DEVICE bool there(const Sum& sum, u64 half) {
  return NUMBERED ? (u32)(half >> 32) == sum.number : (u32)half != ~0u && (u32)(half >> 32) != ~0u;
}

// Waits for the units of those of the ranks first, first + 1, ... whose bits are set in `from`; true if in vain.
DEVICE bool receive(const Sum& sum, int shot, int first, u32 from, uint4 (&units)[TOGETHER]) {
  u64 got[TOGETHER][2 * HALVES], began = 0;
  for (u32 round = 1;; ++round) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      if (!(from >> (first + i) & 1)) continue;
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        packet_receive(place_of(sum.memory, sum.phase, shot, first + i, half), got[i][2 * half], got[i][2 * half + 1]);
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      if (!(from >> (first + i) & 1)) continue;
#pragma unroll
      for (int word = 0; word < 2 * HALVES; ++word) all = all && there(sum, got[i][word]);
      const u64* const data = got[i];
      units[i] = NUMBERED ? make_uint4((u32)data[0], (u32)data[1], (u32)data[2 * HALVES - 2], (u32)data[2 * HALVES - 1])
                          : make_uint4((u32)data[0], (u32)(data[0] >> 32), (u32)data[1], (u32)(data[1] >> 32));
    }
    if (all) break;
    if (round % 1024 == 0) {  // the word is far away
      const u64 now = clock_nanoseconds();
      if (!began) began = now;
      if (now - began > TIMEOUT_MS * 1000000ull) store_shared_word(sum.failed, sum.rank + 1);
      if (load_shared_word(sum.failed)) return true;
    }
    poll_again();
  }
  if (!NUMBERED) {
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      if (from >> (first + i) & 1) packet_send(place_of(sum.memory, sum.phase, shot, first + i, 0), ONES, ONES);
  }
  return false;
}

DEVICE void add(float (&sum)[4], u32 a, u32 b) {
  if (FLOAT) {
    sum[0] += __uint_as_float(a);
    sum[1] += __uint_as_float(b);
  } else {
    sum[0] += bf16_to_float((u16)a);
    sum[1] += bf16_to_float((u16)(a >> 16));
    sum[2] += bf16_to_float((u16)b);
    sum[3] += bf16_to_float((u16)(b >> 16));
  }
}

DEVICE void rounded(const float (&sum)[4], u32& a, u32& b) {
  a = FLOAT ? __float_as_uint(sum[0]) : pack_bf16(sum[0], sum[1]);
  b = FLOAT ? __float_as_uint(sum[1]) : pack_bf16(sum[2], sum[3]);
}

// The sum of all ranks' parts of a unit, of which this one's is `own`, and the residual `start`; NaNs if one was lost.
DEVICE uint4 add_up(const Sum& sum, const uint4& own, const uint4& start) {
  float low[4] = {}, high[4] = {};
  bool lost = false;
#pragma unroll
  for (int first = 0; first < RANKS; first += TOGETHER) {
    uint4 units[TOGETHER];
    lost = receive(sum, 0, first, ((1u << RANKS) - 1) & ~(1u << sum.rank), units) || lost;
#pragma unroll
    for (int i = 0; i < TOGETHER && first + i < RANKS; ++i) {
      const uint4 unit = first + i == sum.rank ? own : units[i];
      add(low, unit.x, unit.y);
      add(high, unit.z, unit.w);
    }
  }
  if (RESIDUAL) {
    add(low, start.x, start.y);
    add(high, start.z, start.w);
  }
  uint4 out;
  rounded(low, out.x, out.y);
  rounded(high, out.z, out.w);
  return lost ? make_uint4(~0u, ~0u, ~0u, ~0u) : out;
}

// Of the sums of squares of the threads of a row's blocks, the square roots of 1 / (mean square + EPS); and with QUANT the
// largest that any of them has.
DEVICE void norm_factors(float (&squares)[RESULTS], float (&largest)[RESULTS]) {
  DYNAMIC_SHARED(bytes);
  float2* const of_warp = (float2*)bytes;
  float2* const of_block = of_warp + RESULTS * WARPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < RESULTS; ++part) {
#pragma unroll
    for (int by = 16; by; by /= 2) {
      squares[part] += __shfl_xor_sync(~0u, squares[part], by);
      if (QUANT) largest[part] = max(largest[part], __shfl_xor_sync(~0u, largest[part], by));
    }
    if (!lane) of_warp[part * WARPS + warp] = make_float2(squares[part], largest[part]);
  }
  __syncthreads();
  if (CLUSTER > 1) {
    cluster_wait();  // all blocks have started
    const int part = threadIdx.x / CLUSTER, block = threadIdx.x % CLUSTER;
    if (part < RESULTS) {
      float2 total = make_float2(0.f, 0.f);
      for (int i = 0; i < WARPS; ++i) {
        total.x += of_warp[part * WARPS + i].x;
        total.y = max(total.y, of_warp[part * WARPS + i].y);
      }
      const u32 place = shared_address(of_block + part * CLUSTER + blockIdx.x % CLUSTER);
      cluster_store(place, block, total.x);
      if (QUANT) cluster_store(place + 4, block, total.y);
    }
    cluster_sync();
  }
#pragma unroll
  for (int part = 0; part < RESULTS; ++part) {
    float2 total = make_float2(0.f, 0.f);
    if (CLUSTER > 1) {
#pragma unroll
      for (int block = 0; block < CLUSTER; ++block) {
        total.x += of_block[part * CLUSTER + block].x;
        if (QUANT) total.y = max(total.y, of_block[part * CLUSTER + block].y);
      }
    } else {
      if (lane < WARPS) total = of_warp[part * WARPS + lane];
#pragma unroll
      for (int by = 16; by; by /= 2) {
        total.x += __shfl_xor_sync(~0u, total.x, by);
        if (QUANT) total.y = max(total.y, __shfl_xor_sync(~0u, total.y, by));
      }
    }
    squares[part] = rsqrtf(total.x / (CLUSTER * ROW * 8) + (float)EPS);
    largest[part] = total.y;
  }
}

// The numbers of a unit, and their multiples.
DEVICE void unpack(float (&v)[8], const uint4& unit) {
  float low[4] = {}, high[4] = {};
  add(low, unit.x, unit.y);
  add(high, unit.z, unit.w);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = low[i];
    v[4 + i] = high[i];
  }
}
DEVICE uint4 finished(const uint4& unit, float of_row, const float (&of_column)[8]) {
  float v[8];
  unpack(v, unit);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = v[i] * of_row * of_column[i];
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// What the kernel of this name does.
DEVICE void exchange(
    const uint4* part,      // [UNITS]; GATHER: [UNITS / RANKS]
    const uint4* residual,  // like out, or anything
    const u64* group,       // addresses of the memory of this rank and those after it, its number, the word's address
    const float4* weight,   // of the norm, [2 * CLUSTER * ROW], or anything
    const float* row_scale, const float4* column_scale,  // of part, [rows] and [2 * CLUSTER * ROW], or anything
    uint4* out,             // [UNITS]; SCATTER: [UNITS / RANKS]
    void* normed,           // like out; in e4m3; or anything
    float* normed_scale     // [rows], or anything
) {
  if (CLUSTER > 1) cluster_started();
  constexpr int WHOLE = CLUSTER * ROW;                              // units of a row
  constexpr int APART = TRIPS == BOTH ? WHOLE : UNITS / RANKS;      // from a thread's unit of one share to that of the next
  const int column = blockIdx.x % CLUSTER * ROW + threadIdx.x;
  const int first = blockIdx.x / CLUSTER * (TRIPS == BOTH ? PARTS * WHOLE : WHOLE) + column;
  const bool here = threadIdx.x < ROW;
  int shares = !here ? 0 : (UNITS - first + WHOLE - 1) / WHOLE;  // there are: the last block may have fewer
  if (TRIPS != BOTH) shares = here && first < APART ? RANKS : 0;
  uint4 own = make_uint4(0, 0, 0, 0), start = own, done[RESULTS];  // done: the units of the result
  float4 scale[2] = {};
  float by_column[8] = {};
  const int row = first / WHOLE;  // of the first share
  if (SCALED && here) {
    const float4 a = column_scale[2 * column], b = column_scale[2 * column + 1];
    const float words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) by_column[i] = words[i];
  }
  // What needs nothing of the group comes first, to be under way while the group's words are.
  if ((SHOTS == 1 || TRIPS == GATHER) && shares > 0) own = part[first];
  if (SHOTS == 1 && SCALED && shares > 0) own = finished(own, row_scale[row], by_column);
  if ((SHOTS == 1 || TRIPS == SCATTER) && RESIDUAL && shares > 0) start = residual[first];
  if (NORM && here)
    for (int half = 0; half < 2; ++half) scale[half] = weight[2 * column + half];
  Sum sum;
  sum.memory = (u8*)group[0];
  sum.rank = (int)group[RANKS];
  sum.failed = (u32*)group[RANKS + 1];
  u32* const counter = (u32*)sum.memory + own_slot();
  sum.number = *counter + 1;
  if (!sum.number) sum.number = 2;  // 0 is what places begin with, and 1 would be of the last number's phase
  sum.phase = sum.number & 1;
  const int mine = SHOTS == 2 ? sum.rank : 0;
  const int place = TRIPS == SCATTER ? first : first + mine * APART;  // of this rank's result
  if (SHOTS == 1 && shares > 0) {
#pragma unroll
    for (int i = 1; i < RANKS; ++i) send(sum, (u8*)group[i], 0, own);
  }
  if (SHOTS == 2 && TRIPS != GATHER) {
    uint4 theirs[RANKS];  // by how many ranks after this one
#pragma unroll
    for (int i = 0; i < RANKS; ++i) {
      const int share = sum.rank + i < RANKS ? sum.rank + i : sum.rank + i - RANKS;
      if (share < shares) theirs[i] = part[first + share * APART];
      if (SCALED && share < shares) theirs[i] = finished(theirs[i], row_scale[row + share * (APART / WHOLE)], by_column);
    }
#pragma unroll
    for (int i = 1; i < RANKS; ++i) {
      const int share = sum.rank + i < RANKS ? sum.rank + i : sum.rank + i - RANKS;
      if (share < shares) send(sum, (u8*)group[i], 0, theirs[i]);
    }
    own = theirs[0];
    if (TRIPS == BOTH && RESIDUAL && mine < shares) start = residual[place];
  }
  if (mine < shares) {
    done[0] = TRIPS == GATHER ? own : add_up(sum, own, start);
    out[place] = done[0];
  }
  if (SHOTS == 2 && TRIPS != SCATTER) {
    const uint4 result = done[0];
    if (mine < shares) {
#pragma unroll
      for (int i = 1; i < RANKS; ++i) send(sum, (u8*)group[i], 1, result);
    }
#pragma unroll
    for (int base = 0; base < RANKS; base += TOGETHER) {
      uint4 units[TOGETHER];
      const u32 others = shares <= 0 ? 0 : ((1u << (shares < RANKS ? shares : RANKS)) - 1) & ~(1u << sum.rank);
      const bool lost = receive(sum, 1, base, others, units);
#pragma unroll
      for (int i = 0; i < TOGETHER && base + i < RANKS; ++i) {
        const int share = base + i;
        done[RESULTS > 1 ? share : 0] = share == sum.rank ? result : lost ? make_uint4(~0u, ~0u, ~0u, ~0u) : units[i];
        if (others >> share & 1) out[first + share * APART] = done[RESULTS > 1 ? share : 0];
      }
    }
  }
  if (NORM) {
    float factors[RESULTS], largest[RESULTS];
    const float by[8] = {scale[0].x, scale[0].y, scale[0].z, scale[0].w, scale[1].x, scale[1].y, scale[1].z, scale[1].w};
#pragma unroll
    for (int share = 0; share < RESULTS; ++share) {
      float v[8];
      unpack(v, done[share]);
      factors[share] = largest[share] = 0.f;
      if (share >= shares) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        factors[share] += v[i] * v[i];
        if (QUANT) largest[share] = max(largest[share], fabsf(v[i] * by[i]));
      }
    }
    norm_factors(factors, largest);
#pragma unroll
    for (int share = 0; share < RESULTS; ++share) {
      if (share >= shares) continue;
      float v[8];
      unpack(v, done[share]);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] * factors[share] * by[i];
      const uint4 scaled =
          make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
      const int unit = first + share * APART;
      if (!QUANT) {
        ((uint4*)normed)[unit] = scaled;
        continue;
      }
      // Of what was rounded, as if it had been written between.
      const float2 of_row = scales_of(bf16_to_float((u16)pack_bf16(largest[share] * factors[share], 0.f)));
      unpack(v, scaled);
      store_e4m3(normed, unit, v, of_row.y);
      if (column == 0) normed_scale[row + share * (APART / WHOLE)] = of_row.x;
    }
  }
  __syncthreads();  // all have read the counter
  if (threadIdx.x % SLOT == 0) *counter = sum.number;
}
