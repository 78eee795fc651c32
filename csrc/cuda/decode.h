// Attention over a KV cache on GPUs: what the binding hands to decode.cu.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fastgpt/params.h"
#include "queue.h"

namespace fastgpt {

// As DecodeParams, but for what is in the GPU's memory and read there: lengths, indices and paddings.
struct DeviceDecode {
  DType dtype;
  CacheType cache_type;
  int64_t batch, seqlen_q, seqlen_new, nheads, nheads_k, headdim, headdim_v;
  int64_t capacity;  // keys that a sequence can have
  Tensor q, k_cache, v_cache, k_new, v_new;
  bool vectors;  // rows of the caches are whole chunks of 16 bytes, and aligned to that; decode() finds out
  void* out;     // (batch, seqlen_q, nheads, headdim_v)
  float* lse;    // (batch, nheads, seqlen_q)
  // Into how many parts the keys of each sequence are cut, or, if there are `cuts` (num_splits = 0), into how
  // many ranges those of all are (balance.h).
  int64_t parts;
  // With several, what each has: (slots, seqlen_q, nheads, headdim_v) and (slots, nheads, seqlen_q). Part i
  // of sequence b has slot b parts + i; range i has slot i for the sequence that goes on in it, and parts + i
  // for the one that it opens.
  float *part_out, *part_lse;
  // (min(batch, parts), 3), of sequences that may be cut: which, the first of its ranges, how many it has.
  int32_t* cuts;
  const int32_t *cache_seqlens, *cache_batch_idx, *cache_leftpad, *block_table;
  int64_t block_table_stride, page_size;
  const float *k_descale, *v_descale;
  int64_t descale_batch_stride;
  const float* alibi_slopes;
  int64_t alibi_batch_stride;
  const float* sink;
  const void *rotary_cos, *rotary_sin;  // (positions, rotary_dim / 2), contiguous
  DType rotary_dtype;
  int64_t positions, rotary_dim;  // 0 without
  bool rotary_interleaved;
  float softmax_scale, softcap;
  int64_t window_left, window_right;

  std::string describe() const {
    static const char* const kNames[] = {"fp32", "bf16", "fp16"};
    static const char* const kCaches[] = {"", ", cache int8", ", cache e4m3"};
    return "batch " + std::to_string(batch) + ", seqlen_q " + std::to_string(seqlen_q) + ", capacity " +
           std::to_string(capacity) + ", heads " + std::to_string(nheads) + "/" + std::to_string(nheads_k) +
           ", headdim " + std::to_string(headdim) + "/" + std::to_string(headdim_v) + ", parts " +
           std::to_string(parts) + ", " + kNames[static_cast<int>(dtype)] +
           kCaches[static_cast<int>(cache_type)];
  }
};

// DeviceDecode::parts of such a call: num_splits, but for parts without keys; where that is 0, as many ranges
// as keep the GPU busy. It depends on shapes alone, and with num_splits not on the batch.
int64_t decode_parts(const DeviceDecode& p, int64_t num_splits, int64_t multiprocessors);

void decode(DeviceDecode p, const Queue& queue);

// What the ranges of sequences of so many tiles of keys are, for tests: for each range its parts, sequence,
// first tile and the one behind its last.
struct RangePart {
  int64_t range, b, begin, end;
};
std::vector<RangePart> decode_ranges(const std::vector<int64_t>& tiles, int64_t parts);

}  // namespace fastgpt
