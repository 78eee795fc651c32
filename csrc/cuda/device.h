// What kernels take from CUDA beside C++, under the names that CUDA has for it: the toolkit's headers, or the
// emulator. A kernel is the same text for both. What neither C++ nor CUDA C++ has is one function here, PTX
// under nvcc and its emulation beside it; a family of instructions has a header of its own.
//
// Of a kernel's rules: it is void kernel(const __grid_constant__ Params p), Params a struct; shared memory is
// all dynamic (shared_memory below) and NaN when a block begins; no thread returns before a barrier or a
// warp-wide instruction of the others.
#pragma once

#include <cstdint>

#ifdef FASTGPT_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "fastgpt/params.h"

namespace fastgpt {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Of shared memory, what a block may have on every chip from sm_80 on: sm_86 and sm_89 have least.
constexpr int kLeastShared = 99 * 1024;

FASTGPT_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The block's dynamic shared memory, aligned to 1024 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef FASTGPT_EMULATE
  return reinterpret_cast<T*>(emulated::block.shared);
#else
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
#endif
}

#ifndef FASTGPT_EMULATE
// As instructions want it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Barriers 1 to 15 of a block (0 is that of __syncthreads), passed when `threads` of them, a multiple of 32,
// have come; those that only arrive do not wait.
#ifdef FASTGPT_EMULATE
inline void named_barrier_sync(int id, int threads, FASTGPT_WHERE("named_barrier_sync")) {
  emulated::barrier_sync(id, threads, where);
}
inline void named_barrier_arrive(int id, int threads, FASTGPT_WHERE("named_barrier_arrive")) {
  emulated::barrier_arrive(id, threads, where);
}
#else
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// Numbers in global memory by which blocks wait for each other. Who has waited sees what the thread that set
// the flag, and those that it met at a barrier before, have done.
#ifdef FASTGPT_EMULATE
inline void flag_set(int* flag, int value) { *flag = value; }
inline void flag_wait(const int* flag, int value, FASTGPT_WHERE("flag_wait")) {
  emulated::wait_until(where, [flag, value] { return *flag == value; });
}
#else
__device__ __forceinline__ void flag_set(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void flag_wait(const int* flag, int value) {
  int found;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  while (found != value);
}
#endif

// Storage types: fp32 is float.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
constexpr DType dtype_of = DType::f32;
template <>
inline constexpr DType dtype_of<f16> = DType::f16;
template <>
inline constexpr DType dtype_of<bf16> = DType::bf16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(f16 x) {
#ifdef FASTGPT_EMULATE
  uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t{x.bits & 0x8000u} << 16;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponent's bias is 127 here and 15 there; subnormal numbers come out right, too.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

// Rounded to nearest even.
template <class T>
__device__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#ifdef FASTGPT_EMULATE
  uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#endif
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
#ifdef FASTGPT_EMULATE
  uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  uint32_t code;
  if (x != x)
    return {0x7fff};
  else if (magnitude >= 0x477ff000)  // 65520 and above
    code = 0x7c00;
  else if (magnitude <
           0x38800000)  // below 2^-14 they are multiples of 2^-24, a unit in the last place of 0.5
    code = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  else
    code = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | code)};
#else
  return {__half_as_ushort(__float2half_rn(x))};
#endif
}

// Two numbers as the 32 bits that hold them, the first one lowest; of float, one.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifdef FASTGPT_EMULATE
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
#else
  uint32_t packed;  // one instruction, which the compiler does not make of two conversions
  if constexpr (dtype_of<T> == DType::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// kElements elements that a thread reads or writes at once: one, or a multiple of 16 bytes, so aligned.
template <class T, int kElements>
struct Pack {
  static constexpr int kChunks = kElements * sizeof(T) / 16, kPerChunk = 16 / sizeof(T);
  static_assert(kElements * sizeof(T) % 16 == 0);
  uint4 chunks[kChunks];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) chunks[c] = __ldg(reinterpret_cast<const uint4*>(from) + c);
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int c = 0; c < kChunks; c++) reinterpret_cast<uint4*>(to)[c] = chunks[c];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kChunks; c++) chunks[c] = uint4{0, 0, 0, 0};
  }
  __device__ __forceinline__ void unpack(float (&x)[kElements]) const {
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      uint32_t words[4] = {chunks[c].x, chunks[c].y, chunks[c].z, chunks[c].w};
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if constexpr (sizeof(T) == 4) {
          x[c * kPerChunk + w] = __uint_as_float(words[w]);
        } else {
          x[c * kPerChunk + 2 * w] = to_float(T{static_cast<uint16_t>(words[w])});
          x[c * kPerChunk + 2 * w + 1] = to_float(T{static_cast<uint16_t>(words[w] >> 16)});
        }
      }
    }
  }
  // Rounds x to T.
  __device__ __forceinline__ void pack(const float (&x)[kElements]) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if constexpr (sizeof(T) == 4)
          words[w] = __float_as_uint(x[c * kPerChunk + w]);
        else
          words[w] = pack_pair<T>(x[c * kPerChunk + 2 * w], x[c * kPerChunk + 2 * w + 1]);
      }
      chunks[c] = uint4{words[0], words[1], words[2], words[3]};
    }
  }
};

template <class T>
struct Pack<T, 1> {
  T element;

  __device__ __forceinline__ void load(const T* from) { element = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = element; }
  __device__ __forceinline__ void clear() { element = T{}; }
  __device__ __forceinline__ void unpack(float (&x)[1]) const { x[0] = to_float(element); }
  __device__ __forceinline__ void pack(const float (&x)[1]) { element = from_float<T>(x[0]); }
};

// The compiler is to hold x as it is, and to compute anew what it has made of it.
template <class T, int kElements>
__device__ __forceinline__ void forget([[maybe_unused]] Pack<T, kElements>& x) {
#ifndef FASTGPT_EMULATE
#pragma unroll
  for (uint4& chunk : x.chunks) asm volatile("" : "+r"(chunk.x), "+r"(chunk.y), "+r"(chunk.z), "+r"(chunk.w));
#endif
}

constexpr uint32_t kAllLanes = ~0u;

// Of `width` neighbouring lanes, a power of two up to 32: the same sum, bit by bit, in each.
__device__ __forceinline__ float warp_sum(float x, int width) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    if (distance < width) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

}  // namespace fastgpt
