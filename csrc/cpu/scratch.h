// Scratch memory in parts.

// Takes parts of `memory`, one behind the other, each at a multiple of 64 bytes; of nullptr it counts their
// size only. To the address sanitizer scratch memory is one allocation, in which the end of one part would
// run into the next unseen: where it watches, a stretch that nothing may touch lies behind each part.
struct Parts {
  float* memory;
  int64_t size = 0;

#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kFence = 16;
#else
  static constexpr int64_t kFence = 0;
#endif

  FASTGPT_INLINE float* take(int64_t floats) {
    int64_t first = size;
    size += round_up(floats, 16) + kFence;
    if (!memory) return nullptr;
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(memory + first + floats, (size - first - floats) * sizeof(float));
#endif
    return memory + first;
  }
  template <class T>
  FASTGPT_INLINE T* take_as(int64_t n) {
    return reinterpret_cast<T*>(take((n * sizeof(T) + sizeof(float) - 1) / sizeof(float)));
  }
};
