// The machine that cuda_on_cpu.h describes: fibers, their scheduler, and guarded memory. KERNEL is the .cu file.
#include "ptx.cuh"

#include <csetjmp>
#include <csignal>
#include <random>
#include <sys/mman.h>
#include <unistd.h>

#include KERNEL

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

Thread* current;
dim3 block_index, block_size, grid_size;
u8* shared;
u32 shared_bytes;
bool eager;
std::vector<Meeting> warps;
Meeting barriers[16];

namespace {

constexpr size_t STACK = 256 << 10;

struct Range { const u8* begin; u64 bytes; };
std::vector<Thread> threads;
std::vector<Range> buffers;
std::string error;
u32 finished;
void (*kernel)(void**);
void** kernel_arguments;
void* scheduler;
sigjmp_buf outside;

void thread_main();

#if defined(__x86_64__)
// Keeps what a called function must keep on the stack, and goes on where another stack was left.
asm(R"(
.text
.type jaxllm_switch_stack, @function
jaxllm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void jaxllm_switch_stack(void** from, void* to);

void switch_stack(void*& from, void* to) { jaxllm_switch_stack(&from, to); }

void* new_stack(u8* memory) {
  void** top = (void**)((u64)(memory + STACK) & ~(u64)15) - 1;  // a called function finds its stack at 16 n + 8
  *--top = (void*)thread_main;
  return top - 6;
}
#else
std::deque<ucontext_t> contexts;

void switch_stack(void*& from, void* to) {
  contexts.emplace_back();
  ucontext_t* mine = &contexts.back();
  from = mine;
  swapcontext(mine, (ucontext_t*)to);
}

void* new_stack(u8* memory) {
  contexts.emplace_back();
  ucontext_t* made = &contexts.back();
  getcontext(made);
  made->uc_stack.ss_sp = memory;
  made->uc_stack.ss_size = STACK;
  makecontext(made, thread_main, 0);
  return made;
}
#endif

void leave() { switch_stack(current->stack, scheduler); }

void thread_main() {
  kernel(kernel_arguments);
  for (auto& group : current->groups)
    if (!group.empty()) fail("a thread ended with asynchronous copies under way");
  if (!current->open.empty()) fail("a thread ended with asynchronous copies under way");
  current->done = true;
  ++finished;
  // Those who wait for all threads of the block wait for those that are left.
  if (barriers[0].arrived && barriers[0].arrived == live_threads()) {
    barriers[0].arrived = 0;
    ++barriers[0].generation;
  }
  leave();
}

std::string place() {
  char text[120];
  snprintf(text, sizeof text, " (block %u %u %u, thread %u)", block_index.x, block_index.y, block_index.z,
           current->number);
  return text;
}

void run_block(u32 count, std::vector<u8>& stacks, std::mt19937& random) {
  finished = 0;
  std::memset(shared, 0xff, shared_bytes);
  warps.assign((count + 31) / 32, {});
  for (Meeting& b : barriers) b = {};
#if !defined(__x86_64__)
  contexts.clear();
#endif
  threads.assign(count, {});
  for (u32 i = 0; i < count; ++i) {
    threads[i].index = {i, 0, 0};
    threads[i].number = i;
    threads[i].stack = new_stack(stacks.data() + i * STACK);
  }
  std::vector<u32> order(count);
  for (u32 i = 0; i < count; ++i) order[i] = i;
  while (finished < count) {
    // A warp runs as far as it gets before another does, in an order drawn anew each time: skewed warps find more.
    std::vector<u32> of_warps(warps.size());
    for (u32 i = 0; i < of_warps.size(); ++i) of_warps[i] = i;
    std::shuffle(of_warps.begin(), of_warps.end(), random);
    bool moved = false;
    for (u32 w : of_warps) {
      auto begin = order.begin() + w * 32, end = order.begin() + std::min<size_t>(count, w * 32 + 32);
      for (bool ran = true; ran;) {
        ran = false;
        std::shuffle(begin, end, random);
        for (auto i = begin; i != end; ++i) {
          Thread& t = threads[*i];
          if (t.done || (t.waits_for && *t.waits_for == t.seen)) continue;
          t.waits_for = nullptr;
          current = &t;
          switch_stack(scheduler, t.stack);
          if (!error.empty()) return;
          ran = moved = true;
        }
      }
    }
    if (!moved) {
      for (Thread& t : threads)
        if (!t.done) {
          current = &t;
          error = std::string("deadlock: threads wait for others at ") + t.at + place();
          return;
        }
    }
  }
}

void on_fault(int, siginfo_t* info, void*) {
  char text[80];
  snprintf(text, sizeof text, "access outside of the arguments, at %p", info->si_addr);
  error = text + place();
  siglongjmp(outside, 1);
}

}  // namespace

u32 live_threads() { return (u32)threads.size() - finished; }

void fail(const std::string& what) {
  if (error.empty()) error = what + place();
  for (;;) leave();
}

void wait_until_changed(const u64* value, const char* at) {
  current->waits_for = value;
  current->seen = *value;
  current->at = at;
  leave();
}

void check_global(const void* p, u32 bytes, const char* what) {
  for (const Range& r : buffers)
    if ((const u8*)p >= r.begin && (const u8*)p + bytes <= r.begin + r.bytes) return;
  fail(std::string(what) + ": outside of the arguments");
}

}  // namespace emulator

// Memory whose last byte is right before a page that cannot be touched; begins at a multiple of 256.
extern "C" u8* emulator_allocate(u64 bytes) {
  const u64 page = (u64)sysconf(_SC_PAGESIZE), room = (bytes + 255 + page) / page * page;
  u8* begin = (u8*)mmap(nullptr, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED || mprotect(begin + page, room, PROT_READ | PROT_WRITE)) return nullptr;
  return (u8*)(((u64)begin + page + room - bytes) & ~(u64)255);
}

extern "C" void emulator_free(u8* p, u64 bytes) {
  const u64 page = (u64)sysconf(_SC_PAGESIZE), room = (bytes + 255 + page) / page * page;
  u8* end = (u8*)(((u64)p + bytes + page - 1) / page * page);
  munmap(end - room - page, room + 2 * page);
}

// Runs a kernel that takes `count` pointers; nullptr, or what went wrong.
extern "C" const char* emulator_run(void (*kernel)(void**), u32 count, void** arguments, const u64* bytes,
                                    const u32* grid, u32 block, u32 shared_bytes, u32 seed) {
  using namespace emulator;
  static std::string told;
  std::mt19937 random(seed);
  error.clear();
  eager = seed & 1;
  emulator::kernel = kernel;
  kernel_arguments = arguments;
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block, 1, 1};
  emulator::shared_bytes = shared_bytes;
  shared = (u8*)aligned_alloc(1024, (shared_bytes + 1024) / 1024 * 1024);
  buffers.clear();
  for (u32 i = 0; i < count; ++i) buffers.push_back({(const u8*)arguments[i], bytes[i]});
  std::vector<u8> stacks(block * STACK), signals(64 << 10);
  stack_t alternative{}, before{};
  alternative.ss_sp = signals.data();
  alternative.ss_size = signals.size();
  sigaltstack(&alternative, &before);
  struct sigaction action{}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  std::vector<u32> order(grid[0] * grid[1] * grid[2]);
  for (u32 i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  if (!sigsetjmp(outside, 1))
    for (u32 i : order) {
      block_index = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
      run_block(block, stacks, random);
      if (!error.empty()) break;
    }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&before, nullptr);
  free(shared);
  told = error;
  return told.empty() ? nullptr : told.c_str();
}
