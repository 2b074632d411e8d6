// y[T, F] = x[T, D] @ weight[F, D].T in float32.
#include "common.h"

constexpr int64_t BLOCK = 256;   // inputs at a time: a block of x and of weights fits the first cache
constexpr int64_t ROWS = 48;     // weight rows per unit of work
constexpr int64_t FEW = 16;      // weight rows per unit when there are few tokens
constexpr int64_t TOKENS = 128;  // tokens per pass over the weights: their packed inputs stay in the second cache

// total[NR][NV] += the products of one block of inputs.
template <int NR, int NV>
static void tile(const float* const* rows, const float* const* ahead, const float* x, int64_t count, bool prefetch,
                 float* total) {
  V acc[NR][NV] = {};
  if (prefetch)
    multiply<NR, NV, true>(acc, rows, x, NV * L, count, ahead);
  else
    multiply<NR, NV, false>(acc, rows, x, NV * L, count, ahead);
  UNROLL for (int r = 0; r < NR; ++r) UNROLL for (int v = 0; v < NV; ++v) {
    float* to = total + (r * NV + v) * L;
    store(to, load(to) + acc[r][v]);
  }
}

template <int NR>
static void run(ffi::ThreadPool& pool, const float* weight, float* y, int64_t T, int64_t D, int64_t F,
                const float* packed) {
  const int64_t vectors = (T + L - 1) / L, units = (F + ROWS - 1) / ROWS;
  auto work = [&](int64_t first, auto&& claim) {
    Scratch totals(ROWS * vectors * L);
    for (int64_t i = first; i < units;) {
      const int64_t next = claim();  // before the work: the weights of the next unit are fetched during this one
      const int64_t f0 = i * ROWS, valid = std::min(ROWS, F - f0);
      std::memset(totals.data, 0, ROWS * vectors * L * sizeof(float));
      for (int64_t d = 0; d < D; d += BLOCK) {
        const int64_t n = std::min(BLOCK, D - d);
        for (int64_t v = 0; v < vectors;) {
          const bool pair = NR < 16 && v + 2 <= vectors, prefetch = v == 0 && next < units;
          float* total = totals.data + v * ROWS * L;
          for (int64_t t = 0; t < valid; t += NR) {
            const float *rows[NR], *ahead[NR];
            for (int64_t r = 0; r < NR; ++r) {
              rows[r] = weight + std::min(f0 + t + r, F - 1) * D + d;
              ahead[r] = weight + std::min(next * ROWS + t + r, F - 1) * D + d;
            }
            if (pair)
              tile<NR < 16 ? NR : 1, 2>(rows, ahead, packed + v * L * D + d * 2 * L, n, prefetch, total + t * 2 * L);
            else
              tile<NR, 1>(rows, ahead, packed + v * L * D + d * L, n, prefetch, total + t * L);
          }
          v += 1 + pair;
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t second = NR < 16 && v % 2, width = NR < 16 && (second || v + 1 < vectors) ? 2 : 1;
        const float* total = totals.data + (v - second) * ROWS * L + second * L;
        unpack_lanes(total, width * L, valid, std::min<int64_t>(L, T - v * L), y + v * L * F + f0, F);
      }
      i = next;
    }
  };
  share(pool, units, F * D * T > 65536 ? 1 << 20 : 0, work);
}

// Few tokens: here memory is the limit and a broadcast for each weight would come close to it, so weights are turned
// around in registers and their rows lie in the lanes. The order of additions is that of `run`.
template <int T>
static void run_few(ffi::ThreadPool& pool, const float* x, const float* weight, float* y, int64_t D, int64_t F) {
  const int64_t units = (F + FEW - 1) / FEW;
  auto work = [&](int64_t first, auto&& claim) {
    for (int64_t i = first; i < units;) {
      const int64_t next = claim(), end = std::min(F, (i + 1) * FEW);
      for (int64_t f = i * FEW; f < end; f += L) {
        const float *rows[L], *ahead[L];
        for (int64_t r = 0; r < L; ++r) {
          rows[r] = weight + std::min(f + r, F - 1) * D;
          ahead[r] = weight + std::min(std::min(next, units - 1) * FEW + f - i * FEW + r, F - 1) * D;
        }
        V total[T] = {};
        for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
          V acc[T] = {};
          const int64_t stop = std::min(D, d0 + BLOCK);
          int64_t d = d0;
          for (; d + L <= stop; d += L) {
            V m[L];
            UNROLL for (int r = 0; r < L; ++r) m[r] = load(rows[r] + d);
            UNROLL for (int r = 0; r < L; ++r) __builtin_prefetch(ahead[r] + d, 0, 2);
            transpose(m);
            UNROLL for (int r = 0; r < L; ++r) UNROLL for (int t = 0; t < T; ++t) acc[t] += m[r] * splat(x[t * D + d + r]);
          }
          for (; d < stop; ++d) {
            V m;
            UNROLL for (int r = 0; r < L; ++r) m[r] = rows[r][d];
            UNROLL for (int t = 0; t < T; ++t) acc[t] += m * splat(x[t * D + d]);
          }
          UNROLL for (int t = 0; t < T; ++t) total[t] += acc[t];
        }
        UNROLL for (int t = 0; t < T; ++t) std::memcpy(y + t * F + f, &total[t], std::min<int64_t>(L, end - f) * 4);
      }
      i = next;
    }
  };
  share(pool, units, F * D > 65536 ? 1 << 20 : 0, work);
}

static ffi::Error linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                         ffi::ResultBuffer<ffi::F32> y) {
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], F = weight.dimensions()[0];
  if (weight.dimensions()[1] != D) return ffi::Error::InvalidArgument("linear: x and weight differ in D");
  if (T == 0 || F == 0) return ffi::Error::Success();
  const float *xs = x.typed_data(), *w = weight.typed_data();
  if (T == 1) return run_few<1>(pool, xs, w, y->typed_data(), D, F), ffi::Error::Success();
  if (T == 2) return run_few<2>(pool, xs, w, y->typed_data(), D, F), ffi::Error::Success();
  Scratch packed((std::min(T, TOKENS) + L - 1) / L * L * D);
  for (int64_t t = 0; t < T; t += TOKENS) {
    const int64_t n = std::min(TOKENS, T - t);
    const float* xt = xs + t * D;
    // Pairs of vectors side by side, [pair, D, 2 L], as `run` walks them; an odd last one alone, [D, L].
    for (int64_t i = 0; i < n; i += L) {
      const bool second = i / L % 2, paired = second || i + L < n;
      float* to = packed.data + (i - second * L) * D + second * L;
      pack_lanes(xt + i * D, D, std::min<int64_t>(L, n - i), D, to, paired ? 2 * L : L);
    }
    float* ys = y->typed_data() + t * F;
    if (n <= L)
      run<L == 16 ? 16 : 8>(pool, w, ys, n, D, F, packed.data);
    else
      run<L == 16 ? 12 : 4>(pool, w, ys, n, D, F, packed.data);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
