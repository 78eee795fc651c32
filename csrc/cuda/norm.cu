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

#include <initializer_list>

#include "device.h"
#include "dropout.h"
#include "launch.h"

namespace fastgpt {
namespace {

// How rows up to so many bytes are shared out.
struct Split {
  int64_t bytes;
  int threads, rows;  // threads of a row, rows of a block
  int pieces;         // of 16 bytes, that a thread has in registers
};

// The launch tables: the first line that is long enough. Not measured on hardware yet.
constexpr Split kForward[] = {{128, 8, 16, 1},   {512, 32, 4, 1},    {1024, 32, 4, 2},   {1536, 32, 4, 3},
                              {2048, 32, 4, 4},  {3072, 64, 2, 3},   {4096, 64, 2, 4},   {6144, 128, 1, 3},
                              {8192, 128, 1, 4}, {12288, 256, 1, 3}, {16384, 256, 1, 4}, {24576, 512, 1, 3},
                              {32768, 512, 1, 4}};
// A thread has sums over the rows, too.
constexpr Split kBackward[] = {{128, 8, 48, 1},   {512, 32, 12, 1},   {1024, 32, 8, 2},  {1536, 96, 4, 1},
                               {2048, 64, 4, 2},  {3072, 192, 2, 1},  {4096, 128, 2, 2}, {6144, 384, 1, 1},
                               {8192, 256, 1, 2}, {12288, 384, 1, 2}, {16384, 512, 1, 2}};
// Longer rows and those that are not aligned; a thread has some columns at a time.
constexpr Split kLong[] = {{128, 8, 16, 0}, {1024, 32, 4, 0}, {8192, 128, 1, 0}, {INT64_MAX, 512, 1, 0}};
constexpr int kMostThreads = 512;
// Of norm_backward_kernel: as many registers as let two blocks of one piece, or 512 threads of two, be on a
// multiprocessor.
constexpr int kOnePieceThreads = 384;

template <int kLines>
const Split* find(const Split (&table)[kLines], int64_t bytes) {
  for (const Split& split : table)
    if (bytes <= split.bytes) return &split;
  return nullptr;
}

constexpr int kMostWarps = kMostThreads / 32, kMostSums = 2;
constexpr int kSumBytes = 2 * kMostSums * kMostWarps * sizeof(float);

// Replaces x by its sums over a row, in the same order in each of its threads. The warps of a row meet at a
// barrier of the block, in one of two buffers in turn: who writes to a buffer again has passed the barrier of
// the other one, to which all have come after they had read this one.
struct RowSum {
  float* buffers = shared_memory<float>();
  int turn = 0;

  template <int kSums>
  __device__ __forceinline__ void operator()(float (&x)[kSums]) {
    static_assert(kSums <= kMostSums);
    int threads = static_cast<int>(blockDim.x), warps = threads / 32;
#pragma unroll
    for (int i = 0; i < kSums; i++) x[i] = warp_sum(x[i], threads < 32 ? threads : 32);
    if (threads <= 32) return;
    float* sums = buffers + (turn * kMostSums * kMostWarps + static_cast<int>(threadIdx.y) * warps);
    turn ^= 1;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kSums; i++) sums[i * kMostWarps + threadIdx.x / 32] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; i++) {
      x[i] = 0.0f;
      for (int w = 0; w < warps; w++) x[i] += sums[i * kMostWarps + w];
    }
  }
  __device__ __forceinline__ float operator()(float x) {
    float sums[1] = {x};
    (*this)(sums);
    return sums[0];
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

// kVector elements of what z is made of.
template <class T, int kVector>
struct Terms {
  Pack<T, kVector> x, residual;

  __device__ __forceinline__ void load(const DeviceNormForward& p, int64_t row, int64_t column) {
    x.load(static_cast<const T*>(p.x) + row * p.x_stride + column);
    if (p.residual) residual.load(static_cast<const T*>(p.residual) + row * p.residual_stride + column);
  }
  // z, rounded to T, which stays in x.
  template <bool kDropout>
  __device__ __forceinline__ void add(const DeviceNormForward& p, int64_t row, int64_t column,
                                      float (&z)[kVector]) {
    x.unpack(z);
    if constexpr (kDropout)
      drop(p.dropout, column, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), z);
    if (p.residual) {
      float other[kVector];
      residual.unpack(other);
#pragma unroll
      for (int e = 0; e < kVector; e++) z[e] += other[e];
    }
    if (kDropout || p.residual) {
      x.pack(z);
      x.unpack(z);
    }
  }
  __device__ __forceinline__ void store_sum(const DeviceNormForward& p, int64_t row, int64_t column) const {
    if (p.residual_out) x.store(static_cast<T*>(p.residual_out) + row * p.hidden + column);
  }
};

// xhat weight + bias, rounded, to out.
template <class T, int kVector>
__device__ __forceinline__ void store_affine(const DeviceNormForward& p, int64_t row, int64_t column,
                                             float (&xhat)[kVector]) {
  bool fp32 = p.weight_dtype == DType::f32;
  float weight[kVector], bias[kVector];
  if (p.weight) load_parameter<T>(p.weight, fp32, column, weight);
  if (p.bias) load_parameter<T>(p.bias, fp32, column, bias);
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    if (p.weight) xhat[e] *= weight[e];
    if (p.bias) xhat[e] += bias[e];
  }
  Pack<T, kVector> pack;
  pack.pack(xhat);
  pack.store(static_cast<T*>(p.out) + row * p.hidden + column);
}

// out, mean, rstd and, where there is memory for it, z of blockDim.y rows, each in the registers of
// blockDim.x threads: piece i of thread t is the kVector elements from (i blockDim.x + t) kVector on.
template <class T, int kVector, int kPieces, bool kDropout>
__global__ void __launch_bounds__(kMostThreads, 1)
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
  Terms<T, kVector> terms[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; i++)
    if (has_row && column_of(i) < p.hidden) terms[i].load(p, row, column_of(i));
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    if (has_row && column_of(i) < p.hidden) {
      terms[i].template add<kDropout>(p, row, column_of(i), z[i]);
      terms[i].store_sum(p, row, column_of(i));
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
template <class T, int kVector, bool kDropout>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_forward_long_kernel(const __grid_constant__ DeviceNormForward p) {
  RowSum row_sum;
  float scale = 1.0f / static_cast<float>(p.hidden);
  int64_t start = int64_t{threadIdx.x} * kVector, step = int64_t{blockDim.x} * kVector;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < p.rows;
       first += int64_t{gridDim.x} * blockDim.y) {
    int64_t row = first + threadIdx.y;
    bool has_row = row < p.rows;
    int64_t end = has_row ? p.hidden : 0;
    Terms<T, kVector> terms;
    float z[kVector], means[kVector] = {}, squares[kVector] = {}, seen = 0.0f, pivot = 0.0f;
    if (p.mean) {
      float total = 0.0f;
      if (start < end) {
        terms.load(p, row, start);
        terms.template add<kDropout>(p, row, start, z);
        total = sum(z);
      }
      pivot = row_sum(total) / static_cast<float>(step < p.hidden ? step : p.hidden);
    }
    for (int64_t column = start; column < end; column += step) {
      terms.load(p, row, column);
      terms.template add<kDropout>(p, row, column, z);
      terms.store_sum(p, row, column);
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
      terms.load(p, row, column);
      terms.template add<kDropout>(p, row, column, z);
#pragma unroll
      for (int e = 0; e < kVector; e++) z[e] = (z[e] - pivot - rest) * rstd;
      store_affine<T, kVector>(p, row, column, z);
    }
  }
}

// Backward of out = xhat weight + bias, above: with g = dout weight,
//
//   dz = rstd (g - xhat mean(g xhat) - mean(g)) + dresidual_out   (RMS norm: no mean(g))
//   dx = dz keep / (1 - dropout_p),  dresidual = dz
//   dweight = sum over rows of dout xhat,  dbias = sum over rows of dout

// dresidual and dx of kVector elements; dz is so far what reaches z by way of out.
template <class T, int kVector, bool kDropout>
__device__ __forceinline__ void store_gradients(const DeviceNormBackward& p, int64_t row, int64_t column,
                                                float (&dz)[kVector]) {
  Pack<T, kVector> pack;
  if (p.dresidual_out) {
    float other[kVector];
    pack.load(static_cast<const T*>(p.dresidual_out) + row * p.dresidual_stride + column);
    pack.unpack(other);
#pragma unroll
    for (int e = 0; e < kVector; e++) dz[e] += other[e];
  }
  if (p.dresidual) {
    pack.pack(dz);
    pack.store(static_cast<T*>(p.dresidual) + row * p.hidden + column);
  }
  if constexpr (kDropout)
    drop(p.dropout, column, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), dz);
  pack.pack(dz);
  pack.store(static_cast<T*>(p.dx) + row * p.hidden + column);
}

// Adds up x of the block's threads of one threadIdx.x, in the order of threadIdx.y, and writes the sums to
// partial[column_of(0)], partial[column_of(1)], ... where these are below `hidden`.
template <int kElements, class ColumnOf>
__device__ __forceinline__ void store_partial(const float (&x)[kElements], float* partial, int64_t hidden,
                                              const ColumnOf& column_of) {
  float* shared = shared_memory<float>() + threadIdx.x;
  int threads = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y);
  int y = static_cast<int>(threadIdx.y);
  __syncthreads();  // what the memory was used for before is over
#pragma unroll
  for (int e = 0; e < kElements; e++) shared[(y * kElements + e) * threads] = x[e];
  __syncthreads();
  for (int e = y; e < kElements; e += rows) {
    float total = 0.0f;
    for (int other = 0; other < rows; other++) total += shared[(other * kElements + e) * threads];
    if (column_of(e) < hidden) partial[column_of(e)] = total;
  }
}

constexpr int partial_bytes(int threads, int rows, int elements) {
  int bytes = threads * rows * elements * static_cast<int>(sizeof(float));
  return bytes > kSumBytes ? bytes : kSumBytes;
}

// dx, dresidual, and what the block's rows add to dweight and dbias. A block owns every gridDim.x-th group of
// blockDim.y rows, each in the registers of blockDim.x threads as in norm_forward_kernel; the next group's
// are on their way while one is computed.
template <class T, int kVector, int kPieces, bool kDropout>
__global__ void __launch_bounds__(kPieces == 1 ? kOnePieceThreads : kMostThreads, kPieces == 1 ? 2 : 1)
    norm_backward_kernel(const __grid_constant__ DeviceNormBackward p) {
  constexpr int kElements = kPieces * kVector;
  RowSum row_sum;
  float scale = 1.0f / static_cast<float>(p.hidden);
  auto column_of = [](int e) {
    int piece = e / kVector * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    return piece * kVector + e % kVector;
  };
  float weight[kElements], dweight[kElements] = {}, dbias[kElements] = {};
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    float loaded[kVector];
    bool has = p.weight && column_of(i * kVector) < p.hidden;
    if (has) load_parameter<T>(p.weight, p.weight_dtype == DType::f32, column_of(i * kVector), loaded);
#pragma unroll
    for (int e = 0; e < kVector; e++) weight[i * kVector + e] = has ? loaded[e] : 1.0f;
  }
  Pack<T, kVector> next_dout[kPieces], next_z[kPieces];
  auto fetch = [&](int64_t row) {
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      int column = column_of(i * kVector);
      if (row < p.rows && column < p.hidden) {
        next_dout[i].load(static_cast<const T*>(p.dout) + row * p.dout_stride + column);
        next_z[i].load(static_cast<const T*>(p.z) + row * p.z_stride + column);
      } else {
        next_dout[i].clear();
        next_z[i].clear();
      }
    }
  };
  int64_t step = int64_t{gridDim.x} * blockDim.y;
  fetch(int64_t{blockIdx.x} * blockDim.y + threadIdx.y);
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < p.rows; first += step) {
    int64_t row = first + threadIdx.y;
    bool has_row = row < p.rows;
    float mean = has_row && p.mean ? p.mean[row] : 0.0f, rstd = has_row ? p.rstd[row] : 0.0f;
    Pack<T, kVector> dout_pack[kPieces], z_pack[kPieces];
    float sums[2] = {};
    auto unpack = [&](int i, float (&g)[kVector], float (&xhat)[kVector]) {
      dout_pack[i].unpack(g);
      z_pack[i].unpack(xhat);
#pragma unroll
      for (int e = 0; e < kVector; e++) xhat[e] = (xhat[e] - mean) * rstd;
    };
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      float g[kVector], xhat[kVector];
      dout_pack[i] = next_dout[i];
      z_pack[i] = next_z[i];
      unpack(i, g, xhat);
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        int at = i * kVector + e;
        dweight[at] += g[e] * xhat[e];
        dbias[at] += g[e];
        g[e] *= weight[at];
        sums[0] += g[e] * xhat[e];
        sums[1] += g[e];
      }
    }
    fetch(row + step);
    row_sum(sums);
    float mean_gx = sums[0] * scale, mean_g = p.mean ? sums[1] * scale : 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      int column = column_of(i * kVector);
      if (!has_row || column >= p.hidden) continue;
      // Unpacked again: fewer registers than to keep them in fp32 meanwhile.
      forget(dout_pack[i]);
      forget(z_pack[i]);
      float g[kVector], xhat[kVector];
      unpack(i, g, xhat);
#pragma unroll
      for (int e = 0; e < kVector; e++)
        g[e] = (g[e] * weight[i * kVector + e] - xhat[e] * mean_gx - mean_g) * rstd;
      store_gradients<T, kVector, kDropout>(p, row, column, g);
    }
  }
  int64_t at = int64_t{blockIdx.x} * p.hidden;
  if (p.dweight) store_partial(dweight, p.partial_dweight + at, p.hidden, column_of);
  if (p.dbias) store_partial(dbias, p.partial_dbias + at, p.hidden, column_of);
}

// dx and dresidual of rows of any length, blockDim.y at a time: a walk for the means, and one for the
// gradients.
template <class T, int kVector, bool kDropout>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_backward_long_kernel(const __grid_constant__ DeviceNormBackward p) {
  RowSum row_sum;
  float scale = 1.0f / static_cast<float>(p.hidden);
  int64_t start = int64_t{threadIdx.x} * kVector, step = int64_t{blockDim.x} * kVector;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < p.rows;
       first += int64_t{gridDim.x} * blockDim.y) {
    int64_t row = first + threadIdx.y;
    bool has_row = row < p.rows;
    int64_t end = has_row ? p.hidden : 0;
    float mean = has_row && p.mean ? p.mean[row] : 0.0f, rstd = has_row ? p.rstd[row] : 0.0f;
    float g[kVector], xhat[kVector];
    auto load = [&](int64_t column) {
      Pack<T, kVector> pack;
      pack.load(static_cast<const T*>(p.dout) + row * p.dout_stride + column);
      pack.unpack(g);
      pack.load(static_cast<const T*>(p.z) + row * p.z_stride + column);
      pack.unpack(xhat);
      if (p.weight) {
        float weight[kVector];
        load_parameter<T>(p.weight, p.weight_dtype == DType::f32, column, weight);
#pragma unroll
        for (int e = 0; e < kVector; e++) g[e] *= weight[e];
      }
#pragma unroll
      for (int e = 0; e < kVector; e++) xhat[e] = (xhat[e] - mean) * rstd;
    };
    float products[kVector] = {}, totals[kVector] = {};
    for (int64_t column = start; column < end; column += step) {
      load(column);
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        products[e] += g[e] * xhat[e];
        totals[e] += g[e];
      }
    }
    float sums[2] = {sum(products), sum(totals)};
    row_sum(sums);
    float mean_gx = sums[0] * scale, mean_g = p.mean ? sums[1] * scale : 0.0f;
    for (int64_t column = start; column < end; column += step) {
      load(column);
      float dz[kVector];
#pragma unroll
      for (int e = 0; e < kVector; e++) dz[e] = (g[e] - xhat[e] * mean_gx - mean_g) * rstd;
      store_gradients<T, kVector, kDropout>(p, row, column, dz);
    }
  }
}

constexpr int kColumnThreads = 32, kColumnRows = 8;

// What the rows add to dweight and dbias, beside norm_backward_long_kernel. A block owns 32 kVector columns
// of every gridDim.y-th group of 8 rows.
template <class T, int kVector>
__global__ void __launch_bounds__(kColumnThreads* kColumnRows)
    norm_columns_kernel(const __grid_constant__ DeviceNormBackward p) {
  int64_t column = (int64_t{blockIdx.x} * kColumnThreads + threadIdx.x) * kVector;
  float dweight[kVector] = {}, dbias[kVector] = {};
  if (column < p.hidden) {
    for (int64_t row = int64_t{blockIdx.y} * kColumnRows + threadIdx.y; row < p.rows;
         row += int64_t{gridDim.y} * kColumnRows) {
      float dout[kVector], z[kVector], mean = p.mean ? p.mean[row] : 0.0f, rstd = p.rstd[row];
      Pack<T, kVector> pack, other;
      pack.load(static_cast<const T*>(p.dout) + row * p.dout_stride + column);
      other.load(static_cast<const T*>(p.z) + row * p.z_stride + column);
      pack.unpack(dout);
      other.unpack(z);
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        dweight[e] += dout[e] * ((z[e] - mean) * rstd);
        dbias[e] += dout[e];
      }
    }
  }
  int64_t at = int64_t{blockIdx.y} * p.hidden;
  auto column_of = [&](int e) { return column + e; };
  if (p.dweight) store_partial(dweight, p.partial_dweight + at, p.hidden, column_of);
  if (p.dbias) store_partial(dbias, p.partial_dbias + at, p.hidden, column_of);
}

constexpr int kReduceThreads = 32, kReduceRows = 16;

// dweight (blockIdx.y 0) or dbias (1) of 32 columns, in their type W, from all blocks' partial sums.
template <class W>
__global__ void __launch_bounds__(kReduceThreads* kReduceRows)
    norm_reduce_kernel(const __grid_constant__ DeviceNormBackward p) {
  W* gradient = static_cast<W*>(blockIdx.y == 0 ? p.dweight : p.dbias);
  const float* partial = blockIdx.y == 0 ? p.partial_dweight : p.partial_dbias;
  if (!gradient) return;
  int64_t column = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  float total = 0.0f;
  if (column < p.hidden) {
#pragma unroll 4
    for (int row = static_cast<int>(threadIdx.y); row < p.partial_rows; row += kReduceRows)
      total += partial[row * p.hidden + column];
  }
  float* totals = shared_memory<float>();
  totals[threadIdx.y * kReduceThreads + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.hidden) return;
  for (int y = 1; y < kReduceRows; y++) total += totals[y * kReduceThreads + threadIdx.x];
  gradient[column] = from_float<W>(total);
}

// Of kernels whose blocks walk the rows.
constexpr int64_t kMostBlocks = 1 << 30;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether kVector elements can be read and written at once.
template <int kVector>
bool aligned(int64_t hidden, std::initializer_list<int64_t> strides,
             std::initializer_list<const void*> addresses) {
  bool all = hidden % kVector == 0;
  for (int64_t stride : strides) all = all && stride % kVector == 0;
  for (const void* address : addresses) all = all && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  return all;
}

template <class T, bool kDropout>
void run_forward(const DeviceNormForward& p, const Queue& queue) {
  constexpr int kVector = 16 / sizeof(T);
  int64_t bytes = p.hidden * static_cast<int64_t>(sizeof(T));
  bool vectors = aligned<kVector>(p.hidden, {p.x_stride, p.residual_stride},
                                  {p.x, p.residual, p.weight, p.bias, p.out, p.residual_out});
  const Split* split = vectors ? find(kForward, bytes) : nullptr;
  void (*kernel)(DeviceNormForward) = nullptr;
  const char* name = "norm_forward";
  int64_t blocks;
  if (split) {
    blocks = divide_up(p.rows, split->rows);
    switch (split->pieces) {
      case 1:
        kernel = norm_forward_kernel<T, kVector, 1, kDropout>;
        break;
      case 2:
        kernel = norm_forward_kernel<T, kVector, 2, kDropout>;
        break;
      case 3:
        kernel = norm_forward_kernel<T, kVector, 3, kDropout>;
        break;
      case 4:
        kernel = norm_forward_kernel<T, kVector, 4, kDropout>;
        break;
    }
  } else {
    split = find(kLong, bytes);
    kernel =
        vectors ? norm_forward_long_kernel<T, kVector, kDropout> : norm_forward_long_kernel<T, 1, kDropout>;
    name = "norm_forward_long";
    blocks = min(divide_up(p.rows, split->rows), kMostBlocks);
  }
  launch(kernel, {name, dim3(grid_size(blocks)), dim3(split->threads, split->rows), kSumBytes}, queue, p);
}

template <class T, bool kDropout>
void run_backward(DeviceNormBackward& p, const Queue& queue) {
  constexpr int kVector = 16 / sizeof(T);
  int64_t bytes = p.hidden * static_cast<int64_t>(sizeof(T));
  bool vectors = aligned<kVector>(p.hidden, {p.dout_stride, p.z_stride, p.dresidual_stride},
                                  {p.dout, p.z, p.weight, p.dresidual_out, p.dx, p.dresidual});
  if (const Split* split = vectors ? find(kBackward, bytes) : nullptr) {
    auto kernel = split->pieces == 1 ? norm_backward_kernel<T, kVector, 1, kDropout>
                                     : norm_backward_kernel<T, kVector, 2, kDropout>;
    int resident = split->pieces == 1 || split->threads * split->rows <= kMostThreads / 2 ? 2 : 1;
    p.partial_rows = min(p.partial_rows, min(resident * p.multiprocessors, divide_up(p.rows, split->rows)));
    int shared_bytes = partial_bytes(split->threads, split->rows, split->pieces * kVector);
    launch(
        kernel,
        {"norm_backward", dim3(grid_size(p.partial_rows)), dim3(split->threads, split->rows), shared_bytes},
        queue, p);
    return;
  }
  const Split* split = find(kLong, bytes);
  int64_t blocks = min(divide_up(p.rows, split->rows), kMostBlocks);
  launch(
      vectors ? norm_backward_long_kernel<T, kVector, kDropout> : norm_backward_long_kernel<T, 1, kDropout>,
      {"norm_backward_long", dim3(grid_size(blocks)), dim3(split->threads, split->rows), kSumBytes}, queue,
      p);
  if (!p.dweight && !p.dbias) return;
  int width = vectors ? kVector : 1;
  p.partial_rows = min(p.partial_rows, divide_up(p.rows, kColumnRows));
  dim3 grid(grid_size(divide_up(p.hidden, kColumnThreads * width)), static_cast<unsigned>(p.partial_rows));
  launch(vectors ? norm_columns_kernel<T, kVector> : norm_columns_kernel<T, 1>,
         {"norm_columns", grid, dim3(kColumnThreads, kColumnRows),
          partial_bytes(kColumnThreads, kColumnRows, width)},
         queue, p);
}

}  // namespace

void norm_forward(const DeviceNormForward& p, const Queue& queue) {
  if (p.rows == 0) return;
  switch (p.dtype) {
    case DType::f32:
      return p.dropout.rng_state ? run_forward<float, true>(p, queue) : run_forward<float, false>(p, queue);
    case DType::bf16:
      return p.dropout.rng_state ? run_forward<bf16, true>(p, queue) : run_forward<bf16, false>(p, queue);
    case DType::f16:
      return p.dropout.rng_state ? run_forward<f16, true>(p, queue) : run_forward<f16, false>(p, queue);
  }
}

void norm_backward(DeviceNormBackward p, const Queue& queue) {
  if (p.rows == 0) {
    p.partial_rows = 0;
  } else {
    switch (p.dtype) {
      case DType::f32:
        p.dropout.rng_state ? run_backward<float, true>(p, queue) : run_backward<float, false>(p, queue);
        break;
      case DType::bf16:
        p.dropout.rng_state ? run_backward<bf16, true>(p, queue) : run_backward<bf16, false>(p, queue);
        break;
      case DType::f16:
        p.dropout.rng_state ? run_backward<f16, true>(p, queue) : run_backward<f16, false>(p, queue);
        break;
    }
  }
  if (!p.dweight && !p.dbias) return;
  auto kernel = p.weight_dtype == DType::f32    ? norm_reduce_kernel<float>
                : p.weight_dtype == DType::bf16 ? norm_reduce_kernel<bf16>
                                                : norm_reduce_kernel<f16>;
  dim3 grid(grid_size(divide_up(p.hidden, kReduceThreads)), 2);
  launch(kernel, {"norm_reduce", grid, dim3(kReduceThreads, kReduceRows), kReduceThreads * kReduceRows * 4},
         queue, p);
}

}  // namespace fastgpt
