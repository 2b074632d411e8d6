// Copies of boxes of an array in global memory by the tensor memory accelerator, whose map of the array a kernel makes
// itself: "tensormap.replace" and "cp.async.bulk.tensor" in the PTX ISA. Under JAXLLM_EMULATE the same names come from the
// emulator of the tests.
#pragma once
#include "barrier.cuh"

// A bfloat16 array of four axes, the numbers of the first of which lie together. strides: bytes from one to the next of
// the others, multiples of 16. box: what a copy brings, with 64 (32) of the first axis; its rows of 128 (64) bytes are
// swizzled as products want them, and begin at a multiple of 1,024 (512).
struct Array4 {
  const void* begin;
  u32 size[4];
  u64 stride[3];
  u32 box[4];
};

#ifdef JAXLLM_EMULATE
#include "tensor_map_on_cpu.h"
#else

// Makes the map of an array at `to`, 128 bytes of global memory, by way of 128 bytes of shared memory at `scratch`, both
// at multiples of 128. All lanes of a warp call it, and these can let copies be made afterwards.
DEVICE void make_map(u32 scratch, void* to, const Array4& of, int lane) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(scratch + lane * 4), "r"(0) : "memory");
  __syncwarp();
  if (lane == 0) {
#define REPLACE(what, type, ...) \
  asm volatile("tensormap.replace.tile." what ".shared::cta.b1024." type " [%0], " __VA_ARGS__ : "memory")
    REPLACE("global_address", "b64", "%1;" ::"r"(scratch), "l"(of.begin));
    REPLACE("rank", "b32", "3;" ::"r"(scratch));  // one less
    REPLACE("box_dim", "b32", "0, %1;" ::"r"(scratch), "r"(of.box[0]));
    REPLACE("box_dim", "b32", "1, %1;" ::"r"(scratch), "r"(of.box[1]));
    REPLACE("box_dim", "b32", "2, %1;" ::"r"(scratch), "r"(of.box[2]));
    REPLACE("box_dim", "b32", "3, %1;" ::"r"(scratch), "r"(of.box[3]));
    REPLACE("global_dim", "b32", "0, %1;" ::"r"(scratch), "r"(of.size[0]));
    REPLACE("global_dim", "b32", "1, %1;" ::"r"(scratch), "r"(of.size[1]));
    REPLACE("global_dim", "b32", "2, %1;" ::"r"(scratch), "r"(of.size[2]));
    REPLACE("global_dim", "b32", "3, %1;" ::"r"(scratch), "r"(of.size[3]));
    REPLACE("global_stride", "b64", "0, %1;" ::"r"(scratch), "l"(of.stride[0]));
    REPLACE("global_stride", "b64", "1, %1;" ::"r"(scratch), "l"(of.stride[1]));
    REPLACE("global_stride", "b64", "2, %1;" ::"r"(scratch), "l"(of.stride[2]));
    REPLACE("element_stride", "b32", "0, %1;" ::"r"(scratch), "r"(1));
    REPLACE("element_stride", "b32", "1, %1;" ::"r"(scratch), "r"(1));
    REPLACE("element_stride", "b32", "2, %1;" ::"r"(scratch), "r"(1));
    REPLACE("element_stride", "b32", "3, %1;" ::"r"(scratch), "r"(1));
    REPLACE("elemtype", "b32", "0xa;" ::"r"(scratch));  // bfloat16
    REPLACE("interleave_layout", "b32", "0x0;" ::"r"(scratch));
    if (of.box[0] == 64) {
      REPLACE("swizzle_mode", "b32", "0x3;" ::"r"(scratch));  // 128 bytes
    } else {
      REPLACE("swizzle_mode", "b32", "0x2;" ::"r"(scratch));
    }
    REPLACE("fill_mode", "b32", "0x0;" ::"r"(scratch));
#undef REPLACE
  }
  __syncwarp();
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(to),
      "r"(scratch)
      : "memory");
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(to) : "memory");
}
// What another warp of the block made, and a barrier came after: by one that lets copies be made.
DEVICE void see_map(const void* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
// Copies the box at these places of an array to shared memory, and tells the barrier of its bytes. What lies outside of
// the array, as all of a box with a negative place does, becomes zeros.
DEVICE void copy_box(u32 to, const void* map, int a, int b, int c, int d, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          to),
      "l"(map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier)
      : "memory");
}
// The same to every block of the cluster (cluster.cuh) whose bit of `blocks` is set: `to` and `barrier` are places in the
// shared memory of each. All of them must have started.
DEVICE void copy_box_to_blocks(u32 to, const void* map, int a, int b, int c, int d, u32 barrier, u32 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier), "h"((u16)blocks)
      : "memory");
}

#endif
