// The machine that cuda_on_cpu.h describes: fibers, their scheduler, and guarded memory. KERNEL is the .cu file.
#include "barrier.cuh"
#include "cluster.cuh"

#include <csetjmp>
#include <csignal>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <unistd.h>

#include KERNEL

// Blocks of a cluster: a macro of the kernels that have them. With a barrier of the whole grid all run at once.
#ifdef GRID_BARRIER
constexpr u32 BLOCKS_AT_ONCE = 0;
#elif defined(CLUSTER)
constexpr u32 BLOCKS_AT_ONCE = CLUSTER;
#else
constexpr u32 BLOCKS_AT_ONCE = 1;
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

Thread* current;
dim3 block_index, block_size, grid_size;
u8* shared;
std::vector<u8*> shared_of_blocks;
u32 shared_bytes;
bool eager;
std::vector<Meeting> warps;
Meeting* barriers;
std::vector<Meeting> cluster_barriers;

namespace {

constexpr size_t STACK = 256 << 10;

struct Range { const u8* begin; u64 bytes; };
std::vector<Thread> threads;
std::vector<Range> buffers;
std::string error;
std::vector<u32> finished;            // of each block of the cluster
std::vector<Meeting> all_barriers;    // 16 of each
std::vector<dim3> block_indices;
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

void enter(Thread& thread) {
  current = &thread;
  shared = shared_of_blocks[thread.block];
  barriers = &all_barriers[16 * thread.block];
  block_index = block_indices[thread.block];
}

void leave() { switch_stack(current->stack, scheduler); }

void thread_main() {
  kernel(kernel_arguments);
  for (auto& group : current->groups)
    if (!group.empty()) fail("a thread ended with asynchronous copies under way");
  if (!current->open.empty()) fail("a thread ended with asynchronous copies under way");
  current->done = true;
  ++finished[current->block];
  if (!live_threads()) std::memset(shared, 0xff, shared_bytes);  // other blocks of the cluster cannot read it any more
  // Those who wait for all threads of the block wait for those that are left.
  if (barriers[0].arrived && barriers[0].arrived == live_threads()) {
    barriers[0].arrived = 0;
    ++barriers[0].generation;
  }
  Meeting& of_cluster = cluster_barrier();
  if (of_cluster.arrived && of_cluster.arrived == live_threads_of_cluster()) {
    of_cluster.arrived = 0;
    ++of_cluster.generation;
  }
  leave();
}

std::string place() {
  char text[120];
  snprintf(text, sizeof text, " (block %u %u %u, thread %u)", block_index.x, block_index.y, block_index.z,
           current->number);
  return text;
}

// Runs the blocks of a cluster, or all, of `size` threads each, whose indices are in block_indices.
void run_cluster(u32 size, std::vector<u8>& stacks, std::mt19937& random) {
  const u32 blocks = (u32)block_indices.size(), count = blocks * size;
  finished.assign(blocks, 0);
  for (u8* of_block : shared_of_blocks) std::memset(of_block, 0xff, shared_bytes);
  warps.assign((count + 31) / 32, {});
  all_barriers.assign(16 * blocks, {});
  cluster_barriers.assign((blocks + BLOCKS_OF_CLUSTER - 1) / BLOCKS_OF_CLUSTER, {});
  landings.clear();
#if !defined(__x86_64__)
  contexts.clear();
#endif
  threads.assign(count, {});
  for (u32 i = 0; i < count; ++i) {
    threads[i].index = {i % size, 0, 0};
    threads[i].number = i;
    threads[i].block = i / size;
    threads[i].stack = new_stack(stacks.data() + i * STACK);
  }
  std::vector<u32> order(count);
  for (u32 i = 0; i < count; ++i) order[i] = i;
  while (std::accumulate(finished.begin(), finished.end(), 0u) < count) {
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
          if (t.done || t.lets_others_run || (t.waits_for && *t.waits_for == t.seen)) continue;
          t.waits_for = nullptr;
          enter(t);
          switch_stack(scheduler, t.stack);
          if (!error.empty()) return;
          moved = true;
          ran |= !t.lets_others_run;
        }
      }
      for (auto i = begin; i != end; ++i) threads[*i].lets_others_run = false;
    }
    if (!moved) {
      for (Thread& t : threads)
        if (!t.done) {
          enter(t);
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

u32 live_threads() { return (u32)(threads.size() / finished.size()) - finished[current->block]; }
u32 live_threads_of_cluster() {
  const u32 first = current->block - own_rank(), each = (u32)(threads.size() / finished.size());
  u32 live = 0;
  for (u32 block = first; block < first + BLOCKS_OF_CLUSTER; ++block) live += each - finished[block];
  return live;
}

bool is_running(u32 block) { return finished[block] < threads.size() / finished.size(); }

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

void let_others_run() {
  current->lets_others_run = true;
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
  const u32 all = grid[0] * grid[1] * grid[2], blocks = BLOCKS_AT_ONCE ? BLOCKS_AT_ONCE : all;
  shared_of_blocks.clear();
  for (u32 i = 0; i < blocks; ++i) shared_of_blocks.push_back((u8*)aligned_alloc(1024, (shared_bytes + 1024) / 1024 * 1024));
  buffers.clear();
  for (u32 i = 0; i < count; ++i) buffers.push_back({(const u8*)arguments[i], bytes[i]});
  std::vector<u8> stacks(blocks * block * STACK), signals(64 << 10);
  stack_t alternative{}, before{};
  alternative.ss_sp = signals.data();
  alternative.ss_size = signals.size();
  sigaltstack(&alternative, &before);
  struct sigaction action{}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  std::vector<u32> order(all / blocks);
  for (u32 i = 0; i < order.size(); ++i) order[i] = i;
#ifndef IN_ORDER  // blocks that wait for those of another GPU begin in one order on all
  std::shuffle(order.begin(), order.end(), random);
#endif
  if (!sigsetjmp(outside, 1))
    for (u32 i : order) {
      block_indices.clear();
      for (u32 b = i * blocks; b < (i + 1) * blocks; ++b)
        block_indices.push_back({b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]});
      run_cluster(block, stacks, random);
      if (!error.empty()) break;
    }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&before, nullptr);
  for (u8* of_block : shared_of_blocks) free(of_block);
  told = error;
  return told.empty() ? nullptr : told.c_str();
}
