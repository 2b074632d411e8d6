// Packets between GPUs that can write to each other's memory. Under JAXLLM_EMULATE the same names come from the emulator
// of the tests.
//
// A packet is two words of 8 bytes, each 4 bytes of data below the 4 bytes of a number. A word is written and read at
// once (an access of 8 bytes is one operation in PTX's memory model, an access of a vector is one for each element), so
// that who finds the number it waits for has the data that came with it: no fence, and no second trip for a flag. NCCL
// calls this protocol LL.
#pragma once
#include "ptx.cuh"

#ifdef JAXLLM_EMULATE
#include "peer_on_cpu.h"
#else

DEVICE void packet_send(void* to, u64 low, u64 high) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
}
DEVICE void packet_receive(const void* from, u64& low, u64& high) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
}
// A word that the host and all GPUs see.
DEVICE u32 load_shared_word(const u32* p) {
  u32 x;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DEVICE void store_shared_word(u32* p, u32 x) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DEVICE u64 clock_nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
// Somebody else's turn, where threads take turns.
DEVICE void poll_again() {}

#endif
