// What the Python side hands to a kernel: pointers, sizes and strides, no framework types.
// Sizes and strides count elements. The last stride of every tensor is 1.
#pragma once

#include <cstdint>

#include "fastgpt/mask.h"

namespace fastgpt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A (batch, seq, head, dim) tensor by its strides; `dim` has stride 1.
struct Tensor {
  void* data;
  int64_t batch_stride, seq_stride, head_stride;
};

enum class BiasType : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3 };

// Broadcasts to (batch, nheads, seqlen_q, seqlen_k) by strides of 0; the key stride is 0 or 1.
template <class Data>
struct BiasTensor {
  Data* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0, key_stride = 0;
};
struct Bias : BiasTensor<const void> {  // added to the scores; a boolean one hides keys where it is false
  BiasType type = BiasType::f32;
};

// Dropout keeps an element iff its random word is at least the threshold (philox.h); 0 is off.
struct Dropout {
  uint32_t dropout_threshold = 0, dropout_offset = 0;
  uint64_t dropout_seed = 0;
  float dropout_scale = 1.0f;  // 1 / (1 - dropout_p)
};

// The same of the CUDA kernels, who read seed and offset, int64 (2), where they are; null is off.
struct DeviceDropout {
  const int64_t* rng_state = nullptr;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

// Shapes and meaning shared by attention forward and backward.
// q (batch, seqlen_q, nheads, headdim); k (batch, seqlen_k, nheads_k, headdim);
// v (batch, seqlen_k, nheads_k, headdim_v); out (batch, seqlen_q, nheads, headdim_v);
// lse (batch, nheads, seqlen_q), contiguous, natural logarithm.
//
// With cu_seqlens_q, cu_seqlens_k the sequences are packed: q (total_q, nheads, headdim) and so on, with
// batch strides 0; seqlen_q, seqlen_k are then the totals; lse is (nheads, total_q).
struct AttentionParams : Dropout {
  DType dtype;
  int64_t batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v;
  Tensor q, k, v, out;
  float* lse;
  float softmax_scale;
  int64_t window_left, window_right;  // -1 is unlimited
  int num_threads;

  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // (batch + 1), or null
  // (batch), or null: the keys of a sequence are rows [leftpad_k, seqused_k) of those it has.
  const int32_t *seqused_k = nullptr, *leftpad_k = nullptr;
  float softcap = 0.0f;                 // 0 is off
  const float* alibi_slopes = nullptr;  // (batch, nheads) or, with batch stride 0, (nheads)
  int64_t alibi_batch_stride = 0;
  const float* sink = nullptr;  // (nheads): a logit that joins the denominator only
  Bias bias;

  // The rows of sequence b: its first ones, and how many. On a GPU nobody has checked the lengths: none leads
  // beyond a tensor's rows.
  FASTGPT_HD int64_t first_query_row(int64_t b) const {
    return cu_seqlens_q ? within(cu_seqlens_q[b], seqlen_q) : 0;
  }
  FASTGPT_HD int64_t queries(int64_t b) const {
    return cu_seqlens_q ? within(cu_seqlens_q[b + 1], seqlen_q) - first_query_row(b) : seqlen_q;
  }
  FASTGPT_HD int64_t first_key_row(int64_t b) const {
    return (cu_seqlens_k ? within(cu_seqlens_k[b], seqlen_k) : 0) + (leftpad_k ? leftpad_k[b] : 0);
  }
  // Rows of k that sequence b has, of which it uses some.
  FASTGPT_HD int64_t key_rows(int64_t b) const {
    return cu_seqlens_k ? within(cu_seqlens_k[b + 1], seqlen_k) - within(cu_seqlens_k[b], seqlen_k)
                        : seqlen_k;
  }
  FASTGPT_HD int64_t keys(int64_t b) const {
    int64_t n =
        (seqused_k ? within(seqused_k[b], key_rows(b)) : key_rows(b)) - (leftpad_k ? leftpad_k[b] : 0);
    return n < 0 ? 0 : n;
  }
  FASTGPT_HD static int64_t within(int64_t n, int64_t most) { return n < 0 ? 0 : n > most ? most : n; }
  // Where the rows of (b, h) start in lse.
  FASTGPT_HD int64_t lse_row(int64_t b, int64_t h) const {
    return cu_seqlens_q ? h * seqlen_q + cu_seqlens_q[b] : (b * nheads + h) * seqlen_q;
  }
};

struct AttentionBackwardParams : AttentionParams {
  Tensor dout, dq, dk, dv;
  const float* dlse;        // like lse, or null
  float* dsink = nullptr;   // (batch, nheads), or null
  BiasTensor<float> dbias;  // fp32, zero-filled, or null
};

enum class CacheType : int { same = 0, int8 = 1, e4m3 = 2 };  // same: as q; else times a scale per head

// Attention of new queries over a KV cache. In AttentionParams, k and v are the caches, seqused_k the
// lengths after the append, leftpad_k where each sequence's keys begin, and seqlen_k the longest length.
// With a block table the caches are (num_blocks, page_size, nheads_k, dim), and row r of sequence b is row
// r % page_size of block block_table[b][r / page_size].
struct DecodeParams : AttentionParams {
  int64_t seqlen_new = 0;                    // keys appended to each sequence first, 0 for none
  Tensor k_new{}, v_new{};                   // (batch, seqlen_new, nheads_k, dim)
  int64_t num_splits = 0;                    // 0: parts of a fixed number of keys
  const int32_t* cache_batch_idx = nullptr;  // (batch): which of the caches' sequences; null: the same
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0, page_size = 0;
  CacheType cache_type = CacheType::same;
  const float *k_descale = nullptr,
              *v_descale = nullptr;  // (batch, nheads_k) or, with batch stride 0, (nheads_k)
  int64_t descale_batch_stride = 0;
  // Rotary embedding of q and the new keys: cosines and sines (positions, rotary_dim / 2), rows contiguous.
  const void *rotary_cos = nullptr, *rotary_sin = nullptr;
  DType rotary_dtype = DType::f32;
  int64_t rotary_dim = 0;
  bool rotary_interleaved = false;
  Tensor q_source{};  // what is rotated into q
};

// Rows of `hidden` elements. mean and rstd are fp32 (rows); mean is null for RMS norm. Dropout is that of x.
struct NormForwardParams : Dropout {
  DType dtype, weight_dtype;
  int64_t rows, hidden;
  const void* x;
  int64_t x_stride;
  const void* residual;  // added to x before the norm, or null
  int64_t residual_stride;
  const void *weight, *bias;        // (hidden), or null
  float eps, weight_offset = 0.0f;  // which is added to the weight (Gemma)
  void* out;                        // (rows, hidden), contiguous
  void* residual_out;               // the sum, (rows, hidden), contiguous, or null
  float *mean, *rstd;
  int num_threads;
};

struct NormBackwardParams : Dropout {
  DType dtype, weight_dtype;
  int64_t rows, hidden;
  const void* dout;
  int64_t dout_stride;
  const void* x;  // what was normalised: the sum
  int64_t x_stride;
  const void* weight;
  const void* dresidual;  // gradient of residual_out, or null
  int64_t dresidual_stride;
  const float *mean, *rstd;
  void* dx;               // (rows, hidden), contiguous
  void* dsum;             // like dx: with dropout, the gradient of the sum, or null
  void *dweight, *dbias;  // (hidden) in weight_dtype, or null
  int num_threads;
};

// Attention over two disjoint sets of keys, merged: out_a, out_b, out (batch, seqlen, nheads, headdim_v);
// lse_a, lse_b, lse (batch, nheads, seqlen), fp32, any strides. Packed sequences are a batch of one.
struct MergeParams {
  DType dtype;
  int64_t batch, seqlen, nheads, headdim_v;
  Tensor out_a, lse_a, out_b, lse_b, out, lse;
  int num_threads;
};

// The gradients are shaped like what they are of; dlse is null where there is none.
struct MergeBackwardParams {
  DType dtype;
  int64_t batch, seqlen, nheads, headdim_v;
  Tensor out_a, lse_a, out_b, lse_b, dout, dlse, dout_a, dlse_a, dout_b, dlse_b;
  int num_threads;
};

// A matrix that rows are multiplied by: (out_features, in_features), or transposed; and (out_features), or
// null.
struct Projection {
  const void *weight = nullptr, *bias = nullptr;
  int64_t out_features = 0;
};
constexpr int kMostProjections = 3;

// out = x weight^T + bias, or x weight + bias where the weights are transposed, for a few rows and each of
// the projections, whose results lie side by side in a row of out. All in the same type.
struct LinearParams {
  DType dtype;
  int64_t rows, in_features;
  const void* x;
  int64_t x_stride;
  Projection projections[kMostProjections];
  int count;        // of projections
  bool transposed;  // weights (in_features, out_features)
  void* out;        // (rows, the sum of out_features), contiguous
  int num_threads;

  int64_t out_stride() const {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) sum += projections[i].out_features;
    return sum;
  }
};

enum class Activation : int { silu = 0, gelu_tanh = 1 };

// A norm of a few rows.
struct FewRowsNorm {
  bool exists = false, rms = false;
  float eps = 0.0f, weight_offset = 0.0f;
  const void *weight = nullptr, *bias = nullptr;  // (hidden), of the rows' type, or null
};

// Half a block of a transformer, [x +] after(f(before(x))), with a function f that begins with the
// projections and ends with one; the norms may be none. out is (rows, the last projection's out_features).
struct HalfBlockParams : LinearParams {
  FewRowsNorm before, after;
  bool residual = false;  // x is added
};

// down(activation(up(x))), or, gated, down(activation(gate(x)) up(x)): the projections are up, or gate and
// up, as two or as one.
struct MlpParams : HalfBlockParams {
  Projection down;
  bool gated;
  Activation activation;
};

// The attention of a transformer's block, for a few new tokens: projections to q, k and v (three or one),
// norms of each head of q and k, rotary embedding, append to the caches, attention over them, the output's
// projection. `attention` is given without q, k_new, v_new, out, lse and lengths, which are the kernel's own.
struct AttentionBlockParams : HalfBlockParams {
  DecodeParams attention;
  const int32_t* cache_seqlens = nullptr;  // (batch): tokens in the caches
  Projection to_out;
  FewRowsNorm q_norm, k_norm;  // of each head of q and of k, or of all heads of a token together
  bool heads_together = false;
  // Cosines and sines (batch, seqlen_q, >= headdim / 2), of the same type or in fp32, or null: those of the
  // second half of a head lie `second` behind those of the first.
  DType rotary_dtype = DType::f32;
  const void *cos = nullptr, *sin = nullptr;
  int64_t cos_strides[2] = {}, sin_strides[2] = {}, second = 0;
};

// Every kernel of one instruction set.
struct Kernels {
  void (*attention_forward)(const AttentionParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  void (*decode)(const DecodeParams&);
  void (*norm_forward)(const NormForwardParams&);
  void (*norm_backward)(const NormBackwardParams&);
  void (*merge_forward)(const MergeParams&);
  void (*merge_backward)(const MergeBackwardParams&);
  void (*linear)(const LinearParams&);
  void (*mlp)(const MlpParams&);
  void (*attention_block)(const AttentionBlockParams&);
};

// Scratch memory of the calling thread, 64-byte aligned, kept for the next call unless it is large; its
// content is undefined. Throws std::bad_alloc. A second call may return the same memory.
float* scratch(int64_t floats);
// The same for a kernel that calls others, who have the former.
float* outer_scratch(int64_t floats);

}  // namespace fastgpt
