// The functions of simd.h, and what other kernels have of the kind, behind pointers: the tests are compiled
// for any processor, primitives.cpp once per instruction set.
#pragma once

#include <cstdint>

#include "fastgpt/params.h"

namespace fastgpt {

struct Primitives {
  int lanes;
  // n elements, whole vectors and then the rest.
  struct Conversions {
    void (*widen)(const void* source, int64_t n, float* target);
    void (*narrow)(const float* source, int64_t n, void* target);    // null for cache types
    void (*quantise)(const float* source, int64_t n, void* target);  // of cache types alone
  } f32, bf16, f16, int8, e4m3;
  void (*exp2)(float* x);  // in place; here and below a vector, `lanes` floats
  void (*tanh)(float* x);
  void (*max)(const float* a, float* b);  // b = max(a, b)
  float (*horizontal_sum)(const float* x);
  float (*horizontal_max)(const float* x);
  void (*transpose)(float* square);
  void (*sums)(float* square);  // the first row = the sum of each row
  // 1 or 0 for 4 * lanes elements of a row, from `first` on.
  void (*keep_elements)(const Dropout& p, int64_t first, uint32_t c1, uint32_t c2, float* keep);
};

}  // namespace fastgpt
