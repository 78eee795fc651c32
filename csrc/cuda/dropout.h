// The random bits of dropout on GPUs: philox.h with the seed in the GPU's memory.
#pragma once

#include "device.h"
#include "fastgpt/philox.h"

namespace fastgpt {

struct MultiplyWide {
  static FASTGPT_HD void wide(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
    uint64_t product = uint64_t{a} * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// x[i] times keep / (1 - dropout_p) for elements first, ..., first + kElements - 1 of the row (c1, c2);
// kElements is 1, or a multiple of 4 that divides first.
template <int kElements>
__device__ __forceinline__ void drop(const DeviceDropout& dropout, int64_t first, uint32_t c1, uint32_t c2,
                                     float (&x)[kElements]) {
  uint64_t seed = static_cast<uint64_t>(__ldg(dropout.rng_state));
  uint32_t offset = static_cast<uint32_t>(__ldg(dropout.rng_state + 1));
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    uint32_t words[4] = {static_cast<uint32_t>((first + i) / 4), c1, c2, offset};
    philox<MultiplyWide>(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    if constexpr (kElements == 1) {
      int word = static_cast<int>(first & 3);
      uint32_t mine = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
      x[0] *= mine >= dropout.threshold ? dropout.scale : 0.0f;
    } else {
#pragma unroll
      for (int w = 0; w < 4; w++) x[i + w] *= words[w] >= dropout.threshold ? dropout.scale : 0.0f;
    }
  }
}

}  // namespace fastgpt
