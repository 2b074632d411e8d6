// y[T, F] = x[T, D] @ weight[F, D].T in float32, for weights kept in blocks of 4 or 8 bits (kernels/linear/blocks.py).
//
// Sixteen rows of the weights lie in the lanes of a vector and inputs are broadcast, so that a block is expanded in
// registers by a mask, a conversion and a multiply-add. Every output is summed in the order of linear.cc.
#include "common.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

constexpr int ROWS = 16;   // weight rows in a group
constexpr int BLOCK = 32;  // inputs that share a scale
constexpr int BLOCKS = 8;  // blocks that are summed up before they are added to the total: 256 inputs, as in linear.cc

// Sixteen lanes whatever the machine has; the compiler splits them.
typedef float R __attribute__((vector_size(ROWS * 4), may_alias));
typedef float RU __attribute__((vector_size(ROWS * 4), may_alias, aligned(4)));
typedef int32_t RI __attribute__((vector_size(ROWS * 4), may_alias));
typedef uint32_t RN __attribute__((vector_size(ROWS * 4), may_alias));
typedef int32_t RB __attribute__((vector_size(ROWS * 4), may_alias, aligned(1)));
typedef uint16_t RH __attribute__((vector_size(ROWS * 2), may_alias, aligned(1)));

static INLINE R spread(float x) { return x - R{}; }

static INLINE R from_half(const uint8_t* p) {
#if defined(__AVX512F__)
  return (R)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  union {
    __m256 half[2];
    R all;
  } out;
  out.half[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  out.half[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
  return out.all;
#else
  const RI h = __builtin_convertvector(*reinterpret_cast<const RH*>(p), RI);
  const R magnitude = (R)((h & 0x7fff) << 13) * spread(0x1p112f);
  return (R)((RI)magnitude | (h & 0x8000) << 16);
#endif
}

// Blocks of BITS-bit values: 16 scales (and, for 4 bits, 16 minima) in half precision, then BITS words of each row,
// whose lowest bits belong to the first input.
template <int BITS>
struct Format {
  static constexpr int COUNT = 32 / BITS;  // values in a word
  static constexpr int HEAD = BITS == 4 ? 64 : 32;
  static constexpr int BYTES = HEAD + BITS * 64;

  R scale[COUNT - 1], low;

  INLINE explicit Format(const uint8_t* p) {
    scale[0] = from_half(p);
    low = BITS == 4 ? from_half(p + 32) : scale[0] * spread(-128.0f);
    // A value is masked, not shifted, out of its word: its place there is a power of two that goes into the scale.
    UNROLL for (int i = 1; i < COUNT - 1; ++i) scale[i] = scale[i - 1] * spread(1.0f / (1 << BITS));
  }
  static INLINE RI word(const uint8_t* p, int k) { return *reinterpret_cast<const RB*>(p + HEAD + 64 * k); }
  INLINE R value(RI word, int i) const {
    constexpr uint32_t mask = (1u << BITS) - 1;
    const bool last = i == COUNT - 1;  // its mask would be negative as an integer
    const RI q = last ? (RI)((RN)word >> (32 - BITS)) : word & (int32_t)(mask << (i * BITS));
    return __builtin_convertvector(q, R) * scale[last ? 0 : i] + low;
  }
};

// Few tokens: y of GROUPS groups of rows, expanding each weight where it is used. x[d * step + t * ld].
template <int BITS, int GROUPS, int T>
static INLINE void fused(const uint8_t* weight, int64_t blocks, const float* x, int64_t step, int64_t ld, float* y,
                         int64_t F) {
  typedef Format<BITS> Q;
  const int64_t stride = blocks * Q::BYTES;
  constexpr int64_t AHEAD = 2048;
  R total[GROUPS][T] = {};
  for (int64_t b0 = 0; b0 < blocks; b0 += BLOCKS) {
    R acc[GROUPS][T] = {};
    for (int64_t b = b0; b < std::min<int64_t>(blocks, b0 + BLOCKS); ++b) {
      const uint8_t* p[GROUPS];
      UNROLL for (int g = 0; g < GROUPS; ++g) {
        p[g] = weight + g * stride + b * Q::BYTES;
        UNROLL for (int c = 0; c < Q::BYTES; c += 64) __builtin_prefetch(p[g] + AHEAD + c, 0, 2);
      }
      if constexpr (GROUPS == 1) {
        const Q q0(p[0]);
        for (int k = 0; k < BITS; ++k) {
          const RI w0 = Q::word(p[0], k);
          UNROLL for (int i = 0; i < Q::COUNT; ++i) {
            const float* xd = x + (b * BLOCK + k * Q::COUNT + i) * step;
            const R v0 = q0.value(w0, i);
            UNROLL for (int t = 0; t < T; ++t) acc[0][t] += v0 * spread(xd[t * ld]);
          }
        }
      } else {
        static_assert(GROUPS == 2);
        const Q q0(p[0]), q1(p[1]);
        for (int k = 0; k < BITS; ++k) {
          const RI w0 = Q::word(p[0], k), w1 = Q::word(p[1], k);
          UNROLL for (int i = 0; i < Q::COUNT; ++i) {
            const float* xd = x + (b * BLOCK + k * Q::COUNT + i) * step;
            const R v0 = q0.value(w0, i), v1 = q1.value(w1, i);
            UNROLL for (int t = 0; t < T; ++t) {
              const R xs = spread(xd[t * ld]);
              acc[0][t] += v0 * xs;
              acc[1][t] += v1 * xs;
            }
          }
        }
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) UNROLL for (int t = 0; t < T; ++t) total[g][t] += acc[g][t];
  }
  UNROLL for (int t = 0; t < T; ++t) UNROLL for (int g = 0; g < GROUPS; ++g)
    *reinterpret_cast<RU*>(y + t * F + g * ROWS) = total[g][t];
}

constexpr int FEW = L == 16 ? 4 : 2;            // tokens up to which two groups share the inputs
constexpr int FUSED = L == 16 ? 16 : L == 8 ? 6 : 2;  // tokens up to which `fused` is used: their sums fill the registers
constexpr int GROUPS = L == 16 ? 2 : 1;         // groups of a panel
constexpr int WIDE = L == 16 ? 12 : L == 8 ? 6 : 2;  // tokens that a panel is multiplied with at a time

// Tokens that are computed together, of T tokens.
static int64_t pass_width(int64_t T) { return T <= FUSED ? T : WIDE; }

template <int BITS, int T>
static void fused_pass(const uint8_t* weight, int64_t blocks, const float* x, float* y, int64_t F, int64_t count) {
  if constexpr (T <= FUSED) {
    if (count > T) return fused_pass<BITS, T + 1>(weight, blocks, x, y, F, count);
    fused<BITS, 1, T>(weight, blocks, x, T, 1, y, F);
  }
}

template <int GROUPS, int T>
static void panel_pass(const float* panel, const float* x, int64_t inputs, float* y, int64_t F, int64_t count,
                       bool first) {
  if constexpr (T > 1)
    if (count < T) return panel_pass<GROUPS, T - 1>(panel, x, inputs, y, F, count, first);
  R acc[T][GROUPS] = {};
  for (int64_t d = 0; d < inputs; ++d) {
    R w[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; ++g) w[g] = *reinterpret_cast<const R*>(panel + (d * GROUPS + g) * ROWS);
    UNROLL for (int t = 0; t < T; ++t) {
      const R xs = spread(x[d * WIDE + t]);
      UNROLL for (int g = 0; g < GROUPS; ++g) acc[t][g] += w[g] * xs;
    }
  }
  UNROLL for (int t = 0; t < T; ++t) UNROLL for (int g = 0; g < GROUPS; ++g) {
    RU* to = reinterpret_cast<RU*>(y + t * F + g * ROWS);
    *to = first ? acc[t][g] : *to + acc[t][g];
  }
}

template <int BITS, int GROUPS>
static void panels(const uint8_t* weight, int64_t blocks, const float* x, int64_t T, float* y, int64_t F) {
  typedef Format<BITS> Q;
  alignas(64) float panel[BLOCKS * BLOCK * GROUPS * ROWS];
  for (int64_t b0 = 0; b0 < blocks; b0 += BLOCKS) {
    const int64_t count = std::min<int64_t>(blocks - b0, BLOCKS);
    for (int64_t b = 0; b < count; ++b) UNROLL for (int g = 0; g < GROUPS; ++g) {
      const uint8_t* p = weight + (g * blocks + b0 + b) * Q::BYTES;
      const Q q(p);
      for (int k = 0; k < BITS; ++k) {
        const RI word = Q::word(p, k);
        UNROLL for (int i = 0; i < Q::COUNT; ++i)
          *reinterpret_cast<R*>(panel + ((b * BLOCK + k * Q::COUNT + i) * GROUPS + g) * ROWS) = q.value(word, i);
      }
    }
    for (int64_t t = 0; t < T; t += WIDE)
      panel_pass<GROUPS, WIDE>(panel, x + t * blocks * BLOCK + b0 * BLOCK * WIDE, count * BLOCK, y + t * F, F,
                               std::min<int64_t>(WIDE, T - t), b0 == 0);
  }
}

// y of `groups` (1 or 2) groups of rows.
template <int BITS>
static void rows(const uint8_t* weight, int64_t groups, int64_t blocks, const float* x, const float* packed, int64_t T,
                 float* y, int64_t F) {
  const int64_t D = blocks * BLOCK, stride = blocks * Format<BITS>::BYTES;
  if (T <= FEW && groups == 2) {
    switch (T) {
      case 1: return fused<BITS, 2, 1>(weight, blocks, x, 1, D, y, F);
      case 2: return fused<BITS, 2, 2>(weight, blocks, x, 1, D, y, F);
      case 3: return fused<BITS, 2, FEW >= 3 ? 3 : 1>(weight, blocks, x, 1, D, y, F);
      default: return fused<BITS, 2, FEW >= 4 ? 4 : 1>(weight, blocks, x, 1, D, y, F);
    }
  }
  if (T > FUSED && groups == GROUPS) return panels<BITS, GROUPS>(weight, blocks, packed, T, y, F);
  for (int64_t g = 0; g < groups; ++g, weight += stride, y += ROWS) {
    if (T > FUSED)
      panels<BITS, 1>(weight, blocks, packed, T, y, F);
    else
      fused_pass<BITS, 1>(weight, blocks, packed, y, F, T);
  }
}

// Inputs of a pass side by side, [pass, D, width]; rows past T are zero.
static void pack(const float* x, int64_t T, int64_t D, int64_t width, int64_t pass, float* packed) {
  const int64_t t = pass * width, count = std::min(width, T - t);
  float* to = packed + t * D;
  int64_t d = 0;
  for (; d + L <= D - L; d += L) {  // stores are L wide: the last ones may not touch the next pass
    V m[L];
    UNROLL for (int i = 0; i < L; ++i) m[i] = i < count ? load(x + (t + i) * D + d) : V{};
    transpose(m);
    UNROLL for (int i = 0; i < L; ++i) store(to + (d + i) * width, m[i]);
  }
  for (; d < D; ++d)
    for (int64_t i = 0; i < width; ++i) to[d * width + i] = i < count ? x[(t + i) * D + d] : 0.0f;
}

template <int BITS>
static void product(ffi::ThreadPool& pool, const float* x, const uint8_t* weight, float* y, int64_t T, int64_t groups,
                    int64_t blocks) {
  const int64_t D = blocks * BLOCK, F = groups * ROWS, units = (groups + 1) / 2, width = pass_width(T);
  const int64_t helpers = F * D * T > 65536 ? 1 << 20 : 0, passes = (T + width - 1) / width;
  Scratch packed(passes * width * D);
  // Before any unit of the product; by everyone where it takes a while.
  if (T > FEW || groups % 2)
    share(pool, passes, T * D > 1 << 16 ? helpers : 0, [&](int64_t first, auto&& claim) {
      for (int64_t pass = first; pass < passes; pass = claim()) pack(x, T, D, width, pass, packed.data);
    });
  share(pool, units, helpers, [&](int64_t first, auto&& claim) {
    for (int64_t unit = first; unit < units; unit = claim())
      rows<BITS>(weight + unit * 2 * blocks * Format<BITS>::BYTES, std::min<int64_t>(2, groups - unit * 2), blocks, x,
                 packed.data, T, y + unit * 2 * ROWS, F);
  });
}

static ffi::Error packed_linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> weight,
                                ffi::ResultBuffer<ffi::F32> y) {
  const int64_t T = x.dimensions()[0], groups = weight.dimensions()[0], blocks = weight.dimensions()[1];
  if (x.dimensions()[1] != blocks * BLOCK) return ffi::Error::InvalidArgument("packed_linear: x and weight differ in D");
  if (T == 0 || groups == 0) return ffi::Error::Success();
  switch (weight.dimensions()[2]) {
    case Format<4>::BYTES:
      product<4>(pool, x.typed_data(), weight.typed_data(), y->typed_data(), T, groups, blocks);
      return ffi::Error::Success();
    case Format<8>::BYTES:
      product<8>(pool, x.typed_data(), weight.typed_data(), y->typed_data(), T, groups, blocks);
      return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument("packed_linear: no such block");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_packed_linear, packed_linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
