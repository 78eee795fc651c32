// Every CPU kernel, compiled once per instruction set (FASTGPT_ISA names it, kernels.cmake has the flags).
// All code below is in one anonymous namespace: a function shared with another set's copy by the linker
// could be the one with instructions this processor lacks.

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <sched.h>

#include <cstdint>

#include "fastgpt/mask.h"
#include "fastgpt/params.h"
#include "fastgpt/philox.h"

namespace fastgpt {
namespace {

#include "simd.h"
#include "tile.h"
#include "scratch.h"
#include "attention_common.h"
#include "dropout.h"
#include "scores.h"
#include "products.h"
#ifdef FASTGPT_AMX
#include "amx.h"
#endif
#include "attention_forward.h"
#include "attention_backward.h"
#include "decode.h"
#include "rows.h"
#include "norm.h"
#include "merge.h"
#include "linear.h"
#include "block.h"

template <class T>
using DecodeSame = Decode<T, T>;
template <class T>
using DecodeInt8 = Decode<T, int8_t>;
template <class T>
using DecodeE4m3 = Decode<T, e4m3>;

// Calls Kernel<T>{params}.run() with T for the storage type.
template <template <class...> class Kernel, class Params>
void by_dtype(const Params& params) {
  switch (params.dtype) {
    case DType::f32:
      return Kernel<float>{params}.run();
    case DType::bf16:
      return Kernel<bf16>{params}.run();
    case DType::f16:
      return Kernel<f16>{params}.run();
  }
}

void decode(const DecodeParams& params) {
  switch (params.cache_type) {
    case CacheType::same:
      return by_dtype<DecodeSame>(params);
    case CacheType::int8:
      return by_dtype<DecodeInt8>(params);
    case CacheType::e4m3:
      return by_dtype<DecodeE4m3>(params);
  }
}

// A few queries are not worth packing the keys for: they are decoded.
void attention_forward(const AttentionParams& params) {
  bool decodes = !params.cu_seqlens_q && !params.dropout_threshold;
  if (!decodes || params.nheads / params.nheads_k * params.seqlen_q > kDecodeRows)
    return by_dtype<AttentionForward>(params);
  DecodeParams as_cache{params};
  decode(as_cache);
}

}  // namespace

#define FASTGPT_CONCAT_(a, b) a##b
#define FASTGPT_CONCAT(a, b) FASTGPT_CONCAT_(a, b)

extern const Kernels FASTGPT_CONCAT(kernels_, FASTGPT_ISA);
const Kernels FASTGPT_CONCAT(kernels_, FASTGPT_ISA) = {
    attention_forward,
    by_dtype<AttentionBackward, AttentionBackwardParams>,
    decode,
    by_dtype<NormForward, NormForwardParams>,
    by_dtype<NormBackward, NormBackwardParams>,
    by_dtype<MergeForward, MergeParams>,
    by_dtype<MergeBackward, MergeBackwardParams>,
    by_dtype<Linear, LinearParams>,
    by_dtype<Mlp, MlpParams>,
    by_dtype<AttentionBlock, AttentionBlockParams>,
};

}  // namespace fastgpt
