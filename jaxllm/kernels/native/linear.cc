// y[T, F] = x[T, D] @ weight[F, D].T in float32.
#include "common.h"

constexpr int64_t BLOCK = 256;  // inputs per partial sum: keeps rounding errors small at large D
constexpr int64_t TOKENS = 128;  // tokens per pass over the weights: their packed inputs stay in the second cache

template <int NR, int NV>
static void tile(const float* const* rows, const float* const* ahead, const float* x, int64_t stride, int64_t D,
                 int64_t count, bool prefetch, int64_t valid, float* y, int64_t F) {
  V total[NR][NV] = {};
  for (int64_t d = 0; d < D; d += BLOCK) {
    const int64_t n = std::min(BLOCK, D - d);
    const float *at[NR], *pf[NR];
    for (int r = 0; r < NR; ++r) at[r] = rows[r] + d, pf[r] = ahead[r] + d;
    V acc[NR][NV] = {};
    if (prefetch)
      multiply<NR, NV, true>(acc, at, x + d * stride, stride, n, pf);
    else
      multiply<NR, NV, false>(acc, at, x + d * stride, stride, n, pf);
    UNROLL for (int r = 0; r < NR; ++r) UNROLL for (int v = 0; v < NV; ++v) total[r][v] += acc[r][v];
  }
  alignas(64) float out[NR * NV * L];
  UNROLL for (int r = 0; r < NR; ++r) UNROLL for (int v = 0; v < NV; ++v) store(out + (r * NV + v) * L, total[r][v]);
  for (int v = 0; v < NV && v * L < count; ++v)
    unpack_lanes(out + v * L, NV * L, valid, std::min<int64_t>(L, count - v * L), y + v * L * F, F);
}

template <int NR>
static void run(ffi::ThreadPool& pool, const float* x, const float* weight, float* y, int64_t T, int64_t D, int64_t F,
                const float* packed) {
  const int64_t vectors = (T + L - 1) / L, stride = vectors * L, tiles = (F + NR - 1) / NR;
  auto work = [&](int64_t first, auto&& claim) {
    for (int64_t i = first; i < tiles;) {
      const int64_t next = claim();  // before the work: the weights of the next tile are fetched during this one
      const float *rows[NR], *ahead[NR];
      for (int r = 0; r < NR; ++r) {
        rows[r] = weight + std::min(i * NR + r, F - 1) * D;
        ahead[r] = weight + std::min(std::min(next, tiles - 1) * NR + r, F - 1) * D;
      }
      const int64_t valid = std::min<int64_t>(NR, F - i * NR);
      for (int64_t v = 0; v < vectors;) {
        const bool prefetch = v == 0 && next < tiles;
        float* out = y + v * L * F + i * NR;
        if (NR < 16 && v + 2 <= vectors) {
          tile<NR < 16 ? NR : 1, 2>(rows, ahead, packed + v * L, stride, D, T - v * L, prefetch, valid, out, F);
          v += 2;
        } else {
          tile<NR, 1>(rows, ahead, packed + v * L, stride, D, T - v * L, prefetch, valid, out, F);
          v += 1;
        }
      }
      i = next;
    }
  };
  share(pool, tiles, F * D * T > 65536 ? 1 << 20 : 0, work);
}

static ffi::Error linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                         ffi::ResultBuffer<ffi::F32> y) {
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], F = weight.dimensions()[0];
  if (weight.dimensions()[1] != D) return ffi::Error::InvalidArgument("linear: x and weight differ in D");
  if (T == 0 || F == 0) return ffi::Error::Success();
  Scratch packed((std::min(T, TOKENS) + L - 1) / L * L * D);
  for (int64_t t = 0; t < T; t += TOKENS) {
    const int64_t n = std::min(TOKENS, T - t), stride = (n + L - 1) / L * L;
    const float* xs = x.typed_data() + t * D;
    for (int64_t v = 0; v < stride; v += L)
      pack_lanes(xs + v * D, D, std::min<int64_t>(L, n - v), D, packed.data + v, stride);
    float* ys = y->typed_data() + t * F;
    if (n <= L)
      run<L == 16 ? 16 : 8>(pool, xs, weight.typed_data(), ys, n, D, F, packed.data);
    else
      run<L == 16 ? 12 : 4>(pool, xs, weight.typed_data(), ys, n, D, F, packed.data);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
