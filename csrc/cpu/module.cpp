// fastgpt._cpu: the Python binding of the CPU kernels. Everything about a tensor arrives as a pointer,
// sizes and strides; the Python side (fastgpt/ops/*/cpu.py) has checked them.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "fastgpt/params.h"
#include "isa.h"

namespace py = pybind11;

namespace fastgpt {

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  void free() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~Buffer() { free(); }
};
static thread_local Buffer scratch_buffer;

// A MemoryError in Python, with this message.
struct OutOfScratch : std::bad_alloc {
  std::string message;
  explicit OutOfScratch(int64_t floats)
      : message("the CPU kernels asked for " + std::to_string(floats / (1 << 18)) +
                " MiB of scratch memory, which the system has not") {}
  const char* what() const noexcept override { return message.c_str(); }
};

float* scratch(int64_t floats) {
  Buffer& buffer = scratch_buffer;
  if (buffer.size < floats) {
    buffer.free();
    int64_t rounded = (floats + 15) / 16 * 16;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    if (!buffer.data) throw OutOfScratch(floats);
    buffer.size = rounded;
  }
#ifdef __SANITIZE_ADDRESS__
  // What was kept may be larger than what is asked for, and parts of it may be poisoned (cpu/scratch.h).
  __asan_unpoison_memory_region(buffer.data, floats * sizeof(float));
  __asan_poison_memory_region(buffer.data + floats, (buffer.size - floats) * sizeof(float));
#endif
  return buffer.data;
}

// libgomp's pool of threads belongs to the thread that uses it, and its threads do not survive a fork: the
// thread that forked, alone in the child, would wait for them forever. There it runs kernels by itself.
// Threads that the child starts have pools of their own.
static thread_local bool forked = false;

static int usable_threads(int asked) { return forked ? 1 : asked; }

// What a kernel runs in: without the GIL, and large scratch memory returned at the end. Up to 64 MiB is
// kept, for getting it anew costs as much as a small call.
struct KernelScope {
  py::gil_scoped_release release;
  ~KernelScope() {
    if (scratch_buffer.size > (64 << 20) / static_cast<int64_t>(sizeof(float))) scratch_buffer.free();
  }
};

namespace {

typedef std::tuple<uintptr_t, int64_t, int64_t, int64_t> PyTensor;  // pointer; batch, seq, head stride
typedef std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> PySizes;
typedef std::tuple<int64_t, int64_t, int64_t, int64_t> PyMergeSizes;  // batch, seqlen, nheads, headdim_v

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Tensor tensor(const PyTensor& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

void set_attention(AttentionParams& p, int dtype, const PySizes& sizes, const PyTensor& q, const PyTensor& k,
                   const PyTensor& v, const PyTensor& out, uintptr_t lse, float softmax_scale,
                   int64_t window_left, int64_t window_right, int num_threads) {
  p.dtype = static_cast<DType>(dtype);
  std::tie(p.batch, p.seqlen_q, p.seqlen_k, p.nheads, p.nheads_k, p.headdim, p.headdim_v) = sizes;
  p.q = tensor(q);
  p.k = tensor(k);
  p.v = tensor(v);
  p.out = tensor(out);
  p.lse = pointer<float>(lse);
  p.softmax_scale = softmax_scale;
  p.window_left = window_left;
  p.window_right = window_right;
  p.num_threads = usable_threads(num_threads);
}

typedef std::tuple<int64_t, int64_t, int64_t, int64_t> PyStrides;  // batch, head, query, key

template <class Data>
void set_bias(BiasTensor<Data>& bias, uintptr_t data, const PyStrides& strides) {
  bias.data = pointer<Data>(data);
  std::tie(bias.batch_stride, bias.head_stride, bias.query_stride, bias.key_stride) = strides;
}

typedef std::tuple<uint32_t, uint32_t, uint64_t, float> PyDropout;  // the fields of Dropout

void set_dropout(Dropout& p, const std::optional<PyDropout>& dropout) {
  if (dropout) std::tie(p.dropout_threshold, p.dropout_offset, p.dropout_seed, p.dropout_scale) = *dropout;
}

// What varies a call beyond plain attention: the fields of AttentionParams from cu_seqlens_q to
// dropout_scale; leaves the defaults where it is None.
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t,  // sequences
                   float, uintptr_t, int64_t, uintptr_t,        // softcap, alibi, sink
                   uintptr_t, int, PyStrides,                   // bias
                   uint32_t, uint32_t, uint64_t, float>         // dropout
    PyOptions;

void set_options(AttentionParams& p, const std::optional<PyOptions>& options) {
  if (!options) return;
  uintptr_t cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, alibi_slopes, sink, bias;
  int bias_type;
  PyStrides strides;
  std::tie(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, p.softcap, alibi_slopes, p.alibi_batch_stride,
           sink, bias, bias_type, strides, p.dropout_threshold, p.dropout_offset, p.dropout_seed,
           p.dropout_scale) = *options;
  p.cu_seqlens_q = pointer<const int32_t>(cu_seqlens_q);
  p.cu_seqlens_k = pointer<const int32_t>(cu_seqlens_k);
  p.seqused_k = pointer<const int32_t>(seqused_k);
  p.leftpad_k = pointer<const int32_t>(leftpad_k);
  p.alibi_slopes = pointer<const float>(alibi_slopes);
  p.sink = pointer<const float>(sink);
  set_bias(p.bias, bias, strides);
  p.bias.type = static_cast<BiasType>(bias_type);
}

// The same for attention over a KV cache.
typedef std::tuple<float, uintptr_t, int64_t, uintptr_t,      // softcap, alibi, sink
                   uintptr_t, uintptr_t, uintptr_t, int64_t,  // cache_batch_idx, leftpad, block_table
                   int, uintptr_t, uintptr_t, int64_t,        // cache type, descales
                   uintptr_t, uintptr_t, int, int64_t, bool, PyTensor>  // rotary
    PyDecodeOptions;

void set_options(DecodeParams& p, int64_t page_size, const std::optional<PyDecodeOptions>& options) {
  if (!options) return;
  uintptr_t alibi_slopes, sink, cache_batch_idx, leftpad_k, block_table, k_descale, v_descale, cos, sin;
  int cache_type, rotary_dtype;
  PyTensor q_source;
  std::tie(p.softcap, alibi_slopes, p.alibi_batch_stride, sink, cache_batch_idx, leftpad_k, block_table,
           p.block_table_stride, cache_type, k_descale, v_descale, p.descale_batch_stride, cos, sin,
           rotary_dtype, p.rotary_dim, p.rotary_interleaved, q_source) = *options;
  p.alibi_slopes = pointer<const float>(alibi_slopes);
  p.sink = pointer<const float>(sink);
  p.cache_batch_idx = pointer<const int32_t>(cache_batch_idx);
  p.leftpad_k = pointer<const int32_t>(leftpad_k);
  p.block_table = pointer<const int32_t>(block_table);
  p.page_size = page_size;
  p.cache_type = static_cast<CacheType>(cache_type);
  p.k_descale = pointer<const float>(k_descale);
  p.v_descale = pointer<const float>(v_descale);
  p.rotary_cos = pointer<const void>(cos);
  p.rotary_sin = pointer<const void>(sin);
  p.rotary_dtype = static_cast<DType>(rotary_dtype);
  p.q_source = tensor(q_source);
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_cpu, m) {
  using namespace fastgpt;
  Isa isa = choose_isa(std::getenv("FASTGPT_CPU_ISA"));  // what it throws becomes an ImportError
  const Kernels* kernels = isa.kernels;
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  m.attr("isa") = isa.name;
  m.attr("built_isas") = FASTGPT_ISAS;

  m.def(
      "attention_forward",
      [kernels](int dtype, const PySizes& sizes, const PyTensor& q, const PyTensor& k, const PyTensor& v,
                const PyTensor& out, uintptr_t lse, float softmax_scale, int64_t window_left,
                int64_t window_right, int num_threads, const std::optional<PyOptions>& options) {
        AttentionParams p;
        set_attention(p, dtype, sizes, q, k, v, out, lse, softmax_scale, window_left, window_right,
                      num_threads);
        set_options(p, options);
        KernelScope scope;
        kernels->attention_forward(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
      py::arg("lse"), py::arg("softmax_scale"), py::arg("window_left"), py::arg("window_right"),
      py::arg("num_threads"), py::arg("options"));

  m.def(
      "attention_backward",
      [kernels](int dtype, const PySizes& sizes, const PyTensor& q, const PyTensor& k, const PyTensor& v,
                const PyTensor& out, uintptr_t lse, const PyTensor& dout, uintptr_t dlse, const PyTensor& dq,
                const PyTensor& dk, const PyTensor& dv, uintptr_t dsink, uintptr_t dbias,
                const PyStrides& dbias_strides, float softmax_scale, int64_t window_left,
                int64_t window_right, int num_threads, const std::optional<PyOptions>& options) {
        AttentionBackwardParams p;
        set_attention(p, dtype, sizes, q, k, v, out, lse, softmax_scale, window_left, window_right,
                      num_threads);
        set_options(p, options);
        p.dsink = pointer<float>(dsink);
        set_bias(p.dbias, dbias, dbias_strides);
        p.dout = tensor(dout);
        p.dlse = pointer<const float>(dlse);
        p.dq = tensor(dq);
        p.dk = tensor(dk);
        p.dv = tensor(dv);
        KernelScope scope;
        kernels->attention_backward(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
      py::arg("lse"), py::arg("dout"), py::arg("dlse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
      py::arg("dsink"), py::arg("dbias"), py::arg("dbias_strides"), py::arg("softmax_scale"),
      py::arg("window_left"), py::arg("window_right"), py::arg("num_threads"), py::arg("options"));

  m.def(
      "decode",
      [kernels](int dtype, const PySizes& sizes, const PyTensor& q, const PyTensor& k_cache,
                const PyTensor& v_cache, const PyTensor& out, uintptr_t lse, uintptr_t cache_seqlens,
                int64_t seqlen_new, const PyTensor& k_new, const PyTensor& v_new, float softmax_scale,
                int64_t window_left, int64_t window_right, int64_t num_splits, int num_threads,
                const std::optional<PyDecodeOptions>& options) {
        DecodeParams p;
        set_attention(p, dtype, sizes, q, k_cache, v_cache, out, lse, softmax_scale, window_left,
                      window_right, num_threads);
        set_options(p, p.seqlen_k, options);
        const int32_t* lengths = pointer<const int32_t>(cache_seqlens);
        std::vector<int32_t> seqused_k(p.batch);
        p.seqlen_k = 0;
        for (int64_t b = 0; b < p.batch; b++) {
          seqused_k[b] = static_cast<int32_t>(lengths[b] + seqlen_new);
          p.seqlen_k = std::max<int64_t>(p.seqlen_k, seqused_k[b]);
        }
        p.seqused_k = seqused_k.data();
        p.seqlen_new = seqlen_new;
        p.k_new = tensor(k_new);
        p.v_new = tensor(v_new);
        p.num_splits = num_splits;
        KernelScope scope;
        kernels->decode(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
      py::arg("out"), py::arg("lse"), py::arg("cache_seqlens"), py::arg("seqlen_new"), py::arg("k_new"),
      py::arg("v_new"), py::arg("softmax_scale"), py::arg("window_left"), py::arg("window_right"),
      py::arg("num_splits"), py::arg("num_threads"), py::arg("options"));

  m.def(
      "norm_forward",
      [kernels](int dtype, int weight_dtype, int64_t rows, int64_t hidden, uintptr_t x, int64_t x_stride,
                uintptr_t residual, int64_t residual_stride, uintptr_t weight, uintptr_t bias, float eps,
                uintptr_t out, uintptr_t residual_out, uintptr_t mean, uintptr_t rstd, int num_threads,
                const std::optional<PyDropout>& dropout) {
        NormForwardParams p;
        p.dtype = static_cast<DType>(dtype);
        p.weight_dtype = static_cast<DType>(weight_dtype);
        p.rows = rows;
        p.hidden = hidden;
        p.x = pointer<const void>(x);
        p.x_stride = x_stride;
        p.residual = pointer<const void>(residual);
        p.residual_stride = residual_stride;
        p.weight = pointer<const void>(weight);
        p.bias = pointer<const void>(bias);
        p.eps = eps;
        p.out = pointer<void>(out);
        p.residual_out = pointer<void>(residual_out);
        p.mean = pointer<float>(mean);
        p.rstd = pointer<float>(rstd);
        p.num_threads = usable_threads(num_threads);
        set_dropout(p, dropout);
        KernelScope scope;
        kernels->norm_forward(p);
      },
      py::arg("dtype"), py::arg("weight_dtype"), py::arg("rows"), py::arg("hidden"), py::arg("x"),
      py::arg("x_stride"), py::arg("residual"), py::arg("residual_stride"), py::arg("weight"),
      py::arg("bias"), py::arg("eps"), py::arg("out"), py::arg("residual_out"), py::arg("mean"),
      py::arg("rstd"), py::arg("num_threads"), py::arg("dropout"));

  m.def(
      "norm_backward",
      [kernels](int dtype, int weight_dtype, int64_t rows, int64_t hidden, uintptr_t dout,
                int64_t dout_stride, uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t dresidual,
                int64_t dresidual_stride, uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dsum,
                uintptr_t dweight, uintptr_t dbias, int num_threads,
                const std::optional<PyDropout>& dropout) {
        NormBackwardParams p;
        p.dtype = static_cast<DType>(dtype);
        p.weight_dtype = static_cast<DType>(weight_dtype);
        p.rows = rows;
        p.hidden = hidden;
        p.dout = pointer<const void>(dout);
        p.dout_stride = dout_stride;
        p.x = pointer<const void>(x);
        p.x_stride = x_stride;
        p.weight = pointer<const void>(weight);
        p.dresidual = pointer<const void>(dresidual);
        p.dresidual_stride = dresidual_stride;
        p.mean = pointer<const float>(mean);
        p.rstd = pointer<const float>(rstd);
        p.dx = pointer<void>(dx);
        p.dsum = pointer<void>(dsum);
        p.dweight = pointer<void>(dweight);
        p.dbias = pointer<void>(dbias);
        p.num_threads = usable_threads(num_threads);
        set_dropout(p, dropout);
        KernelScope scope;
        kernels->norm_backward(p);
      },
      py::arg("dtype"), py::arg("weight_dtype"), py::arg("rows"), py::arg("hidden"), py::arg("dout"),
      py::arg("dout_stride"), py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("dresidual"),
      py::arg("dresidual_stride"), py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dsum"),
      py::arg("dweight"), py::arg("dbias"), py::arg("num_threads"), py::arg("dropout"));

  m.def(
      "merge_forward",
      [kernels](int dtype, const PyMergeSizes& sizes, const PyTensor& out_a, const PyTensor& lse_a,
                const PyTensor& out_b, const PyTensor& lse_b, const PyTensor& out, const PyTensor& lse,
                int num_threads) {
        MergeParams p;
        p.dtype = static_cast<DType>(dtype);
        std::tie(p.batch, p.seqlen, p.nheads, p.headdim_v) = sizes;
        p.out_a = tensor(out_a);
        p.lse_a = tensor(lse_a);
        p.out_b = tensor(out_b);
        p.lse_b = tensor(lse_b);
        p.out = tensor(out);
        p.lse = tensor(lse);
        p.num_threads = usable_threads(num_threads);
        KernelScope scope;
        kernels->merge_forward(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("out_a"), py::arg("lse_a"), py::arg("out_b"),
      py::arg("lse_b"), py::arg("out"), py::arg("lse"), py::arg("num_threads"));

  m.def(
      "merge_backward",
      [kernels](int dtype, const PyMergeSizes& sizes, const PyTensor& out_a, const PyTensor& lse_a,
                const PyTensor& out_b, const PyTensor& lse_b, const PyTensor& dout, const PyTensor& dlse,
                const PyTensor& dout_a, const PyTensor& dlse_a, const PyTensor& dout_b,
                const PyTensor& dlse_b, int num_threads) {
        MergeBackwardParams p;
        p.dtype = static_cast<DType>(dtype);
        std::tie(p.batch, p.seqlen, p.nheads, p.headdim_v) = sizes;
        p.out_a = tensor(out_a);
        p.lse_a = tensor(lse_a);
        p.out_b = tensor(out_b);
        p.lse_b = tensor(lse_b);
        p.dout = tensor(dout);
        p.dlse = tensor(dlse);
        p.dout_a = tensor(dout_a);
        p.dlse_a = tensor(dlse_a);
        p.dout_b = tensor(dout_b);
        p.dlse_b = tensor(dlse_b);
        p.num_threads = usable_threads(num_threads);
        KernelScope scope;
        kernels->merge_backward(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("out_a"), py::arg("lse_a"), py::arg("out_b"),
      py::arg("lse_b"), py::arg("dout"), py::arg("dlse"), py::arg("dout_a"), py::arg("dlse_a"),
      py::arg("dout_b"), py::arg("dlse_b"), py::arg("num_threads"));
}
