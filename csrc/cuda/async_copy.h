// Copies from global to shared memory that a thread does not wait for (sm_80: cp.async).
//
// A thread's copies belong to groups: those between two commits. Emulated, a copy is done when its thread
// waits for its group, and its bytes are NaN until then: who forgets to wait, or to meet those who have
// waited, reads NaN.
#pragma once

#include "device.h"

#ifdef FASTGPT_EMULATE
#include <vector>
#endif

namespace fastgpt {

#ifdef FASTGPT_EMULATE
namespace emulated {

struct AsyncCopies {
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    uint64_t group;
  };
  std::vector<Copy> copies;  // not done yet, oldest first
  uint64_t group = 0;        // that copies belong to now
  uint64_t block = 0;        // whose thread has begun them
};

// Of the thread that runs.
inline AsyncCopies& async_copies() {
  static AsyncCopies threads[kMaxThreads];
  AsyncCopies& own = threads[thread->number];
  if (own.block != block.number) {
    own.copies.clear();
    own.group = 0;
    own.block = block.number;
  }
  return own;
}

}  // namespace emulated
#endif

// 16 bytes, or, where `read` is false, zeros; both addresses are multiples of 16.
#ifdef FASTGPT_EMULATE
inline void copy_async(void* to, const void* from, bool read, FASTGPT_WHERE("cp.async")) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    emulated::fail(where, "an address is not aligned to 16 bytes");
  std::memset(to, 0xff, 16);
  emulated::AsyncCopies& own = emulated::async_copies();
  own.copies.push_back({to, read ? from : nullptr, own.group});
}
#else
__device__ __forceinline__ void copy_async(void* to, const void* from, bool read) {
  asm volatile(
      "{\n.reg .pred ignore;\nsetp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignore;\n}" ::"r"(shared_address(to)),
      "l"(from), "r"(static_cast<uint32_t>(read))
      : "memory");
}
#endif

__device__ __forceinline__ void commit_copies() {
#ifdef FASTGPT_EMULATE
  emulated::async_copies().group++;
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but this thread's kPending latest groups have arrived. Other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef FASTGPT_EMULATE
  emulated::AsyncCopies& own = emulated::async_copies();
  size_t done = 0;
  for (; done < own.copies.size() && own.copies[done].group + kPending < own.group; done++) {
    const auto& copy = own.copies[done];
    if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  own.copies.erase(own.copies.begin(), own.copies.begin() + static_cast<std::ptrdiff_t>(done));
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastgpt
