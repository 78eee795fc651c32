#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps what a call must preserve on this stack, leaves its address in *from, and goes on with the stack
// `to`.
extern "C" void fastgpt_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type fastgpt_switch_stack, @function
fastgpt_switch_stack:
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
.size fastgpt_switch_stack, .-fastgpt_switch_stack
)");
// A new stack's first words: six registers, where it begins, and one, as a call aligns the stack.
constexpr int kFrameWords = 8, kEntryWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.type fastgpt_switch_stack, %function
fastgpt_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastgpt_switch_stack, .-fastgpt_switch_stack
)");
constexpr int kFrameWords = 20, kEntryWord = 11;  // of x30, where it begins
#else
#error "the emulator switches stacks on x86-64 and aarch64 alone"
#endif

namespace fastgpt::emulated {

const Thread* thread;
Block block;

namespace {

constexpr size_t kPage = 4096, kStack = 256 << 10;
constexpr int kGuard = 1024;  // bytes beside shared memory, looked at when a block has ended

// All stacks, each above a page that must not be touched.
struct Stacks {
  unsigned char* memory;
  Stacks() {
    void* mapped = mmap(nullptr, kMaxThreads * (kPage + kStack), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<unsigned char*>(mapped);
    for (int i = 0; i < kMaxThreads; i++) mprotect(memory + i * (kPage + kStack), kPage, PROT_NONE);
  }
  unsigned char* bottom(int i) const { return memory + i * (kPage + kStack) + kPage; }
};

struct Fiber : Thread {
  void* stack;  // where it goes on
  bool returned;
  Where where;  // it waits
  bool (*ready)(const void*);
  const void* context;
};

// Memory that AddressSanitizer, where it is, lets nobody touch while this lives, not to read it either.
struct Forbidden {
  const void* memory;
  size_t bytes;
  Forbidden(const void* memory, size_t bytes) : memory(memory), bytes(bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(memory, bytes);
#endif
  }
  ~Forbidden() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory, bytes);
#endif
  }
};

// Threads of a warp, a warpgroup, a block or a named barrier that come together.
struct Meeting {
  uint32_t mask = 0;
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
  Where where{};
  void* operands[kWarpgroup] = {};
};

struct Error {
  std::string text;
};

Fiber fibers[kMaxThreads];
int count, returned;
void* scheduler;  // its stack
std::exception_ptr failure;
void (*body)(const void*);
const void* body_context;
std::vector<Meeting> warps[kMaxThreads / kWarp];  // one for each mask that lanes wait with
Meeting warpgroups[kMaxThreads / kWarpgroup], whole_block, barriers[16];

bool by_chance;
uint64_t chance;                 // of the generator
int order[kMaxThreads / kWarp];  // of warps, by chance: whoever can go on before the others does
uint64_t rarely;                 // one turn in so many changes it

constexpr int kWord = 4;
int writers[kMaxShared / kWord];        // a thread that has not fenced what it wrote there, plus 1
std::vector<int> written[kMaxThreads];  // where

struct Engine {
  void (*reset)();
  std::string (*unfinished)();
};
std::vector<Engine>& engines() {
  static std::vector<Engine> all;
  return all;
}

#ifdef __SANITIZE_ADDRESS__
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;
#endif

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
std::string text(Where where) {
  std::string file = where.file;
  return std::string(where.instruction) + " (" + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(where.line) + ")";
}

bool same(Where a, Where b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 &&
         std::strcmp(a.instruction, b.instruction) == 0;
}

Fiber& running() { return fibers[thread->number]; }

void to_scheduler(Fiber& fiber, bool forever) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack, scheduler_bottom, scheduler_size);
  fastgpt_switch_stack(&fiber.stack, scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  (void)forever;
  fastgpt_switch_stack(&fiber.stack, scheduler);
#endif
}

void to_fiber(Fiber& fiber, const Stacks& stacks) {
  thread = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stacks.bottom(fiber.number), kStack);
  fastgpt_switch_stack(&scheduler, fiber.stack);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#else
  (void)stacks;
  fastgpt_switch_stack(&scheduler, fiber.stack);
#endif
}

void release(Meeting& meeting) {
  meeting.arrived = 0;
  meeting.generation++;
}

// Where a fiber begins.
void begin() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  try {
    body(body_context);
  } catch (...) {
    failure = std::current_exception();
  }
  running().returned = true;
  returned++;
  // Who has returned is not waited for.
  if (whole_block.arrived > 0 && whole_block.arrived == count - returned) release(whole_block);
  to_scheduler(running(), true);
  __builtin_unreachable();
}

void prepare(Fiber& fiber, int number, dim3 size, const Stacks& stacks) {
  unsigned n = static_cast<unsigned>(number);
  fiber.index = dim3(n % size.x, n / size.x % size.y, n / size.x / size.y);
  fiber.number = number;
  fiber.lane = number % kWarp;
  fiber.returned = false;
  fiber.ready = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stacks.bottom(number), kStack);  // what fibers before have left there
#endif
  void** top = reinterpret_cast<void**>(stacks.bottom(number) + kStack) - 2;
  void** words = top - kFrameWords;
  std::fill(words, top, nullptr);
  words[kEntryWord] = reinterpret_cast<void*>(&begin);
  fiber.stack = words;
}

// Counts this thread, and says whether it is the last.
bool arrive(Meeting& meeting, int expected, Where where, bool one_place) {
  if (meeting.arrived == 0) {
    meeting.where = where;
    meeting.expected = expected;
  } else if (one_place && !same(meeting.where, where)) {
    fail(where, "divergence: others wait at " + text(meeting.where));
  } else if (meeting.expected != expected) {
    fail(where, "others of this barrier have come for " + std::to_string(meeting.expected) +
                    " threads, this one for " + std::to_string(expected));
  }
  return ++meeting.arrived == meeting.expected;
}

void wait_for(const Meeting& meeting, Where where) {
  uint64_t before = meeting.generation;
  wait_until(where, [&meeting, before] { return meeting.generation != before; });
}

// The meeting of the lanes in `mask`. Addresses stay: reset() makes room for as many as there may be.
Meeting& meeting_of(uint32_t mask, Where where) {
  if (!(mask >> thread->lane & 1)) fail(where, "the lane is not in its own mask");
  Meeting* unused = nullptr;
  std::vector<Meeting>& meetings = warps[thread->number / kWarp];
  for (Meeting& meeting : meetings) {
    if (meeting.arrived == 0) {
      if (!unused || meeting.mask == mask) unused = &meeting;
    } else if (meeting.mask == mask) {
      return meeting;
    }
  }
  if (!unused) unused = &meetings.emplace_back();
  unused->mask = mask;
  return *unused;
}

// Below n (SplitMix64: Steele et al. 2014).
uint64_t draw(uint64_t n) {
  uint64_t x = chance += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x ^ x >> 31) % n;
}

void reset() {
  for (const Engine& engine : engines()) engine.reset();
  for (std::vector<int>& words : written) {
    for (int word : words) writers[word] = 0;
    words.clear();
  }
  int all = (count + kWarp - 1) / kWarp;
  std::iota(order, order + all, 0);
  for (int i = all - 1; by_chance && i > 0; i--) std::swap(order[i], order[draw(i + 1)]);
  if (by_chance) rarely = uint64_t{4} << 3 * draw(4);
  for (auto& meetings : warps) {
    meetings.clear();
    meetings.reserve(kWarp);
  }
  for (Meeting& meeting : warpgroups) meeting = {};
  for (Meeting& meeting : barriers) meeting = {};
  whole_block = {};
  returned = 0;
  failure = nullptr;
}

std::string deadlock() {
  std::string message = "deadlock";
  std::vector<bool> told(count);
  for (int i = 0; i < count; i++) {
    if (fibers[i].returned || told[i]) continue;
    int waiting = 0;
    for (int j = i; j < count; j++)
      if (!fibers[j].returned && same(fibers[j].where, fibers[i].where)) told[j] = true, waiting++;
    message += ": " + std::to_string(waiting) + " threads wait at " + text(fibers[i].where) + ", first " +
               text(fibers[i].index);
  }
  return message + "; " + std::to_string(returned) + " have returned";
}

bool can_go_on(const Fiber& fiber) { return !fiber.returned && (!fiber.ready || fiber.ready(fiber.context)); }

void go_on(Fiber& fiber, const Stacks& stacks) {
  to_fiber(fiber, stacks);
  if (failure) std::rethrow_exception(failure);
}

// All threads, if they can go on; returns whether one could.
bool all_in_turn(bool backwards, const Stacks& stacks) {
  bool progress = false;
  for (int i = 0; i < count; i++) {
    Fiber& fiber = fibers[backwards ? count - 1 - i : i];
    if (!can_go_on(fiber)) continue;
    progress = true;
    go_on(fiber, stacks);
  }
  return progress;
}

// The threads of the first warp of the order that can go on, of which some may be held back.
bool one_warp(const Stacks& stacks) {
  int all = (count + kWarp - 1) / kWarp;
  if (draw(rarely) == 0) std::swap(order[draw(all)], order[draw(all)]);
  uint64_t held = draw(4) == 0 ? draw(uint64_t{1} << kWarp) : 0, backwards = draw(2);
  bool progress = false;
  for (int w = 0; w < all && !progress; w++)
    for (int i = 0; i < kWarp; i++) {
      int lane = backwards ? kWarp - 1 - i : i, number = order[w] * kWarp + lane;
      if (number >= count || !can_go_on(fibers[number])) continue;
      progress = true;
      if (!(held >> lane & 1)) go_on(fibers[number], stacks);
    }
  return progress;
}

void run_block(const Stacks& stacks) {
  reset();
  for (int i = 0; i < count; i++) prepare(fibers[i], i, block.size, stacks);
  bool backwards = true;
  while (returned < count) {
    // In turn first to last and last to first: a missing barrier shows whoever it was to wait for.
    backwards = !backwards;
    if (!(by_chance ? one_warp(stacks) : all_in_turn(backwards, stacks))) throw Error{deadlock()};
  }
  for (const Engine& engine : engines())
    if (std::string left = engine.unfinished(); !left.empty()) throw Error{"has ended with " + left};
}

}  // namespace

void fail(Where where, const std::string& what) {
  throw Error{"thread " + text(thread->index) + " at " + text(where) + ": " + what};
}

void wait(Where where, bool (*ready)(const void*), const void* context) {
  Fiber& fiber = running();
  fiber.where = where;
  fiber.ready = ready;
  fiber.context = context;
  to_scheduler(fiber, false);
}

void meet(int group, uint32_t mask, void* own, Where where, void (*execute)(void* const*, const void*),
          const void* context) {
  int place = thread->number % group;
  if (thread->number - place + group > count && group == kWarpgroup)
    fail(where, "the block's last warpgroup is not whole");
  int missing = std::max(0, thread->number - place + group - count);  // lanes that the block does not have
  if (group == kWarp) mask &= ~0u >> missing;
  Meeting& meeting = group == kWarp ? meeting_of(mask, where) : warpgroups[thread->number / kWarpgroup];
  bool last = arrive(meeting, group == kWarp ? __builtin_popcount(mask) : group, where, true);
  if (meeting.arrived == 1) std::fill(std::begin(meeting.operands), std::end(meeting.operands), nullptr);
  meeting.operands[place] = own;
  if (!last) return wait_for(meeting, where);
  execute(meeting.operands, context);
  release(meeting);
}

void block_barrier(Where where) {
  bool last = arrive(whole_block, kMaxThreads, where, true) || whole_block.arrived == count - returned;
  if (!last) return wait_for(whole_block, where);
  release(whole_block);
}

void barrier_sync(int id, int threads, Where where) {
  if (arrive(barriers[id], threads, where, false))
    release(barriers[id]);
  else
    wait_for(barriers[id], where);
}

void barrier_arrive(int id, int threads, Where where) {
  if (arrive(barriers[id], threads, where, false)) release(barriers[id]);
}

void set_schedule(uint64_t seed) {
  by_chance = seed != 0;
  chance = seed;
}

bool at_once() { return by_chance && draw(2); }

bool add_engine(void (*reset)(), std::string (*unfinished)()) {
  engines().push_back({reset, unfinished});
  return true;
}

void wrote(const void* word, int writer, Where where) {
  auto at = static_cast<const unsigned char*>(word) - block.shared;
  if (at < 0 || at >= block.shared_bytes) fail(where, "writes beside the block's shared memory");
  writers[at / kWord] = writer + 1;
  written[writer].push_back(static_cast<int>(at / kWord));
}

void fence_proxy() {
  for (int word : written[thread->number])
    if (writers[word] == thread->number + 1) writers[word] = 0;
  written[thread->number].clear();
}

void expect_fenced(const void* from, int bytes, Where where) {
  auto at = static_cast<const unsigned char*>(from) - block.shared;
  if (at < 0 || at + bytes > block.shared_bytes) fail(where, "reads beside the block's shared memory");
  for (auto word = at / kWord; word < (at + bytes) / kWord; word++)
    if (writers[word])
      fail(where, "reads what thread " + text(fibers[writers[word] - 1].index) +
                      " has written without fence_proxy_async");
}

void run(const char* kernel, dim3 grid, dim3 size, int shared_bytes, void (*kernel_body)(const void*),
         const void* context) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  static const Stacks stacks;
  static std::vector<unsigned char> shared(kMaxShared + 2 * kGuard + 1024);
  static const std::vector<unsigned char> untouched(kGuard, 0xff);
  size_t threads = size_t{size.x} * size.y * size.z;
  if (threads < 1 || threads > kMaxThreads || size.z > 64 || grid.x < 1 || grid.x > 0x7fffffff ||
      grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535 || shared_bytes < 0 ||
      shared_bytes > kMaxShared)
    throw std::runtime_error("invalid configuration: grid " + text(grid) + ", block " + text(size) + ", " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  count = static_cast<int>(threads);
  body = kernel_body;
  body_context = context;
  size_t aligned = (reinterpret_cast<size_t>(shared.data()) + kGuard + 1023) / 1024 * 1024;
  block = {dim3(0, 0, 0), size, grid, reinterpret_cast<unsigned char*>(aligned), shared_bytes, block.number};
  unsigned char *first = block.shared - kGuard, *end = block.shared + shared_bytes + kGuard;
  try {
    for (block.index.z = 0; block.index.z < grid.z; block.index.z++)
      for (block.index.y = 0; block.index.y < grid.y; block.index.y++)
        for (block.index.x = 0; block.index.x < grid.x; block.index.x++) {
          std::memset(first, 0xff, end - first);
          block.number++;
          {
            Forbidden before(first, kGuard), behind(end - kGuard, kGuard);
            run_block(stacks);
          }
          if (std::memcmp(first, untouched.data(), kGuard) ||
              std::memcmp(end - kGuard, untouched.data(), kGuard))
            throw Error{"has written beside its " + std::to_string(shared_bytes) + " bytes of shared memory"};
        }
  } catch (const Error& error) {
    throw std::runtime_error(std::string(kernel) + ", block " + text(block.index) + ": " + error.text);
  }
}

}  // namespace fastgpt::emulated
