// Vectors, transposition and work sharing for the CPU kernels.
//
// Every kernel here puts tokens (or queries) in the lanes of a vector and broadcasts weights (or keys). One output is
// then one lane's chain of multiply-adds in ascending order, so a token's result is the same bits whatever else is in
// the batch and however many threads there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

#define INLINE inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(L * 4), may_alias));
typedef int32_t VI __attribute__((vector_size(L * 4), may_alias));
typedef float VU __attribute__((vector_size(L * 4), may_alias, aligned(4)));

static INLINE V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
static INLINE void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
static INLINE V splat(float x) { return x - V{}; }
static INLINE VI splat_int(int32_t x) { return x - VI{}; }
static INLINE V select(VI mask, V a, V b) { return (V)((mask & (VI)a) | (~mask & (VI)b)); }
static INLINE V vmax(V a, V b) { return select(a > b, a, b); }
static INLINE V vmin(V a, V b) { return select(a < b, a, b); }

// One step of a transposition: lanes with bit S clear come from a, the others from b.
template <int S, size_t... I>
static INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
  const V low = __builtin_shufflevector(a, b, ((I & S) ? (I - S) + L : I)...);
  const V high = __builtin_shufflevector(a, b, ((I & S) ? I + L : I + S)...);
  a = low, b = high;
}

template <int S>
static INLINE void exchange_all(V* m) {
  UNROLL for (int i = 0; i < L; ++i)
    if (!(i & S)) exchange<S>(m[i], m[i + S], std::make_index_sequence<L>{});
}

static INLINE void transpose(V* m) {
  exchange_all<1>(m);
  exchange_all<2>(m);
  if constexpr (L > 4) exchange_all<4>(m);
  if constexpr (L > 8) exchange_all<8>(m);
}

// out[d * stride + t] = x[t][d], rows t >= count are zero.
static void pack_lanes(const float* x, int64_t ld, int64_t count, int64_t D, float* out, int64_t stride) {
  int64_t d = 0;
  for (; d + L <= D; d += L) {
    V m[L];
    UNROLL for (int t = 0; t < L; ++t) m[t] = t < count ? load(x + t * ld + d) : V{};
    transpose(m);
    UNROLL for (int i = 0; i < L; ++i) store(out + (d + i) * stride, m[i]);
  }
  for (; d < D; ++d)
    for (int t = 0; t < L; ++t) out[d * stride + t] = t < count ? x[t * ld + d] : 0.0f;
}

// out[t * ld + r] = in[r * stride + t], for r < rows and t < count.
static void unpack_lanes(const float* in, int64_t stride, int64_t rows, int64_t count, float* out, int64_t ld) {
  int64_t r = 0;
  if (count > 2)
    for (; r + L <= rows; r += L) {
      V m[L];
      UNROLL for (int i = 0; i < L; ++i) m[i] = load(in + (r + i) * stride);
      transpose(m);
      UNROLL for (int t = 0; t < L; ++t)
        if (t < count) store(out + t * ld + r, m[t]);
    }
  for (; r < rows; ++r)
    for (int64_t t = 0; t < count; ++t) out[t * ld + r] = in[r * stride + t];
}

// acc[r][v] += sum over i of rows[r][i * step] * x[i][v], i ascending.
template <int NR, int NV, bool PREFETCH>
static INLINE void multiply(V (&acc)[NR][NV], const float* const* rows, const float* x, int64_t stride, int64_t count,
                            const float* const* ahead) {
  const float* p[NR];
  UNROLL for (int r = 0; r < NR; ++r) p[r] = rows[r];
  int64_t i = 0;
  constexpr int U = 16;  // floats in a cache line
  for (; i + U <= count; i += U) {
    UNROLL for (int u = 0; u < U; u += 4) {
      if constexpr (PREFETCH) {
        UNROLL for (int r = u * NR / U; r < (u + 4) * NR / U; ++r) __builtin_prefetch(ahead[r] + i, 0, 2);
      }
      UNROLL for (int w = 0; w < 4; ++w) {
        V xs[NV];
        UNROLL for (int v = 0; v < NV; ++v) xs[v] = load(x + (i + u + w) * stride + v * L);
        UNROLL for (int r = 0; r < NR; ++r) {
          const V b = splat(p[r][i + u + w]);
          UNROLL for (int v = 0; v < NV; ++v) acc[r][v] += xs[v] * b;
        }
      }
    }
  }
  for (; i < count; ++i) {
    UNROLL for (int r = 0; r < NR; ++r) {
      const V b = splat(p[r][i]);
      UNROLL for (int v = 0; v < NV; ++v) acc[r][v] += load(x + i * stride + v * L) * b;
    }
  }
}

// Runs worker(claim) on this thread and on idle threads of XLA's pool, where claim() gives out 0, 1, ... units - 1 and
// then values past the end. Returns when all units are done. A unit is only ever waited for once a running thread has
// taken it, so a busy pool costs speed and cannot deadlock.
template <typename Worker>
static void share(ffi::ThreadPool& pool, int64_t units, int64_t helpers, const Worker& worker) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    int64_t units;
    const Worker* worker;  // outlives every unit that is not done
    void run() {
      // Ahead of the check, so that a late helper touches nothing of a caller that has returned.
      const int64_t first = next.fetch_add(1);
      if (first >= units) return;
      int64_t taken = 1;
      (*worker)(first, [&] {
        const int64_t unit = next.fetch_add(1);
        taken += unit < units;
        return unit;
      });
      done.fetch_add(taken, std::memory_order_release);
    }
  };
  auto state = std::make_shared<State>();
  state->units = units;
  state->worker = &worker;
  helpers = std::min(std::min(helpers, pool.num_threads() - 1), units - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->run(); });
  state->run();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < units; ++spins) {
    if (spins < 20000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }
}

struct Scratch {
  std::unique_ptr<float[]> owner;
  float* data;
  explicit Scratch(int64_t floats) : owner(new float[floats + 16]) {
    data = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(owner.get()) + 63) / 64 * 64);
  }
};
