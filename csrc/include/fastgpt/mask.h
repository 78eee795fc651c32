// Which keys a query sees: the one predicate of host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTGPT_HD __host__ __device__
#else
// Inlined always: a shared copy could have another instruction set's instructions (csrc/cpu/kernels.cpp).
#define FASTGPT_HD __attribute__((always_inline)) inline
#endif

namespace fastgpt {

// Key j is visible to query i iff i + sk - sq - left <= j <= i + sk - sq + right; -1 = unlimited.
// Causal is right = 0. The keys of a query are therefore one interval [begin(i), end(i)), and both
// ends rise with i.
struct Mask {
  int64_t seqlen_k, shift, left, right;

  FASTGPT_HD Mask(int64_t sq, int64_t sk, int64_t window_left, int64_t window_right)
      : seqlen_k(sk), shift(sk - sq), left(window_left), right(window_right) {}

  FASTGPT_HD int64_t begin(int64_t i) const {
    int64_t j = left < 0 ? 0 : i + shift - left;
    return j < 0 ? 0 : (j > seqlen_k ? seqlen_k : j);
  }
  FASTGPT_HD int64_t end(int64_t i) const {
    int64_t j = right < 0 ? seqlen_k : i + shift + right + 1;
    return j < 0 ? 0 : (j > seqlen_k ? seqlen_k : j);
  }
  // The first query that sees key j or a later one: queries before it see none of [j, ...).
  FASTGPT_HD int64_t first_query(int64_t j) const {
    int64_t i = right < 0 ? 0 : j - shift - right;
    return i < 0 ? 0 : i;
  }
  // One past the last query that sees key j or an earlier one.
  FASTGPT_HD int64_t last_query(int64_t j, int64_t sq) const {
    int64_t i = left < 0 ? sq : j - shift + left + 1;
    return i < 0 ? 0 : (i > sq ? sq : i);
  }
};

}  // namespace fastgpt
