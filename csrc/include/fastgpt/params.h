// What the Python side hands to a kernel: pointers, sizes and strides, no framework types.
// Sizes and strides count elements. The last stride of every tensor is 1.
#pragma once

#include <cstdint>

namespace fastgpt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A (batch, seq, head, dim) tensor by its strides; `dim` has stride 1.
struct Tensor {
  void* data;
  int64_t batch_stride, seq_stride, head_stride;
};

// Shapes and meaning shared by attention forward and backward.
// q (batch, seqlen_q, nheads, headdim); k (batch, seqlen_k, nheads_k, headdim);
// v (batch, seqlen_k, nheads_k, headdim_v); out (batch, seqlen_q, nheads, headdim_v);
// lse (batch, nheads, seqlen_q), contiguous, natural logarithm.
struct AttentionParams {
  DType dtype;
  int64_t batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v;
  Tensor q, k, v, out;
  float* lse;
  float softmax_scale;
  int64_t window_left, window_right;  // -1 is unlimited
  int num_threads;
  const int32_t* seqused_k = nullptr;  // (batch): keys of each sequence; null: all have seqlen_k

  __attribute__((always_inline)) int64_t keys(int64_t b) const { return seqused_k ? seqused_k[b] : seqlen_k; }
};

struct AttentionBackwardParams : AttentionParams {
  Tensor dout, dq, dk, dv;
  const float* dlse;  // (batch, nheads, seqlen_q), contiguous, or null
};

// Attention of new queries over a KV cache. In AttentionParams, k and v are the caches, seqused_k the
// lengths after the append, and seqlen_k the longest of them.
struct DecodeParams : AttentionParams {
  int64_t seqlen_new = 0;   // keys appended to each sequence first, 0 for none
  Tensor k_new{}, v_new{};  // (batch, seqlen_new, nheads_k, dim)
  int64_t num_splits = 0;   // 0: parts of a fixed number of keys
};

// Rows of `hidden` elements. mean and rstd are fp32 (rows); mean is null for RMS norm.
struct NormForwardParams {
  DType dtype, weight_dtype;
  int64_t rows, hidden;
  const void* x;
  int64_t x_stride;
  const void* residual;  // added to x before the norm, or null
  int64_t residual_stride;
  const void *weight, *bias;  // (hidden), or null
  float eps;
  void* out;           // (rows, hidden), contiguous
  void* residual_out;  // x + residual, (rows, hidden), contiguous, or null
  float *mean, *rstd;
  int num_threads;
};

struct NormBackwardParams {
  DType dtype, weight_dtype;
  int64_t rows, hidden;
  const void* dout;
  int64_t dout_stride;
  const void* x;  // what was normalised (x + residual)
  int64_t x_stride;
  const void* weight;
  const void* dresidual;  // gradient of residual_out, added to dx, or null
  int64_t dresidual_stride;
  const float *mean, *rstd;
  void* dx;               // (rows, hidden), contiguous
  void *dweight, *dbias;  // (hidden) in weight_dtype, or null
  int num_threads;
};

// Every kernel of one instruction set.
struct Kernels {
  void (*attention_forward)(const AttentionParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  void (*decode)(const DecodeParams&);
  void (*norm_forward)(const NormForwardParams&);
  void (*norm_backward)(const NormBackwardParams&);
};

// Scratch memory of the calling thread, 64-byte aligned, kept for the next call unless it is large; its
// content is undefined. Throws std::bad_alloc. A second call may return the same memory.
float* scratch(int64_t floats);

}  // namespace fastgpt
