// Attention of query tokens over paged keys and values, read in place. float32.
//
// The query rows of one KV head (G heads times Q tokens) lie in the lanes, so scores, softmax and output need no sums
// across lanes, and a decoded token gets the same bits as the same token in a prompt.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

constexpr float MASKED = -1e30f;  // finite, as in reference.py
constexpr int64_t SPAN = 512;     // context tokens per unit of work, so that one long row uses every thread
constexpr int64_t KEYS = 64;      // at most this many keys of a page at a time

static INLINE V vexp(V x) {
  // Cephes' expf: within 1 ulp over the range that scores take, zero below.
  const VI tiny = x < splat(-87.3f);
  x = vmin(vmax(x, splat(-87.3f)), splat(88.0f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = splat(1.9875691500E-4f);
  p = p * r + 1.3981999507E-3f;
  p = p * r + 8.3334519073E-3f;
  p = p * r + 4.1665795894E-2f;
  p = p * r + 1.6666665459E-1f;
  p = p * r + 5.0000001201E-1f;
  p = p * r * r + r + 1.0f;
  const VI bits = ((VI)shifted - splat_int(0x4b400000)) << 23;
  return select(tiny, V{}, (V)((VI)p + bits));
}

static INLINE V vtanh(V x) {
  const V a = select(x < V{}, -x, x);
  const V z = x * x;
  V p = splat(-5.70498872745E-3f);
  p = p * z + 2.06390887954E-2f;
  p = p * z - 5.37397155531E-2f;
  p = p * z + 1.33314422036E-1f;
  p = p * z - 3.33332819422E-1f;
  const V small = p * z * x + x;
  const V big = 1.0f - 2.0f / (vexp(vmin(a + a, splat(80.0f))) + 1.0f);
  return select(a < splat(0.625f), small, select(x < V{}, -big, big));
}

struct Problem {
  const float *q, *k, *v;
  const int32_t *pages, *positions, *first;  // first is null when every query sees from the start
  float *out, *lse;
  int64_t R, Q, N, H, P, K, O, W, G, M, vectors;
  float scale, softcap;
};

// Running softmax of one span: per lane its maximum and sum, and the output, [H, lanes].
struct State {
  float *max, *sum, *out;
};

template <int NV>
static void attend(const Problem& p, const float* k, const float* v, const float* next_k, const float* next_v,
                   int64_t key0, int64_t keys, const float* q, const int32_t* positions, const int32_t* firsts,
                   int64_t stride, State s, float* scores) {
  constexpr int NR = NV == 1 ? (L == 16 ? 16 : 8) : (L == 16 ? 8 : 4);
  const int64_t H = p.H;
  V top[NV];
  UNROLL for (int j = 0; j < NV; ++j) top[j] = splat(MASKED);
  for (int64_t i = 0; i < keys; i += NR) {
    const float *rows[NR], *ahead[NR];
    for (int r = 0; r < NR; ++r) {
      rows[r] = k + std::min(i + r, keys - 1) * H;
      ahead[r] = next_k + (i + r) * H;
    }
    V acc[NR][NV] = {};
    multiply<NR, NV, true>(acc, rows, q, stride, H, ahead);
    UNROLL for (int r = 0; r < NR; ++r) UNROLL for (int j = 0; j < NV; ++j) store(scores + ((i + r) * NV + j) * L, acc[r][j]);
  }
  for (int64_t i = 0; i < keys; ++i)
    UNROLL for (int j = 0; j < NV; ++j) {
      const VI at = *reinterpret_cast<const VI*>(positions + j * L);
      const int32_t key = static_cast<int32_t>(key0 + i);
      V x = load(scores + (i * NV + j) * L);
      if (p.softcap > 0) x = p.softcap * vtanh(x / p.softcap);
      VI seen = at >= splat_int(key);
      if (p.first) seen &= *reinterpret_cast<const VI*>(firsts + j * L) <= splat_int(key);
      x = select(seen, x, splat(MASKED));
      store(scores + (i * NV + j) * L, x);
      top[j] = vmax(top[j], x);
    }
  V keep[NV];
  UNROLL for (int j = 0; j < NV; ++j) {
    const V old = load(s.max + j * L);
    top[j] = vmax(top[j], old);
    keep[j] = vexp(old - top[j]);
    store(s.max + j * L, top[j]);
    V sum = load(s.sum + j * L) * keep[j];
    // A lane that has seen nothing yet must not count masked keys: exp(MASKED - MASKED) is 1.
    const VI any = top[j] > splat(MASKED);
    for (int64_t i = 0; i < keys; ++i) {
      const V e = select(any, vexp(load(scores + (i * NV + j) * L) - top[j]), V{});
      store(scores + (i * NV + j) * L, e);
      sum += e;
    }
    store(s.sum + j * L, sum);
  }
  int64_t h = 0;
  for (; h + NR <= H; h += NR) {
    V acc[NR][NV];
    UNROLL for (int r = 0; r < NR; ++r) UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = load(s.out + (h + r) * stride + j * L) * keep[j];
    for (int64_t i = 0; i < keys; ++i) {
      V e[NV];
      UNROLL for (int j = 0; j < NV; ++j) e[j] = load(scores + (i * NV + j) * L);
      const float* row = v + i * H + h;
      __builtin_prefetch(next_v + i * H + h, 0, 2);
      UNROLL for (int r = 0; r < NR; ++r) {
        const V b = splat(row[r]);
        UNROLL for (int j = 0; j < NV; ++j) acc[r][j] += e[j] * b;
      }
    }
    UNROLL for (int r = 0; r < NR; ++r) UNROLL for (int j = 0; j < NV; ++j) store(s.out + (h + r) * stride + j * L, acc[r][j]);
  }
  for (; h < H; ++h) {
    V acc[NV];
    UNROLL for (int j = 0; j < NV; ++j) acc[j] = load(s.out + h * stride + j * L) * keep[j];
    for (int64_t i = 0; i < keys; ++i)
      UNROLL for (int j = 0; j < NV; ++j) acc[j] += load(scores + (i * NV + j) * L) * splat(v[i * H + h]);
    UNROLL for (int j = 0; j < NV; ++j) store(s.out + h * stride + j * L, acc[j]);
  }
}

// The same for M query rows, few enough to leave most lanes of `attend` empty, and a width that fills vectors: keys lie
// in the lanes for the scores, and the width for the output. Every sum runs in the order that `attend` has, so the bits
// are the same. out is [M, H].
template <int M>
static void attend_few(const Problem& p, const float* k, const float* v, const float* next_k, const float* next_v,
                       int64_t key0, int64_t keys, const float* q, const int32_t* positions, const int32_t* firsts,
                       float* max, float* sum, float* out, float* scores) {
  const int64_t H = p.H;
  V top[M];
  UNROLL for (int m = 0; m < M; ++m) top[m] = splat(MASKED);
  VI lane;
  UNROLL for (int i = 0; i < L; ++i) lane[i] = i;
  for (int64_t i = 0; i < keys; i += L) {
    const float* rows[L];
    UNROLL for (int r = 0; r < L; ++r) rows[r] = k + std::min(i + r, keys - 1) * H;
    V acc[M] = {};
    for (int64_t h = 0; h < H; h += L) {
      V part[L];
      UNROLL for (int r = 0; r < L; ++r) {
        part[r] = load(rows[r] + h);
        __builtin_prefetch(next_k + (i + r) * H + h, 0, 2);
      }
      transpose(part);
      UNROLL for (int r = 0; r < L; ++r) UNROLL for (int m = 0; m < M; ++m) acc[m] += part[r] * splat(q[m * H + h + r]);
    }
    const VI key = lane + splat_int(static_cast<int32_t>(key0 + i));
    UNROLL for (int m = 0; m < M; ++m) {
      V x = acc[m];
      if (p.softcap > 0) x = p.softcap * vtanh(x / p.softcap);
      VI seen = (key <= splat_int(positions[m])) & (key < splat_int(static_cast<int32_t>(key0 + keys)));
      if (p.first) seen &= splat_int(firsts[m]) <= key;
      x = select(seen, x, splat(MASKED));
      store(scores + m * KEYS + i, x);
      top[m] = vmax(top[m], x);
    }
  }
  float keep[M];
  UNROLL for (int m = 0; m < M; ++m) {
    float best = max[m];
    UNROLL for (int i = 0; i < L; ++i) best = std::max(best, top[m][i]);
    keep[m] = vexp(splat(max[m]) - splat(best))[0];
    max[m] = best;
    const bool any = best > MASKED;
    for (int64_t i = 0; i < keys; i += L)
      store(scores + m * KEYS + i, any ? vexp(load(scores + m * KEYS + i) - splat(best)) : V{});
    sum[m] *= keep[m];
  }
  for (int64_t i = 0; i < keys; ++i)
    UNROLL for (int m = 0; m < M; ++m) sum[m] += scores[m * KEYS + i];
  constexpr int NV = M <= 4 ? 4 : 2;  // vectors of the output at a time
  int64_t h = 0;
  auto columns = [&](auto width) {
    constexpr int N = decltype(width)::value;
    for (; h + N * L <= H; h += N * L) {
      V acc[M][N];
      UNROLL for (int m = 0; m < M; ++m) UNROLL for (int n = 0; n < N; ++n) acc[m][n] = load(out + m * H + h + n * L) * splat(keep[m]);
      for (int64_t i = 0; i < keys; ++i) {
        V row[N];
        UNROLL for (int n = 0; n < N; ++n) {
          row[n] = load(v + i * H + h + n * L);
          __builtin_prefetch(next_v + i * H + h + n * L, 0, 2);
        }
        UNROLL for (int m = 0; m < M; ++m) {
          const V e = splat(scores[m * KEYS + i]);
          UNROLL for (int n = 0; n < N; ++n) acc[m][n] += e * row[n];
        }
      }
      UNROLL for (int m = 0; m < M; ++m) UNROLL for (int n = 0; n < N; ++n) store(out + m * H + h + n * L, acc[m][n]);
    }
  };
  columns(std::integral_constant<int, NV>{});
  columns(std::integral_constant<int, 1>{});
}

typedef decltype(&attend_few<1>) AttendFew;
constexpr AttendFew FEW[] = {attend_few<1>, attend_few<2>, attend_few<3>, attend_few<4>,
                             attend_few<5>, attend_few<6>, attend_few<7>, attend_few<8>};
constexpr int64_t FEW_ROWS = L == 16 ? 8 : L / 2;

struct Range {
  int64_t first, last;  // the positions that some query of a row sees: [first, last)
};

static Range visible(const Problem& p, int64_t r) {
  int64_t lo = INT32_MAX, hi = -1;
  for (int64_t i = 0; i < p.Q; ++i) {
    const int64_t at = p.positions[r * p.Q + i];
    const int64_t from = p.first ? std::max(p.first[r * p.Q + i], 0) : 0;
    if (at >= from) lo = std::min(lo, from), hi = std::max(hi, at);
  }
  hi = std::min(hi, p.W * p.O - 1);
  return {hi < 0 ? 0 : std::min(lo, hi + 1), hi + 1};
}

// Where the keys (and values) of a page of a row begin, in floats.
static int64_t page_at(const Problem& p, int64_t r, int64_t kv, int64_t i) {
  const int64_t id = p.pages[r * p.W + std::min(i, p.W - 1)];
  return (std::min(std::max<int64_t>(id, 0), p.P - 1) * 2 * p.K + kv) * p.O * p.H;
}

// One row and KV head over the positions of one span. Each page is fetched while the one before it is worked on; after
// the last comes the page at `after`, which the next unit starts with.
static void unit(const Problem& p, int64_t r, int64_t kv, Range range, int64_t after, State s, float* scratch) {
  const int64_t stride = p.vectors * L, H = p.H;
  const AttendFew few = p.M <= FEW_ROWS && H % L == 0 ? FEW[p.M - 1] : nullptr;
  float* q = scratch;  // [H, lanes]; with few rows their output, [M, H]
  int32_t* at = reinterpret_cast<int32_t*>(q + H * stride);
  int32_t* first = at + stride;
  float* scores = q + (H + 2) * stride;
  float* scaled = scores + (KEYS + 16) * 2 * L;
  for (int64_t m0 = 0; m0 < p.M; m0 += L) {
    const int64_t n = std::min<int64_t>(L, p.M - m0);
    for (int64_t m = 0; m < L; ++m) at[m0 + m] = m < n ? p.positions[r * p.Q + (m0 + m) / p.G] : -1;
    if (p.first)
      for (int64_t m = 0; m < L; ++m) first[m0 + m] = m < n ? p.first[r * p.Q + (m0 + m) / p.G] : 0;
    for (int64_t m = 0; m < n; ++m) {
      const float* from = p.q + ((r * p.Q + (m0 + m) / p.G) * p.N + kv * p.G + (m0 + m) % p.G) * H;
      for (int64_t h = 0; h < H; ++h) scaled[m * H + h] = from[h] * p.scale;
    }
    if (!few) pack_lanes(scaled, H, n, H, q + m0, stride);
  }
  for (int64_t m = 0; m < stride; ++m) s.max[m] = MASKED, s.sum[m] = 0;
  std::memset(few ? q : s.out, 0, H * stride * sizeof(float));
  for (int64_t i = range.first / p.O; i * p.O < range.last; ++i) {
    const int64_t page = page_at(p, r, kv, i);
    const int64_t next = (i + 1) * p.O < range.last ? page_at(p, r, kv, i + 1) : after;
    // Blocks start at multiples of KEYS within the page, whatever comes first: the same sums for every batch.
    for (int64_t o = 0; o < p.O && i * p.O + o < range.last; o += KEYS) {
      const int64_t key0 = i * p.O + o, keys = std::min({KEYS, p.O - o, range.last - key0});
      if (key0 + keys <= range.first) continue;
      const int64_t here = page + o * H, ahead = next + o * H;
      const float *k = p.k + here, *v = p.v + here, *next_k = p.k + ahead, *next_v = p.v + ahead;
      if (few) few(p, k, v, next_k, next_v, key0, keys, scaled, at, first, s.max, s.sum, q, scores);
      for (int64_t j = few ? p.vectors : 0; j < p.vectors;) {
        const State part{s.max + j * L, s.sum + j * L, s.out + j * L};
        if (j + 2 <= p.vectors) {
          attend<2>(p, k, v, next_k, next_v, key0, keys, q + j * L, at + j * L, first + j * L, stride, part, scores);
          j += 2;
        } else {
          attend<1>(p, k, v, next_k, next_v, key0, keys, q + j * L, at + j * L, first + j * L, stride, part, scores);
          j += 1;
        }
      }
    }
  }
  if (few)
    for (int64_t m = 0; m < p.M; ++m)
      for (int64_t h = 0; h < H; ++h) s.out[h * stride + m] = q[m * H + h];
}

// Adds the state of a later span to that of the ones before it.
static void merge(const Problem& p, State a, State b) {
  const int64_t stride = p.vectors * L;
  for (int64_t j = 0; j < stride; j += L) {
    const V ma = load(a.max + j), mb = load(b.max + j), m = vmax(ma, mb);
    const V ka = vexp(ma - m), kb = vexp(mb - m);
    store(a.max + j, m);
    store(a.sum + j, load(a.sum + j) * ka + load(b.sum + j) * kb);
    for (int64_t h = 0; h < p.H; ++h)
      store(a.out + h * stride + j, load(a.out + h * stride + j) * ka + load(b.out + h * stride + j) * kb);
  }
}

static void finish(const Problem& p, int64_t r, int64_t kv, State s, float* scratch) {
  const int64_t stride = p.vectors * L;
  for (int64_t m0 = 0; m0 < p.M; m0 += L) {
    const int64_t n = std::min<int64_t>(L, p.M - m0);
    const V total = vmax(load(s.sum + m0), splat(1.17549435e-38f));
    for (int64_t h = 0; h < p.H; ++h) store(s.out + h * stride + m0, load(s.out + h * stride + m0) / total);
    unpack_lanes(s.out + m0, stride, p.H, n, scratch, p.H);
    for (int64_t m = 0; m < n; ++m) {
      const int64_t head = (r * p.Q + (m0 + m) / p.G) * p.N + kv * p.G + (m0 + m) % p.G;
      std::memcpy(p.out + head * p.H, scratch + m * p.H, p.H * sizeof(float));
      p.lse[head] = s.max[m0 + m] + std::log(total[m]);
    }
  }
}

static ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> kv,
                            ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> first,
                            ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse, float scale,
                            float softcap) {
  const auto qs = q.dimensions(), ks = kv.dimensions();
  Problem p{};
  p.q = q.typed_data(), p.k = kv.typed_data();
  p.pages = pages.typed_data(), p.positions = positions.typed_data();
  p.first = first.element_count() ? first.typed_data() : nullptr;
  p.out = out->typed_data(), p.lse = lse->typed_data();
  p.R = qs[0], p.Q = qs[1], p.N = qs[2], p.H = qs[3];
  p.P = ks[0], p.K = ks[2], p.O = ks[3], p.W = pages.dimensions()[1];
  p.v = p.k + p.K * p.O * p.H;
  p.G = p.N / p.K, p.M = p.G * p.Q, p.vectors = (p.M + L - 1) / L;
  p.scale = scale, p.softcap = softcap;
  if (p.R * p.M * p.H * p.W * p.P * p.O == 0) return ffi::Error::Success();

  // Spans are cut at fixed positions of the context, so that how a row is split depends on the row alone.
  const int64_t span = (SPAN + p.O - 1) / p.O * p.O, stride = p.vectors * L, state = (p.H + 2) * stride;
  struct Unit {
    int64_t row, kv;
    Range range;
    bool first;
  };
  std::vector<Unit> units;
  int64_t work = 0;
  for (int64_t r = 0; r < p.R; ++r) {
    const Range all = visible(p, r);
    work += (all.last - all.first) * p.K;
    for (int64_t kv = 0; kv < p.K; ++kv) {
      bool first = true;
      for (int64_t at = all.first / span * span; first || at < all.last; at += span, first = false)
        units.push_back({r, kv, {std::max(at, all.first), std::min(at + span, all.last)}, first});
    }
  }
  const int64_t count = static_cast<int64_t>(units.size());
  auto last_of_row = [&](int64_t i) { return i + 1 == count || units[i + 1].first; };
  bool split = false;
  for (const Unit& u : units) split |= !u.first;
  Scratch states(split ? count * state : 0);
  auto state_at = [&](float* base) { return State{base, base + stride, base + 2 * stride}; };
  const int64_t scratch = (p.H + 2) * stride + (KEYS + 16) * 2 * L + L * p.H;
  auto run = [&](int64_t first, auto&& claim) {
    Scratch own(scratch + state);
    for (int64_t i = first, next; i < count; i = next) {
      next = claim();
      const Unit& u = units[i];
      const Unit& n = units[std::min(next, count - 1)];
      const int64_t after = page_at(p, n.row, n.kv, n.range.first / p.O);
      const bool whole = u.first && last_of_row(i);
      const State s = state_at(whole ? own.data + scratch : states.data + i * state);
      unit(p, u.row, u.kv, u.range, after, s, own.data);
      if (whole) finish(p, u.row, u.kv, s, own.data);
    }
  };
  share(pool, count, work * p.vectors > 256 ? 1 << 20 : 0, run);
  if (split) {
    Scratch own(scratch);
    for (int64_t i = 0, start = 0; i < count; ++i) {
      if (units[i].first) {
        start = i;
      } else {
        merge(p, state_at(states.data + start * state), state_at(states.data + i * state));
      }
      if (last_of_row(i) && !units[i].first)
        finish(p, units[i].row, units[i].kv, state_at(states.data + start * state), own.data);
    }
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_paged_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
