// Layer norm and RMS norm (Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467),
// forward and backward, for sm_80 and later.
//
//   z = dropout(x) + residual, rounded to their type; dropout(x) = x keep / (1 - dropout_p)
//   layer norm: mean = sum(z) / hidden, rstd = (sum((z - mean)^2) / hidden + eps)^-1/2
//   RMS norm:   mean = 0,               rstd = (sum(z^2) / hidden + eps)^-1/2
//   xhat = (z - mean) rstd,  out = xhat weight + bias
//
// x, residual, dout, dresidual_out (rows, hidden) in fp32, bf16 or fp16, any row stride; out, residual_out,
// dx, dresidual the same, contiguous; weight, bias, dweight, dbias (hidden) in x's type or fp32; mean, rstd
// (rows) fp32, as is all arithmetic. Threads read and write 16 bytes at once where all addresses and row
// strides are multiples of that, else single elements, by the kernels for long rows.
//
// A block is (threads of a row, rows): up to 32 threads of a row add up their sums by shuffles, more through
// shared memory. A row is in registers, each byte of it read once and written once, if it is not longer than
// the tables below say; longer ones are walked through twice. A row's bits depend on that row alone; those of
// dweight and dbias on shape and chip: no atomics. Compiled with --fmad=false: statistics are those of the
// rounded z. Held by tests/test_norm.py.
#include "norm.h"

#include "device.h"
#include "dropout.h"
#include "launch.h"

namespace fastgpt {
namespace {

// How rows up to `hidden` elements are shared out.
struct Split {
  int64_t hidden;
  int threads, rows;  // threads of a row, rows of a block
  int elements;       // of a thread, in registers
};

// The launch tables: the first row that is long enough. Not measured on hardware yet.
constexpr Split kForward[] = {{64, 8, 16, 8},     {256, 32, 4, 8},    {512, 32, 4, 16},  {768, 32, 4, 24},
                              {1024, 32, 4, 32},  {1536, 64, 2, 24},  {2048, 64, 2, 32}, {3072, 128, 1, 24},
                              {4096, 128, 1, 32}, {6144, 256, 1, 24}, {8192, 256, 1, 32}};
// Longer rows and those that are not aligned; a thread has some columns at a time.
constexpr Split kLong[] = {{64, 8, 16, 0}, {512, 32, 4, 0}, {4096, 128, 1, 0}, {INT64_MAX, 512, 1, 0}};
constexpr int kMostThreads = 512;

template <int kRows>
const Split* find(const Split (&table)[kRows], int64_t hidden) {
  for (const Split& split : table)
    if (hidden <= split.hidden) return &split;
  return nullptr;
}

constexpr int kSumBuffers = 2 * kMostThreads / 32;

// Sums over a row, in the same order in each of its threads. The warps of a row meet at a barrier of the
// block, in one of two buffers in turn: who writes to a buffer again has passed the barrier of the other one,
// which all have come to after they had read this one.
struct RowSum {
  float* buffer = shared_memory<float>();
  int turn = 0;

  __device__ __forceinline__ float operator()(float x) {
    int threads = static_cast<int>(blockDim.x);
    x = warp_sum(x, threads < 32 ? threads : 32);
    if (threads <= 32) return x;
    int warps = threads / 32, row = static_cast<int>(threadIdx.y) * warps;
    float* sums = buffer + turn * (kSumBuffers / 2) + row;
    turn ^= 1;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
    for (int w = 0; w < warps; w++) x += sums[w];
    return x;
  }
};

template <int kElements>
__device__ __forceinline__ float sum(const float (&x)[kElements]) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kElements; i++) total += x[i];
  return total;
}

// weight or bias (hidden) from `column` on, in T or fp32.
template <class T, int kVector>
__device__ __forceinline__ void load_parameter(const void* parameter, bool fp32, int64_t column,
                                               float (&x)[kVector]) {
  if (fp32) {
    Pack<float, kVector> pack;
    pack.load(static_cast<const float*>(parameter) + column);
    pack.unpack(x);
  } else {
    Pack<T, kVector> pack;
    pack.load(static_cast<const T*>(parameter) + column);
    pack.unpack(x);
  }
}

// kVector elements of z, rounded to T.
template <class T, int kVector>
__device__ __forceinline__ Pack<T, kVector> load_sum(const DeviceNormForward& p, int64_t row, int64_t column,
                                                     float (&z)[kVector]) {
  Pack<T, kVector> pack, other;
  pack.load(static_cast<const T*>(p.x) + row * p.x_stride + column);
  if (p.residual) other.load(static_cast<const T*>(p.residual) + row * p.residual_stride + column);
  pack.unpack(z);
  if (!p.residual && !p.dropout.rng_state) return pack;
  if (p.dropout.rng_state)
    drop(p.dropout, column, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), z);
  if (p.residual) {
    float residual[kVector];
    other.unpack(residual);
#pragma unroll
    for (int i = 0; i < kVector; i++) z[i] += residual[i];
  }
  pack.pack(z);
  pack.unpack(z);
  return pack;
}

// xhat weight + bias, rounded, to out.
template <class T, int kVector>
__device__ __forceinline__ void store_affine(const DeviceNormForward& p, int64_t row, int64_t column,
                                             float (&xhat)[kVector]) {
  bool fp32 = p.weight_dtype == DType::f32;
  float parameter[kVector];
  if (p.weight) {
    load_parameter<T>(p.weight, fp32, column, parameter);
#pragma unroll
    for (int i = 0; i < kVector; i++) xhat[i] *= parameter[i];
  }
  if (p.bias) {
    load_parameter<T>(p.bias, fp32, column, parameter);
#pragma unroll
    for (int i = 0; i < kVector; i++) xhat[i] += parameter[i];
  }
  Pack<T, kVector> pack;
  pack.pack(xhat);
  pack.store(static_cast<T*>(p.out) + row * p.hidden + column);
}

// out, mean, rstd and, where there is memory for it, z of blockDim.y rows, each in the registers of
// blockDim.x threads: piece i of thread t is the kVector elements from (i blockDim.x + t) kVector on.
template <class T, int kVector, int kPieces>
__global__ void __launch_bounds__(kMostThreads)
    norm_forward_kernel(const __grid_constant__ DeviceNormForward p) {
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  bool has_row = row < p.rows;
  float scale = 1.0f / static_cast<float>(p.hidden);
  float z[kPieces][kVector];
  RowSum row_sum;
  auto column_of = [&](int piece) {
    return static_cast<int64_t>((piece * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) *
                                kVector);
  };
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    int64_t column = column_of(i);
    if (has_row && column < p.hidden) {
      Pack<T, kVector> pack = load_sum<T, kVector>(p, row, column, z[i]);
      if (p.residual_out) pack.store(static_cast<T*>(p.residual_out) + row * p.hidden + column);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; e++) z[i][e] = 0.0f;
    }
  }
  auto squares = [&] {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++)
#pragma unroll
      for (int e = 0; e < kVector; e++) total += z[i][e] * z[i][e];
    return row_sum(total) * scale;
  };
  auto mean_of_z = [&] {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) total += sum(z[i]);
    return row_sum(total) * scale;
  };
  float rstd, rest = 0.0f;
  if (p.mean) {
    float mean = mean_of_z();
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      if (column_of(i) < p.hidden) {
#pragma unroll
        for (int e = 0; e < kVector; e++) z[i][e] -= mean;
      }
    rest = mean_of_z();  // what rounding has taken from a large mean: where it matters, z - mean is exact
    float variance = squares() - rest * rest;
    // Not fmaxf, which makes 0 of NaN.
    rstd = rsqrtf((variance < 0.0f ? 0.0f : variance) + p.eps);
    if (has_row && threadIdx.x == 0) p.mean[row] = mean + rest;
  } else {
    rstd = rsqrtf(squares() + p.eps);
  }
  if (has_row && threadIdx.x == 0) p.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    int64_t column = column_of(i);
    if (!has_row || column >= p.hidden) continue;
#pragma unroll
    for (int e = 0; e < kVector; e++) z[i][e] = (z[i][e] - rest) * rstd;
    store_affine<T, kVector>(p, row, column, z[i]);
  }
}

// The same of rows of any length: a walk for z and its statistics, and one for out.
//
// Each lane follows the mean of what it sees, and the squares about it (Welford 1962), of z less a pivot, the
// mean of the first columns; then the lanes are joined (Chan, Golub & LeVeque 1983). So no variance is a
// difference of large moments, and a large mean's rounding is not seen.
template <class T, int kVector>
__global__ void __launch_bounds__(kMostThreads)
    norm_forward_long_kernel(const __grid_constant__ DeviceNormForward p) {
  RowSum row_sum;
  float scale = 1.0f / static_cast<float>(p.hidden);
  int64_t start = int64_t{threadIdx.x} * kVector, step = int64_t{blockDim.x} * kVector;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < p.rows;
       first += int64_t{gridDim.x} * blockDim.y) {
    int64_t row = first + threadIdx.y;
    bool has_row = row < p.rows;
    int64_t end = has_row ? p.hidden : 0;
    float z[kVector], means[kVector] = {}, squares[kVector] = {}, seen = 0.0f, pivot = 0.0f;
    if (p.mean) {
      float total = 0.0f;
      if (start < end) {
        load_sum<T, kVector>(p, row, start, z);
        total = sum(z);
      }
      pivot = row_sum(total) / static_cast<float>(step < p.hidden ? step : p.hidden);
    }
    for (int64_t column = start; column < end; column += step) {
      Pack<T, kVector> pack = load_sum<T, kVector>(p, row, column, z);
      if (p.residual_out) pack.store(static_cast<T*>(p.residual_out) + row * p.hidden + column);
      if (!p.mean) {
#pragma unroll
        for (int e = 0; e < kVector; e++) squares[e] += z[e] * z[e];
        continue;
      }
      seen += 1.0f;
      float share = 1.0f / seen;
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        float distance = z[e] - pivot - means[e];
        means[e] += distance * share;
        squares[e] += distance * distance * (1.0f - share);
      }
    }
    float rest = 0.0f;
    if (p.mean) {
      rest = row_sum(sum(means) * seen) * scale;
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        float distance = means[e] - rest;
        squares[e] += distance * distance * seen;
      }
    }
    float rstd = rsqrtf(row_sum(sum(squares)) * scale + p.eps);
    if (has_row && threadIdx.x == 0) {
      if (p.mean) p.mean[row] = pivot + rest;
      p.rstd[row] = rstd;
    }
    for (int64_t column = start; column < end; column += step) {
      load_sum<T, kVector>(p, row, column, z);
#pragma unroll
      for (int e = 0; e < kVector; e++) z[e] = (z[e] - pivot - rest) * rstd;
      store_affine<T, kVector>(p, row, column, z);
    }
  }
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

constexpr int64_t kMostBlocks = 1 << 30;

template <class T>
void run_forward(const DeviceNormForward& p, const Queue& queue) {
  constexpr int kVector = 16 / sizeof(T);
  bool vectors = p.hidden % kVector == 0 && p.x_stride % kVector == 0 && p.residual_stride % kVector == 0;
  for (const void* address : {p.x, p.residual, p.weight, p.bias, static_cast<const void*>(p.out),
                              static_cast<const void*>(p.residual_out)})
    vectors = vectors && aligned(address);
  const Split* split = vectors ? find(kForward, p.hidden) : nullptr;
  void (*kernel)(DeviceNormForward) = nullptr;
  const char* name = "norm_forward";
  if (split) {
    switch (split->elements) {
      case 8:
        kernel = norm_forward_kernel<T, kVector, 8 / kVector>;
        break;
      case 16:
        kernel = norm_forward_kernel<T, kVector, 16 / kVector>;
        break;
      case 24:
        kernel = norm_forward_kernel<T, kVector, 24 / kVector>;
        break;
      case 32:
        kernel = norm_forward_kernel<T, kVector, 32 / kVector>;
        break;
    }
  } else {
    split = find(kLong, p.hidden);
    kernel = vectors ? norm_forward_long_kernel<T, kVector> : norm_forward_long_kernel<T, 1>;
    name = "norm_forward_long";
  }
  int64_t blocks = (p.rows + split->rows - 1) / split->rows;
  blocks = blocks < kMostBlocks ? blocks : kMostBlocks;
  launch(kernel, {name, dim3(blocks), dim3(split->threads, split->rows), kSumBuffers * 4}, queue, p);
}

}  // namespace

void norm_forward(const DeviceNormForward& p, const Queue& queue) {
  if (p.rows == 0) return;
  switch (p.dtype) {
    case DType::f32:
      return run_forward<float>(p, queue);
    case DType::bf16:
      return run_forward<bf16>(p, queue);
    case DType::f16:
      return run_forward<f16>(p, queue);
  }
}

}  // namespace fastgpt
