// Matrix products of a warp (sm_80): mma.sync of 16-bit operands, and the loads that bring them from shared
// memory. The names of lanes are those of the PTX manual: lane = 4 group + in_group.
#pragma once

#include "device.h"

#ifdef FASTGPT_EMULATE
#include <algorithm>
#include <utility>
#endif

namespace fastgpt {

#ifdef FASTGPT_EMULATE
namespace emulated {

struct MatrixRows {
  const void* row;
  uint32_t words[4];
};
// What ldmatrix.x4 does: lane 8 m + r has brought the address of row r of matrix m.
inline void load_matrices(uint32_t (&words)[4], const void* row, bool transposed, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(where, "the row is not aligned to 16 bytes");
  MatrixRows own{row, {}};
  warp_wide(kAllLanes, own, where, [transposed](MatrixRows* const(&lanes)[kWarp]) {
    for (int i = 0; i < kWarp; i++)
      for (int m = 0; m < 4; m++)
        for (int half = 0; half < 2; half++) {
          int row = i / 4, column = i % 4 * 2 + half;
          if (transposed) std::swap(row, column);
          auto elements = static_cast<const uint16_t*>(lanes[8 * m + row]->row);
          lanes[i]->words[m] |= uint32_t{elements[column]} << 16 * half;
        }
  });
  std::copy(own.words, own.words + 4, words);
}

}  // namespace emulated
#endif

// Four matrices of 8 by 8 16-bit elements, whose rows are 16 bytes of shared memory: lane 8 m + r brings the
// address of row r of matrix m. words[m] then has elements 2 in_group and 2 in_group + 1 of row `group` of
// matrix m, the first one lowest.
#ifdef FASTGPT_EMULATE
inline void load_matrices(uint32_t (&words)[4], const void* row, FASTGPT_WHERE("ldmatrix")) {
  emulated::load_matrices(words, row, false, where);
}
#else
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
#endif

// The same of the transposed matrices: rows 2 in_group and 2 in_group + 1 of column `group`.
#ifdef FASTGPT_EMULATE
inline void load_transposed(uint32_t (&words)[4], const void* row, FASTGPT_WHERE("ldmatrix.trans")) {
  emulated::load_matrices(words, row, true, where);
}
#else
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
#endif

// load_matrices the other way (sm_90).
#ifdef FASTGPT_EMULATE
inline void store_matrices(void* row, const uint32_t (&words)[4], FASTGPT_WHERE("stmatrix")) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail(where, "the row is not aligned to 16 bytes");
  struct Rows {
    void* row;
    const uint32_t* words;
  } own{row, words};
  emulated::warp_wide(kAllLanes, own, where, [where](Rows* const(&lanes)[32]) {
    int first = emulated::thread->number - emulated::thread->lane;
    for (int i = 0; i < 32; i++)
      for (int m = 0; m < 4; m++) {
        auto* word = static_cast<unsigned char*>(lanes[8 * m + i / 4]->row) + i % 4 * 4;
        emulated::wrote(word, first + i, where);
        std::memcpy(word, &lanes[i]->words[m], 4);
      }
  });
}
#else
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
#endif

// d (16 by 8, fp32) += a (16 by 16) b (16 by 8), T fp16 or bf16. Of a lane,
//   a: rows group, group + 8, group, group + 8 at columns 2 in_group, 2 in_group + 1, and 8 more for the last
//   two b: rows 2 in_group, 2 in_group + 1, and 8 more for the second, of column group d: row group at
//   columns 2 in_group, 2 in_group + 1, and row group + 8
#ifdef FASTGPT_EMULATE
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  FASTGPT_WHERE("mma.sync")) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } own{d, a, {b0, b1}};
  emulated::warp_wide(kAllLanes, own, where, [](Operands* const(&lanes)[32]) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; i++)
      for (int half = 0; half < 2; half++) {
        int group = i / 4, column = i % 4 * 2 + half;
        auto element = [half](uint32_t word) {
          return to_float(T{static_cast<uint16_t>(word >> 16 * half)});
        };
        for (int w = 0; w < 4; w++) a[group + w % 2 * 8][column + w / 2 * 8] = element(lanes[i]->a[w]);
        for (int w = 0; w < 2; w++) b[column + w * 8][group] = element(lanes[i]->b[w]);
      }
    for (int row = 0; row < 16; row++) {
      float sums[8] = {};
      for (int k = 0; k < 16; k++)
        for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
      for (int column = 0; column < 8; column++)
        lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sums[column];
    }
  });
}
#else
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (dtype_of<T> == DType::bf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// a b + c of both 16-bit numbers of 32 bits.
template <class T>
__device__ __forceinline__ uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef FASTGPT_EMULATE
  auto element = [](uint32_t word, int half) {
    return to_float(T{static_cast<uint16_t>(word >> 16 * half)});
  };
  float sums[2];
  for (int half = 0; half < 2; half++) sums[half] = element(a, half) * element(b, half) + element(c, half);
  return pack_pair<T>(sums[0], sums[1]);
#else
  uint32_t sum;
  if constexpr (dtype_of<T> == DType::bf16)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
#endif
}

}  // namespace fastgpt
