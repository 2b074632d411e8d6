// Reads of global memory that is not written while the kernel runs, issued where they stand in the program.
// Under JAXLLM_EMULATE the same names come from the emulator of the tests.
#pragma once
#include "ptx.cuh"

#ifdef JAXLLM_EMULATE
#include "stream_on_cpu.h"
#else

// 16 bytes that nobody on this multiprocessor reads again.
DEVICE uint4 load_streamed(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// 16 bytes that others read too.
DEVICE uint4 load_kept(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

#endif
