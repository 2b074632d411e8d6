// The sum of what every GPU of a group has, on every GPU, plus a residual: each sends its part to all others and adds up
// what it got. One trip over NVLink, for sums that are too small for bandwidth to matter ("one-shot", as TensorRT-LLM and
// vLLM call it). The parts are added in the order of the ranks in float32 and rounded once: all GPUs have the same bits.
//
// A thread takes a unit of 16 bytes, which is two packets (peer.cuh); SLOT threads of a block are a slot. The memory of a
// GPU begins with one counter for each slot; then come the places of packets, two sets (phases) of one for each sender,
// slot and thread. The counter says how many sums a slot has taken part in. It is the number in the slot's packets, and
// its parity their phase. The kernel counts by itself, so that a CUDA graph can be launched again and again.
//
// Why two phases are enough. All GPUs launch the same sums in the same order, one after the other, so that their counters
// agree. When a GPU sends in sum n of a slot, it has ended sum n - 1, in which it got packets of that slot from every
// other GPU; each of these had therefore begun sum n - 1, and so ended sum n - 2, the last one that read the places which
// are written now. And a place of the phase never holds the number n before: it has that of an older sum, or 0.
//
// No GPU waits for ever: after TIMEOUT_MS the result is NaN and the group's word in host memory tells the engine; who
// finds it there while waiting gives up as well.
//
// With NORM a block takes a row, and also writes what a norm makes of the row, as rounded.
//
// Macros: RANKS; UNITS of this sum; ROW: those of a block; THREADS of a block, a multiple of SLOT; SLOT; SLOTS that the
// memory has places for; FLOAT (float32, else bfloat16); RESIDUAL (there is one); NORM, EPS; TIMEOUT_MS. Grid: enough
// blocks for the units.
#include "peer.cuh"

constexpr int PACKET = 16;
constexpr size_t COUNTER_BYTES = (SLOTS * 4 + 127) / 128 * 128;

DEVICE u32 own_slot() { return blockIdx.x * (THREADS / SLOT) + threadIdx.x / SLOT; }

// Where the packets of a block's threads lie: `half` of each thread's unit.
DEVICE u8* place_of(u8* memory, u32 phase, int sender, int half) {
  const size_t row = (((size_t)phase * RANKS + sender) * SLOTS + own_slot()) * 2 + half;
  return memory + COUNTER_BYTES + (row * SLOT + threadIdx.x % SLOT) * PACKET;
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

// The square root of 1 / (mean square of a row + EPS), of the sums of squares of the block's threads.
DEVICE float norm_factor(float squares) {
  DYNAMIC_SHARED(bytes);
  float* const of_warp = (float*)bytes;
#pragma unroll
  for (int by = 16; by; by /= 2) squares += __shfl_xor_sync(~0u, squares, by);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total += of_warp[warp];
  return rsqrtf(total / (ROW * 8) + (float)EPS);
}

extern "C" __global__ void __launch_bounds__(THREADS) all_reduce(
    const uint4* part,      // [UNITS]
    const uint4* residual,  // [UNITS], or anything
    const u64* group,       // addresses of the memory of this rank and those after it, its number, the word's address
    const float4* weight,   // of the norm, [2 * ROW], or anything
    uint4* out,             // [UNITS]
    uint4* normed           // [UNITS], or anything
) {
  const int unit = blockIdx.x * ROW + threadIdx.x, rank = (int)group[RANKS];
  const bool mine = threadIdx.x < ROW && unit < UNITS;
  u32* const failed = (u32*)group[RANKS + 1];
  u8* const memory = (u8*)group[0];
  u32* const counter = (u32*)memory + own_slot();
  u32 number = *counter + 1;
  if (!number) number = 2;  // 0 is what places begin with, and 1 would be of the last number's phase
  const u32 phase = number & 1;
  const u64 mark = (u64)number << 32;
  const uint4 own = mine ? part[unit] : make_uint4(0, 0, 0, 0);
  uint4 start = make_uint4(0, 0, 0, 0), sum = start;
  float4 scale[2] = {};
  u64 got[RANKS][4];
  if (mine) {
#pragma unroll
    for (int i = 1; i < RANKS; ++i) {
      u8* const theirs = (u8*)group[i];
      packet_send(place_of(theirs, phase, rank, 0), mark | own.x, mark | own.y);
      packet_send(place_of(theirs, phase, rank, 1), mark | own.z, mark | own.w);
    }
    if (RESIDUAL) start = residual[unit];
    if (NORM)
      for (int half = 0; half < 2; ++half) scale[half] = weight[2 * threadIdx.x + half];
  }
  if (mine) {
    bool lost = false;
    u64 began = 0;
    for (u32 round = 1;; ++round) {
      bool all = true;
#pragma unroll
      for (int sender = 0; sender < RANKS; ++sender) {
        if (sender == rank) continue;
        packet_receive(place_of(memory, phase, sender, 0), got[sender][0], got[sender][1]);
        packet_receive(place_of(memory, phase, sender, 1), got[sender][2], got[sender][3]);
      }
#pragma unroll
      for (int sender = 0; sender < RANKS; ++sender) {
        if (sender == rank) continue;
#pragma unroll
        for (int word = 0; word < 4; ++word) all = all && (u32)(got[sender][word] >> 32) == number;
      }
      if (all) break;
      if (round % 1024 == 0) {  // the word is far away
        const u64 now = clock_nanoseconds();
        if (!began) began = now;
        if (now - began > TIMEOUT_MS * 1000000ull) store_shared_word(failed, rank + 1);
        if (load_shared_word(failed)) {
          lost = true;
          break;
        }
      }
      poll_again();
    }
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int sender = 0; sender < RANKS; ++sender) {
      const bool self = sender == rank;
      add(low, self ? own.x : (u32)got[sender][0], self ? own.y : (u32)got[sender][1]);
      add(high, self ? own.z : (u32)got[sender][2], self ? own.w : (u32)got[sender][3]);
    }
    if (RESIDUAL) {
      add(low, start.x, start.y);
      add(high, start.z, start.w);
    }
    rounded(low, sum.x, sum.y);
    rounded(high, sum.z, sum.w);
    if (lost) sum = make_uint4(~0u, ~0u, ~0u, ~0u);  // NaNs
    out[unit] = sum;
  }
  if (NORM) {
    float low[4] = {}, high[4] = {};
    add(low, sum.x, sum.y);
    add(high, sum.z, sum.w);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += low[i] * low[i] + high[i] * high[i];
    const float factor = norm_factor(squares);
    const float by[8] = {scale[0].x, scale[0].y, scale[0].z, scale[0].w, scale[1].x, scale[1].y, scale[1].z, scale[1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = low[i] * factor * by[i];
      high[i] = high[i] * factor * by[4 + i];
    }
    rounded(low, sum.x, sum.y);
    rounded(high, sum.z, sum.w);
    if (mine) normed[unit] = sum;
  }
  __syncthreads();  // all have read the counter
  if (threadIdx.x % SLOT == 0) *counter = number;
}
