// The instructions of hopper.cuh on a CPU: products of a warpgroup on shared memory.
//
// Matrices in shared memory are found by their descriptors as the PTX ISA describes them ("Shared Memory Matrix Layout",
// "Matrix Descriptor Format"), element by element, so that a wrong descriptor shows as wrong numbers. A product happens
// when it is waited for, which finds operands that were overwritten too early, or (with every other seed) when it is
// issued, which finds operands that were not there yet.
#pragma once

namespace emulator {

// Element (mn, k) of the operand that a descriptor describes.
inline float operand(u64 descriptor, bool mn_major, int mn, int k) {
  const u32 start = (u32)(descriptor & 0x3fff) << 4, leading = (u32)(descriptor >> 16 & 0x3fff) << 4;
  const u32 stride = (u32)(descriptor >> 32 & 0x3fff) << 4, mode = (u32)(descriptor >> 62);
  if (mode != 1 && mode != 2) fail("wgmma: a swizzle of neither 128 nor 64 bytes");
  const u32 row = mode == 1 ? 128 : 64;  // bytes of a row of an atom of 8 rows, and span of the swizzle
  u32 address = start;
  if (mn_major)
    address += mn * 2 % row + mn * 2 / row * leading + k % 8 * row + k / 8 * stride;
  else
    address += mn % 8 * row + mn / 8 * stride + k * 2;
  address ^= (address >> 7 & (row / 16 - 1)) << 4;
  u16 bits;
  std::memcpy(&bits, shared_pointer(address, 2, "wgmma"), 2);
  return from_bf16(bits);
}

// The same of a K-major operand in e4m3.
inline float operand_e4m3(u64 descriptor, int mn, int k) {
  const u32 start = (u32)(descriptor & 0x3fff) << 4, stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: a swizzle of not 128 bytes");
  u32 address = start + mn % 8 * 128 + mn / 8 * stride + k;
  address ^= (address >> 7 & 7) << 4;
  return from_e4m3(*shared_pointer(address, 1, "wgmma"));
}

// What one warp has of a product of N columns of operands in e4m3.
template <int N>
void multiply_e4m3(float* const (&d)[32], u64 a, u64 b, bool accumulate, u32 warp) {
  static float A[16][32], B[32][N];
  for (int k = 0; k < 32; ++k) {
    for (int n = 0; n < N; ++n) B[k][n] = operand_e4m3(b, n, k);
    for (int m = 0; m < 16; ++m) A[m][k] = operand_e4m3(a, (int)(warp % 4 * 16) + m, k);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < N / 2; ++i) {
      float sum = accumulate ? d[l][i] : 0;
      for (int k = 0; k < 32; ++k) sum += A[l / 4 + i / 2 % 2 * 8][k] * B[k][i / 4 * 8 + l % 4 * 2 + i % 2];
      d[l][i] = sum;
    }
}

struct Product { float* d; const u32* a; u64 a_matrix, b_matrix; bool accumulate; };

// What one warp has of a product of N columns: 16 rows.
template <int N>
void multiply(const Product* lanes, u32 warp, bool mn_major, bool a_mn_major) {
  static float A[16][16], B[16][N];
  const Product& first = lanes[0];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N; ++n) B[k][n] = operand(first.b_matrix, mn_major, n, k);
    for (int m = 0; m < 16 && !first.a; ++m) A[m][k] = operand(first.a_matrix, a_mn_major, (int)(warp % 4 * 16) + m, k);
  }
  for (int l = 0; l < 32; ++l)
    for (int part = 0; part < 4 && first.a; ++part)
      for (int i = 0; i < 2; ++i)
        A[l / 4 + part % 2 * 8][l % 4 * 2 + i + part / 2 * 8] = from_bf16((u16)(lanes[l].a[part] >> 16 * i));
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < N / 2; ++i) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += A[l / 4 + i / 2 % 2 * 8][k] * B[k][i / 4 * 8 + l % 4 * 2 + i % 2];
      float& d = lanes[l].d[i];
      d = lanes[l].accumulate ? d + sum : sum;
    }
}

template <int N>
void issue(const char* what, Product mine, bool mn_major, bool a_mn_major = false) {
  if (current->unfenced) fail(std::string(what) + ": copies that products cannot see (fence_products)");
  meet(what, ~0u, &mine, [=](void** given) {
    std::vector<Product> lanes(32);
    for (int l = 0; l < 32; ++l) {
      lanes[l] = *(Product*)given[l];
      if (lanes[l].a_matrix != lanes[0].a_matrix || lanes[l].b_matrix != lanes[0].b_matrix)
        fail(std::string(what) + ": lanes of a warp with different descriptors");
    }
    const u32 warp = current->number / 32;
    if (warp / 4 * 4 + 4 > warps.size()) fail(std::string(what) + ": not in a whole warpgroup");
    auto work = [=] { multiply<N>(lanes.data(), warp, mn_major, a_mn_major); };
    if (eager) return work();
    warps[warp].open_products.push_back(work);
  });
}

template <int N>
void issue_e4m3(Product mine) {
  meet("wgmma_ss_e4m3", ~0u, &mine, [=](void** given) {
    const Product first = *(Product*)given[0];
    std::vector<float*> d(32);
    for (int l = 0; l < 32; ++l) {
      const Product& one = *(Product*)given[l];
      d[l] = one.d;
      if (one.a_matrix != first.a_matrix || one.b_matrix != first.b_matrix)
        fail("wgmma_ss_e4m3: lanes of a warp with different descriptors");
    }
    const u32 warp = current->number / 32;
    if (warp / 4 * 4 + 4 > warps.size()) fail("wgmma_ss_e4m3: not in a whole warpgroup");
    auto work = [=] {
      float* of[32];
      std::copy(d.begin(), d.end(), of);
      multiply_e4m3<N>((float* const (&)[32])of, first.a_matrix, first.b_matrix, first.accumulate, warp);
    };
    if (eager) return work();
    warps[warp].open_products.push_back(work);
  });
}

}  // namespace emulator

template <int N> void wgmma_pin(float (&)[N]) {}
template <int N> void wgmma_pin(u32 (&)[N]) {}
inline void hold_until_known(float) {}
inline void wgmma_fence() { emulator::meet("wgmma_fence", ~0u, nullptr, [](void**) {}); }
inline void wgmma_commit() {
  emulator::meet("wgmma_commit", ~0u, nullptr, [](void**) {
    auto& warp = emulator::warps[emulator::current->number / 32];
    warp.products.push_back(std::move(warp.open_products));
    warp.open_products.clear();
  });
}
template <int N> void wgmma_wait() {
  emulator::meet("wgmma_wait", ~0u, nullptr, [](void**) {
    auto& warp = emulator::warps[emulator::current->number / 32];
    while (warp.products.size() > N) {
      for (auto& product : warp.products.front()) product();
      warp.products.pop_front();
    }
  });
}

template <int N> struct Wgmma {
  static void ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) {
    emulator::issue<N>("wgmma_ss", {d, nullptr, a, b, accumulate != 0}, false);
  }
  static void ss_mn(float (&d)[N / 2], u64 a, u64 b) {
    emulator::issue<N>("wgmma_ss_mn", {d, nullptr, a, b, true}, false, true);
  }
  static void ss_e4m3(float (&d)[N / 2], u64 a, u64 b, int accumulate) {
    emulator::issue_e4m3<N>({d, nullptr, a, b, accumulate != 0});
  }
  static void rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, int accumulate = 1) {
    emulator::issue<N>("wgmma_rs", {d, a, 0, b, accumulate != 0}, true);
  }
};

template <int N> void registers_more() {}
template <int N> void registers_fewer() {}

inline void fence_products() { emulator::current->unfenced = false; }

inline void named_sync(int id, int threads) { named_barrier(id, threads); }
