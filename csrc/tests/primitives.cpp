// Compiled like kernels.cpp: once per instruction set, in one anonymous namespace, without standard headers
// that have inline functions.

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "primitives.h"

#include <sched.h>

#include "fastgpt/mask.h"
#include "fastgpt/philox.h"

namespace fastgpt {
namespace {

#include "../cpu/simd.h"
#include "../cpu/tile.h"
#include "../cpu/scratch.h"
#include "../cpu/attention_common.h"
#include "../cpu/dropout.h"
#include "../cpu/scores.h"
#include "../cpu/products.h"
#include "../cpu/attention_forward.h"
#include "../cpu/decode.h"

template <class T>
void widen(const void* source, int64_t n, float* target) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_upto(target + i, load_upto(static_cast<const T*>(source) + i, n - i), n - i);
}
template <class T>
void narrow(const float* source, int64_t n, void* target) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_upto(static_cast<T*>(target) + i, load_upto(source + i, n - i), n - i);
}
template <class T>
void quantise_all(const float* source, int64_t n, void* target) {
  for (int64_t i = 0; i < n; i++) quantise(static_cast<T*>(target) + i, source[i]);
}
template <class T>
constexpr Primitives::Conversions kStored = {widen<T>, narrow<T>, nullptr};
template <class T>
constexpr Primitives::Conversions kCached = {widen<T>, nullptr, quantise_all<T>};

void exp2_vector(float* x) { store(x, exp2(load(x))); }
void tanh_vector(float* x) { store(x, tanh(load(x))); }
void max_vector(const float* a, float* b) { store(b, max(load(a), load(b))); }
float horizontal_sum_vector(const float* x) { return horizontal_sum(load(x)); }
float horizontal_max_vector(const float* x) { return horizontal_max(load(x)); }

void transpose_square(float* square) {
  vf rows[kLanes];
  for (int i = 0; i < kLanes; i++) rows[i] = load(square + i * kLanes);
  transpose(rows);
  for (int i = 0; i < kLanes; i++) store(square + i * kLanes, rows[i]);
}

void sums_of_rows(float* square) {
  vf rows[kLanes];
  for (int i = 0; i < kLanes; i++) rows[i] = load(square + i * kLanes);
  store(square, sums(rows));
}

void keep_row(const Dropout& p, int64_t first, uint32_t c1, uint32_t c2, float* keep) {
  vf kept[4];
  keep_elements(p, first, c1, c2, kept);
  for (int v = 0; v < 4; v++) store(keep + v * kLanes, kept[v]);
}

}  // namespace

#define FASTGPT_CONCAT_(a, b) a##b
#define FASTGPT_CONCAT(a, b) FASTGPT_CONCAT_(a, b)

extern const Primitives FASTGPT_CONCAT(primitives_, FASTGPT_ISA);
const Primitives FASTGPT_CONCAT(primitives_, FASTGPT_ISA) = {
    kLanes,
    kStored<float>,
    kStored<bf16>,
    kStored<f16>,
    kCached<int8_t>,
    kCached<e4m3>,
    exp2_vector,
    tanh_vector,
    max_vector,
    horizontal_sum_vector,
    horizontal_max_vector,
    transpose_square,
    sums_of_rows,
    keep_row,
};

}  // namespace fastgpt
