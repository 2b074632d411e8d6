// `Wgmma<N>::ss_e4m3` for all N that products of few tokens need. `mma.sync` of e4m3 is no substitute: on Hopper it is
// assembled to conversions to f16 and products of these. Sums that stay in d keep about 14 bits.
#pragma once
#include "hopper.cuh"

template <int N>
struct WgmmaE4m3 {
  DEVICE static void ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) { Wgmma<N>::ss_e4m3(d, a, b, accumulate); }
};

#ifndef JAXLLM_EMULATE

#define OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT8(i) OUT4(i), OUT4(i + 4)
#define OUT16(i) OUT8(i), OUT8(i + 8)
#define OUT32(i) OUT16(i), OUT16(i + 16)
#define D8 "%0, %1, %2, %3"
#define D16 D8 ", %4, %5, %6, %7"
#define D24 D16 ", %8, %9, %10, %11"
#define D32 D24 ", %12, %13, %14, %15"
#define D48 D32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define D64 D48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define D80 D64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define D96 D80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define D112 D96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define E4M3_PRODUCT(N, D, A, B, ACCUMULATE, ...)                                                                    \
  template <>                                                                                                        \
  struct WgmmaE4m3<N> {                                                                                              \
    DEVICE static void ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) {                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" D "}, %" #A ", %" #B ", p, 1, 1;\n}" \
                   : __VA_ARGS__                                                                                     \
                   : "l"(a), "l"(b), "r"(accumulate));                                                               \
    }                                                                                                                \
  };
E4M3_PRODUCT(8, D8, 4, 5, 6, OUT4(0))
E4M3_PRODUCT(16, D16, 8, 9, 10, OUT8(0))
E4M3_PRODUCT(24, D24, 12, 13, 14, OUT8(0), OUT4(8))
E4M3_PRODUCT(32, D32, 16, 17, 18, OUT16(0))
E4M3_PRODUCT(48, D48, 24, 25, 26, OUT16(0), OUT8(16))
E4M3_PRODUCT(64, D64, 32, 33, 34, OUT32(0))
E4M3_PRODUCT(80, D80, 40, 41, 42, OUT32(0), OUT8(32))
E4M3_PRODUCT(96, D96, 48, 49, 50, OUT32(0), OUT16(32))
E4M3_PRODUCT(112, D112, 56, 57, 58, OUT32(0), OUT16(32), OUT8(48))
#undef D8
#undef D16
#undef D24
#undef D32
#undef D48
#undef D64
#undef D80
#undef D96
#undef D112
#undef E4M3_PRODUCT
#undef OUT32
#undef OUT16
#undef OUT8
#undef OUT4

#endif
