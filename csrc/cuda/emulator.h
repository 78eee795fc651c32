// CUDA on one processor, for tests without a GPU: what kernels take from CUDA, under FASTGPT_EMULATE.
//
// Blocks run one after another. Each of a block's threads is a fiber with a stack of its own, and one of them
// runs at a time, until it waits: at a barrier, or at an instruction of a whole warp or warpgroup, which is
// computed once its last thread has come to it, from what all of them have brought. So results do not depend
// on the order in which threads run, unless the kernel has a race. Threads run in turn, or, by
// set_schedule(seed), in an order that the seed draws, in which a warp may be held back for as long as others
// can go on; the seed then also draws what copies do at once and what as late as they may.
//
// What ends a launch with an error, naming kernel, block and thread: threads that wait forever (deadlock),
// threads of one barrier or warp that are at different places of the source (divergence), a shuffle by a lane
// outside its mask, writes beyond the block's shared memory, a wait for a phase of an mbarrier after which
// another one has ended (parity cannot tell), copies and products under way when a block ends, copies and
// products that read what was written without a proxy fence (by stmatrix and store_chunk: plain writes are
// not seen). Shared memory is NaN bytes when a block begins, and so is what lies beside it and what a copy is
// to write.
//
// Not modelled, so that a kernel can be wrong on a GPU that is right here: the order of memory accesses
// (fences but the proxy's do nothing); blocks at the same time, and blocks that wait for a later one; fewer
// registers than setmaxnreg or __launch_bounds__ leave, and whether its sums add up; wgmma_fence and whether
// the compiler leaves accumulators alone (wgmma_done); wgmma's descriptors and the engine's tensor maps
// beyond what these kernels set in them; the rounding of ex2.approx, rsqrtf, mma, wgmma and red, which sum in
// an order of their own or flush subnormals; visibility of copies to global memory (tma_wait_read says
// nothing of it); time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace fastgpt::emulated {

constexpr int kWarp = 32, kWarpgroup = 128, kMaxThreads = 1024, kMaxShared = 227 * 1024;

// An instruction, and the line of the source that it stands at.
struct Where {
  const char *instruction, *file;
  int line;
};
// The default argument by which an instruction of this name knows its place.
#define FASTGPT_WHERE(instruction) \
  fastgpt::emulated::Where where = {instruction, __builtin_FILE(), __builtin_LINE()}

struct Thread {
  dim3 index;
  int number, lane;  // in the block, in its warp
};
struct Block {
  dim3 index, size, grid;
  unsigned char* shared;
  int shared_bytes;
  uint64_t number;  // of those that this process has run
};

extern const Thread* thread;  // that runs
extern Block block;

// Ends the launch with an error at this thread.
[[noreturn]] void fail(Where where, const std::string& what);

// Lets other threads run until ready(context) is true.
void wait(Where where, bool (*ready)(const void* context), const void* context);
template <class Condition>
void wait_until(Where where, const Condition& condition) {
  wait(
      where, [](const void* c) { return static_cast<bool>((*static_cast<const Condition*>(c))()); },
      &condition);
}

// The thread's warp (kWarp threads, of which those in `mask` take part) or warpgroup (kWarpgroup, all of
// them): returns when the last of them has come to this instruction and execute(operands, context) is done,
// once for all. operands[i] is what the i-th thread has brought as `own`, null if it takes no part.
void meet(int group, uint32_t mask, void* own, Where where, void (*execute)(void* const*, const void*),
          const void* context);

// An instruction of a whole warp: execute(Operands* const (&lanes)[32]) reads what the lanes have brought and
// writes their results there. Lanes that are not in `mask` are null.
template <class Operands, class Execute>
void warp_wide(uint32_t mask, Operands& own, Where where, const Execute& execute) {
  meet(
      kWarp, mask, &own, where,
      [](void* const* operands, const void* e) {
        Operands* lanes[kWarp];
        for (int i = 0; i < kWarp; i++) lanes[i] = static_cast<Operands*>(operands[i]);
        (*static_cast<const Execute*>(e))(lanes);
      },
      &execute);
}
// The same of a warpgroup, four warps of which the first one's number is a multiple of 4.
template <class Operands, class Execute>
void warpgroup_wide(Operands& own, Where where, const Execute& execute) {
  meet(
      kWarpgroup, ~0u, &own, where,
      [](void* const* operands, const void* e) {
        Operands* threads[kWarpgroup];
        for (int i = 0; i < kWarpgroup; i++) threads[i] = static_cast<Operands*>(operands[i]);
        (*static_cast<const Execute*>(e))(threads);
      },
      &execute);
}

void block_barrier(Where where);
// Barriers 0 to 15 of a block; `threads`, a multiple of 32, is how many have to arrive, those that wait
// included.
void barrier_sync(int id, int threads, Where where);
void barrier_arrive(int id, int threads, Where where);

// The order in which threads run from now on: in turn for 0, else as drawn from this seed.
void set_schedule(uint64_t seed);
// Whether something that may happen now or later is to happen now: never where threads run in turn.
bool at_once();

// What instructions leave under way: `reset` forgets it when a block begins, `unfinished` says what is left
// when all threads have returned, or "".
bool add_engine(void (*reset)(), std::string (*unfinished)());

// Words of 4 bytes in shared memory that thread number `writer` has written, which copies and products may
// not read before its fence_proxy.
void wrote(const void* word, int writer, Where where);
void fence_proxy();
void expect_fenced(const void* from, int bytes, Where where);

// Runs body(context) in each thread of each block of the grid; throws std::runtime_error.
void run(const char* kernel, dim3 grid, dim3 block, int shared_bytes, void (*body)(const void*),
         const void* context);

template <class T>
struct Shuffle {
  T value, result;
  int source;
};
template <class T>
T shuffle(uint32_t mask, T value, int source, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Shuffle<T> own{value, value, source};
  warp_wide(mask, own, where, [](Shuffle<T>* const(&lanes)[kWarp]) {
    for (Shuffle<T>* lane : lanes) {
      if (!lane) continue;
      if (lanes[lane->source])
        lane->result = lanes[lane->source]->value;
      else  // of a lane that takes no part: undefined
        std::memset(&lane->result, 0xff, sizeof(T));
    }
  });
  return own.result;
}

}  // namespace fastgpt::emulated

#define threadIdx (fastgpt::emulated::thread->index)
#define blockIdx (fastgpt::emulated::block.index)
#define blockDim (fastgpt::emulated::block.size)
#define gridDim (fastgpt::emulated::block.grid)

inline void __syncthreads(FASTGPT_WHERE("__syncthreads")) { fastgpt::emulated::block_barrier(where); }

inline void __syncwarp(uint32_t mask = ~0u, FASTGPT_WHERE("__syncwarp")) {
  int none = 0;
  fastgpt::emulated::warp_wide(mask, none, where, [](int* const(&)[32]) {});
}

// The lane that a shuffle reads is one of the same `width` lanes; else it is the lane itself.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, FASTGPT_WHERE("__shfl_sync")) {
  int lane = fastgpt::emulated::thread->lane;
  return fastgpt::emulated::shuffle(mask, value, (lane & -width) | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, FASTGPT_WHERE("__shfl_xor_sync")) {
  int lane = fastgpt::emulated::thread->lane, source = lane ^ lane_mask;
  return fastgpt::emulated::shuffle(mask, value, source / width > lane / width ? lane : source, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   FASTGPT_WHERE("__shfl_down_sync")) {
  int lane = fastgpt::emulated::thread->lane, source = lane + static_cast<int>(delta);
  return fastgpt::emulated::shuffle(mask, value, source / width != lane / width ? lane : source, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, FASTGPT_WHERE("__shfl_up_sync")) {
  int lane = fastgpt::emulated::thread->lane, source = lane - static_cast<int>(delta);
  return fastgpt::emulated::shuffle(mask, value, source < (lane & -width) ? lane : source, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, FASTGPT_WHERE("__ballot_sync")) {
  struct Vote {
    int predicate;
    uint32_t votes;
  } own{predicate, 0};
  fastgpt::emulated::warp_wide(mask, own, where, [](Vote* const(&lanes)[32]) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; i++) votes |= uint32_t{lanes[i] && lanes[i]->predicate} << i;
    for (Vote* lane : lanes)
      if (lane) lane->votes = votes;
  });
  return own.votes;
}
inline int __any_sync(uint32_t mask, int predicate, FASTGPT_WHERE("__any_sync")) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, FASTGPT_WHERE("__all_sync")) {
  return __ballot_sync(mask, predicate, where) == mask;
}

inline void __threadfence() {}
inline int atomicAdd(int* address, int value) {
  int before = *address;
  *address += value;
  return before;
}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return static_cast<float>(1 / __builtin_sqrt(static_cast<double>(x))); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
// The bytes of the result are those of (x, y), 0 to 7, that the hexadecimal digits of `selector` name.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
