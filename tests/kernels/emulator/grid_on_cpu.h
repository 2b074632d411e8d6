// What grid.cuh has, on a CPU: see cuda_on_cpu.h. All blocks of the kernel run at once.
#pragma once

inline void word_release(int* p, int x) { *p = x; }
inline void word_wait(const int* p, int x) {
  for (int polls = 0; *(const volatile int*)p < x; ++polls) {
    if (polls > 1000000) emulator::fail("word_wait: a block never comes");
    emulator::let_others_run();
  }
}
inline u64 nanoseconds() {
  static u64 steps = 0;
  return ++steps;
}
inline u32 cycles() { return (u32)nanoseconds(); }

inline void tell(u32* p, u32 x) {
  emulator::check_global(p, 4, "tell");
  if (*p >> 16 >= x >> 16) emulator::fail("tell: a word that was told with this mark already, or did not begin as zero");
  *p = x;
}
inline void tell(u32* p, uint2 x) {
  if ((u64)p % 8) emulator::fail("tell: unaligned address");
  // The words may be seen one before the other.
  tell(p + 1, x.y);
  emulator::let_others_run();
  tell(p, x.x);
}
inline void tell(u16* p, u16 x) {
  emulator::check_global(p, 2, "tell");
  if (*p) emulator::fail("tell: a number that was told already, or did not begin as zero");
  *p = x;
}
template <class Words>
void look(const u32* p, Words& x) {
  if ((u64)p % sizeof(Words)) emulator::fail("look: unaligned address");
  emulator::check_global(p, sizeof(Words), "look");
  std::memcpy(&x, p, sizeof(Words));
}
inline void add_relaxed(u64* p, u64 x) {
  if ((u64)p % 8) emulator::fail("add_relaxed: unaligned address");
  emulator::check_global(p, 8, "add_relaxed");
  *p += x;
  if (!(*p & 255)) emulator::fail("add_relaxed: more blocks than a sum counts");
}
inline u64 look(const u64* p) {
  if ((u64)p % 8) emulator::fail("look: unaligned address");
  emulator::check_global(p, 8, "look");
  return *(const volatile u64*)p;
}
inline void look_again(u32 polls, u64&) {
  if (polls > 1000000) emulator::fail("look: what a block never tells");
  emulator::let_others_run();
}
