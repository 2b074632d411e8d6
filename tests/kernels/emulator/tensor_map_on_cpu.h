// What tensor_map.cuh has, on a CPU: see cuda_on_cpu.h. A map is the array's description itself.
#pragma once
#include "cluster_on_cpu.h"

inline void make_map(u32 scratch, void* to, const Array4& of, int lane) {
  static_assert(sizeof(Array4) <= 128, "a map is 128 bytes");
  emulator::shared_pointer(scratch + 112, 16, "make_map");
  emulator::check_global(to, 128, "make_map");
  if (scratch % 128 || (u64)to % 128) emulator::fail("make_map: not multiples of 128");
  if ((u64)of.begin % 16 || (of.box[0] != 64 && of.box[0] != 32)) emulator::fail("make_map: an array that cannot be mapped");
  for (u64 stride : of.stride)
    if (stride % 16 || stride >> 40) emulator::fail("make_map: a stride that cannot be");
  for (u32 box : of.box)
    if (!box || box > 256) emulator::fail("make_map: a box that cannot be");
  std::memcpy(to, &of, sizeof(of));
  emulator::meet("make_map", ~0u, nullptr, [](void**) {});
}
inline void see_map(const void*) {}
inline void copy_box_to_blocks(u32 to, const void* map, int a, int b, int c, int d, u32 barrier, u32 blocks) {
  const char* const what = "copy_box_to_blocks";
  Array4 of;
  std::memcpy(&of, map, sizeof(of));
  const u32 row_bytes = of.box[0] * 2, pieces = row_bytes / 16;
  if (to % (8 * row_bytes)) emulator::fail(std::string(what) + ": not to the begin of eight rows");
  if (a % 8) emulator::fail(std::string(what) + ": a place that the emulator does not have");
  if (!blocks || blocks >> emulator::BLOCKS_OF_CLUSTER) emulator::fail(std::string(what) + ": no such block");
  auto inside = [&](u32 axis, int at) { return at >= 0 && (u32)at < of.size[axis]; };
  emulator::shared_pointer(barrier, 8, what);
  for (u32 rank = 0; rank < emulator::BLOCKS_OF_CLUSTER; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    u8* const there = emulator::shared_of(rank, what);
    emulator::Barrier& bar = *(emulator::Barrier*)(there + barrier);
    if (!bar.count || bar.count == 0xfff) emulator::fail(std::string(what) + ": the barrier was not initialised");
    bar.bulk ^= 1;  // and those who wait look again
    emulator::Landing landing{&bar, {}, 0, 0};
    u32 row = 0;
    for (u32 k = 0; k < of.box[3]; ++k)
      for (u32 j = 0; j < of.box[2]; ++j)
        for (u32 i = 0; i < of.box[1]; ++i, ++row)
          for (u32 piece = 0; piece < pieces; ++piece) {
            const bool real = inside(0, a + piece * 8) && inside(1, b + i) && inside(2, c + j) && inside(3, d + k);
            const u8* from = (const u8*)of.begin;
            if (real)
              from += (u64)a * 2 + (b + i) * of.stride[0] + (c + j) * of.stride[1] + (d + k) * of.stride[2] + piece * 16;
            emulator::check_global(from, 16, what);
            const u32 permuted = row * row_bytes / 128 % pieces, at = to + row * row_bytes + (piece ^ permuted) * 16;
            emulator::shared_pointer(at, 16, what);
            std::memset(there + at, 0xff, 16);
            landing.copies.push_back({there + at, from, real ? 16u : 0u, 16});
            landing.bytes += 16;
          }
    emulator::landings.push_back(landing);
    if (emulator::eager) emulator::land_at(bar);
  }
}
inline void copy_box(u32 to, const void* map, int a, int b, int c, int d, u32 barrier) {
  copy_box_to_blocks(to, map, a, b, c, d, barrier, 1u << emulator::own_rank());
}
