// fastgpt._cpu: the Python binding of the CPU kernels. It takes torch's tensors as any Python objects with
// data_ptr(), shape, stride() and dtype; the Python side (fastgpt/ops/*/cpu.py) has checked them.

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
#include "fastgpt/python.h"
#include "few_rows.h"
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
static thread_local Buffer scratch_buffer, outer_scratch_buffer;

// A MemoryError in Python, with this message.
struct OutOfScratch : std::bad_alloc {
  std::string message;
  explicit OutOfScratch(int64_t floats)
      : message("the CPU kernels asked for " + std::to_string(floats / (1 << 18)) +
                " MiB of scratch memory, which the system has not") {}
  const char* what() const noexcept override { return message.c_str(); }
};

static float* take(Buffer& buffer, int64_t floats) {
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
float* scratch(int64_t floats) { return take(scratch_buffer, floats); }
float* outer_scratch(int64_t floats) { return take(outer_scratch_buffer, floats); }

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
    for (Buffer* buffer : {&scratch_buffer, &outer_scratch_buffer})
      if (buffer->size > (64 << 20) / static_cast<int64_t>(sizeof(float))) buffer->free();
  }
};

namespace {

typedef std::tuple<uint32_t, uint32_t, uint64_t, float> PyDropout;  // the fields of Dropout

void set_dropout(Dropout& p, const std::optional<PyDropout>& dropout) {
  if (dropout) std::tie(p.dropout_threshold, p.dropout_offset, p.dropout_seed, p.dropout_scale) = *dropout;
}

void set_attention(AttentionParams& p, const Array& q, const Array& k, const Array& v, const Array& out,
                   Data lse, float softmax_scale, int64_t window_left, int64_t window_right, float softcap,
                   const Array& alibi_slopes, Data sink, int num_threads) {
  p.dtype = q.dtype();
  p.batch = q.ndim == 4 ? q.sizes[0] : 1;
  p.seqlen_q = q.size(3);
  p.seqlen_k = k.size(3);
  p.nheads = q.size(2);
  p.nheads_k = k.size(2);
  p.headdim = q.size(1);
  p.headdim_v = v.size(1);
  p.q = tensor(q);
  p.k = tensor(k);
  p.v = tensor(v);
  p.out = tensor(out);
  p.lse = lse;
  p.softmax_scale = softmax_scale;
  p.window_left = window_left;
  p.window_right = window_right;
  p.softcap = softcap;
  p.alibi_slopes = alibi_slopes;
  p.alibi_batch_stride = batch_stride(alibi_slopes);
  p.sink = sink;
  p.num_threads = usable_threads(num_threads);
}

void set_sequences(AttentionParams& p, const Array& cu_seqlens_q, Data cu_seqlens_k, Data seqused_k,
                   Data leftpad_k) {
  if (cu_seqlens_q.ndim) p.batch = cu_seqlens_q.sizes[0] - 1;
  p.cu_seqlens_q = cu_seqlens_q;
  p.cu_seqlens_k = cu_seqlens_k;
  p.seqused_k = seqused_k;
  p.leftpad_k = leftpad_k;
}

void set_bias(AttentionParams& p, const Array& bias) {
  if (bias.ndim == 0) return;
  read_bias<const void>(p.bias, bias);
  p.bias.type = bias.element() == Element::boolean ? BiasType::boolean : static_cast<BiasType>(bias.dtype());
}

template <class Params>
void set_merge(Params& p, const Array& out_a, const Array& lse_a, const Array& out_b, const Array& lse_b,
               int num_threads) {
  p.dtype = out_a.dtype();
  p.batch = out_a.ndim == 4 ? out_a.sizes[0] : 1;
  p.seqlen = out_a.size(3);
  p.nheads = out_a.size(2);
  p.headdim_v = out_a.size(1);
  p.out_a = tensor(out_a);
  p.lse_a = rows(lse_a);
  p.out_b = tensor(out_b);
  p.lse_b = rows(lse_b);
  p.num_threads = usable_threads(num_threads);
}

// Calls compute() and returns true, or false where it finds that the operands are Unfit, before it has done
// anything.
template <class Compute>
bool if_fit(const Compute& compute) {
  try {
    compute();
  } catch (const Unfit&) {
    return false;
  }
  return true;
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_cpu, m) {
  using namespace fastgpt;
  Isa isa = choose_isa(std::getenv("FASTGPT_CPU_ISA"));  // what it throws becomes an ImportError
  const Kernels* kernels = isa.kernels;
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  find_elements();
  m.attr("isa") = isa.name;
  m.attr("built_isas") = FASTGPT_ISAS;

  m.def("attention_forward",
        [kernels](const Array& q, const Array& k, const Array& v, const Array& out, Data lse,
                  const Array& cu_seqlens_q, Data cu_seqlens_k, Data seqused_k, Data leftpad_k,
                  const Array& alibi_slopes, Data sink, const Array& bias,
                  const std::optional<PyDropout>& dropout, float softmax_scale, int64_t window_left,
                  int64_t window_right, float softcap, int num_threads) {
          AttentionParams p;
          set_attention(p, q, k, v, out, lse, softmax_scale, window_left, window_right, softcap, alibi_slopes,
                        sink, num_threads);
          set_sequences(p, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k);
          set_bias(p, bias);
          set_dropout(p, dropout);
          KernelScope scope;
          kernels->attention_forward(p);
        });

  m.def("attention_backward",
        [kernels](const Array& q, const Array& k, const Array& v, const Array& out, Data lse,
                  const Array& dout, Data dlse, const Array& dq, const Array& dk, const Array& dv, Data dsink,
                  const Array& dbias, const Array& cu_seqlens_q, Data cu_seqlens_k, Data seqused_k,
                  Data leftpad_k, const Array& alibi_slopes, Data sink, const Array& bias,
                  const std::optional<PyDropout>& dropout, float softmax_scale, int64_t window_left,
                  int64_t window_right, float softcap, int num_threads) {
          AttentionBackwardParams p;
          set_attention(p, q, k, v, out, lse, softmax_scale, window_left, window_right, softcap, alibi_slopes,
                        sink, num_threads);
          set_sequences(p, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k);
          set_bias(p, bias);
          set_dropout(p, dropout);
          p.dout = tensor(dout);
          p.dlse = dlse;
          p.dq = tensor(dq);
          p.dk = tensor(dk);
          p.dv = tensor(dv);
          p.dsink = dsink;
          read_bias<float>(p.dbias, dbias);
          KernelScope scope;
          kernels->attention_backward(p);
        });

  m.def("decode",
        [kernels](const Array& q, const Array& k_cache, const Array& v_cache, const Array& out, Data lse,
                  const Array& k_new, const Array& v_new, const Array& cache_seqlens, const Array& rotary_cos,
                  Data rotary_sin, Data cache_batch_idx, Data cache_leftpad, const Array& block_table,
                  const Array& alibi_slopes, Data sink, const Array& k_descale, Data v_descale,
                  const Array& q_source, float softmax_scale, int64_t window_left, int64_t window_right,
                  float softcap, bool rotary_interleaved, int64_t num_splits, int num_threads) {
          DecodeParams p;
          set_attention(p, q, k_cache, v_cache, out, lse, softmax_scale, window_left, window_right, softcap,
                        alibi_slopes, sink, num_threads);
          p.seqlen_new = k_new.ndim ? k_new.size(3) : 0;
          const int32_t* lengths = cache_seqlens;
          std::vector<int32_t> seqused_k(p.batch);
          p.page_size = p.seqlen_k;
          p.seqlen_k = 0;
          for (int64_t b = 0; b < p.batch; b++) {
            seqused_k[b] = static_cast<int32_t>(lengths[b] + p.seqlen_new);
            p.seqlen_k = std::max<int64_t>(p.seqlen_k, seqused_k[b]);
          }
          p.seqused_k = seqused_k.data();
          p.leftpad_k = cache_leftpad;
          p.k_new = tensor(k_new);
          p.v_new = tensor(v_new);
          p.num_splits = num_splits;
          p.cache_batch_idx = cache_batch_idx;
          p.block_table = block_table;
          p.block_table_stride = batch_stride(block_table);
          if (Element element = k_cache.element(); element == Element::int8 || element == Element::e4m3)
            p.cache_type = element == Element::int8 ? CacheType::int8 : CacheType::e4m3;
          p.k_descale = k_descale;
          p.v_descale = v_descale;
          p.descale_batch_stride = batch_stride(k_descale);
          if (rotary_cos.ndim) {
            p.rotary_dtype = rotary_cos.dtype();
            p.rotary_dim = 2 * rotary_cos.sizes[1];
          }
          p.rotary_cos = rotary_cos;
          p.rotary_sin = rotary_sin;
          p.rotary_interleaved = rotary_interleaved;
          p.q_source = tensor(q_source);
          KernelScope scope;
          kernels->decode(p);
        });

  m.def("norm_forward",
        [kernels](int64_t rows, int64_t hidden, Data x, int64_t x_stride, Data residual,
                  int64_t residual_stride, Data weight, Data bias, Data out, Data residual_out, Data mean,
                  Data rstd, const std::optional<PyDropout>& dropout, float eps, int num_threads) {
          NormForwardParams p;
          p.dtype = x.dtype();
          p.weight_dtype = weight.object ? weight.dtype() : bias.object ? bias.dtype() : p.dtype;
          p.rows = rows;
          p.hidden = hidden;
          p.x = x;
          p.x_stride = x_stride;
          p.residual = residual;
          p.residual_stride = residual_stride;
          p.weight = weight;
          p.bias = bias;
          p.eps = eps;
          p.out = out;
          p.residual_out = residual_out;
          p.mean = mean;
          p.rstd = rstd;
          p.num_threads = usable_threads(num_threads);
          set_dropout(p, dropout);
          KernelScope scope;
          kernels->norm_forward(p);
        });

  m.def("norm_backward", [kernels](int64_t rows, int64_t hidden, Data dout, int64_t dout_stride,
                                   Data dresidual, int64_t dresidual_stride, Data x, int64_t x_stride,
                                   Data weight, Data mean, Data rstd, Data dx, Data dsum, Data dweight,
                                   Data dbias, const std::optional<PyDropout>& dropout, int num_threads) {
    NormBackwardParams p;
    p.dtype = x.dtype();
    p.weight_dtype = dweight.object ? dweight.dtype() : dbias.object ? dbias.dtype() : p.dtype;
    p.rows = rows;
    p.hidden = hidden;
    p.dout = dout;
    p.dout_stride = dout_stride;
    p.dresidual = dresidual;
    p.dresidual_stride = dresidual_stride;
    p.x = x;
    p.x_stride = x_stride;
    p.weight = weight;
    p.mean = mean;
    p.rstd = rstd;
    p.dx = dx;
    p.dsum = dsum;
    p.dweight = dweight;
    p.dbias = dbias;
    p.num_threads = usable_threads(num_threads);
    set_dropout(p, dropout);
    KernelScope scope;
    kernels->norm_backward(p);
  });

  m.def("merge_forward", [kernels](const Array& out_a, const Array& lse_a, const Array& out_b,
                                   const Array& lse_b, const Array& out, const Array& lse, int num_threads) {
    MergeParams p;
    set_merge(p, out_a, lse_a, out_b, lse_b, num_threads);
    p.out = tensor(out);
    p.lse = rows(lse);
    KernelScope scope;
    kernels->merge_forward(p);
  });

  m.def("merge_backward",
        [kernels](const Array& out_a, const Array& lse_a, const Array& out_b, const Array& lse_b,
                  const Array& dout, const Array& dlse, const Array& dout_a, const Array& dlse_a,
                  const Array& dout_b, const Array& dlse_b, int num_threads) {
          MergeBackwardParams p;
          set_merge(p, out_a, lse_a, out_b, lse_b, num_threads);
          p.dout = tensor(dout);
          p.dlse = rows(dlse);
          p.dout_a = tensor(dout_a);
          p.dlse_a = rows(dlse_a);
          p.dout_b = tensor(dout_b);
          p.dlse_b = rows(dlse_b);
          KernelScope scope;
          kernels->merge_backward(p);
        });

  m.def("linear",
        [kernels](py::handle x, py::handle projection, bool transposed, py::handle out, int num_threads) {
          return if_fit([&] {
            LinearParams p;
            read_rows(p, x, transposed, read(out));
            p.projections[p.count++] = read_projection(projection, p, p.in_features);
            p.num_threads = usable_threads(num_threads);
            KernelScope scope;
            kernels->linear(p);
          });
        });

  m.def("mlp", [kernels](py::handle x, py::handle spec, py::handle out, int num_threads) {
    return if_fit([&] {
      MlpParams p = read_mlp(x, spec, read(out));
      p.num_threads = usable_threads(num_threads);
      KernelScope scope;
      kernels->mlp(p);
    });
  });

  m.def("attention_block", [kernels](py::handle x, py::handle spec, py::handle rotary, py::handle cache,
                                     py::handle out, int num_threads) {
    return if_fit([&] {
      Lengths lengths;
      AttentionBlockParams p = read_attention(x, spec, rotary, cache, read(out), lengths);
      p.num_threads = p.attention.num_threads = usable_threads(num_threads);
      KernelScope scope;
      kernels->attention_block(p);
    });
  });

  // The two, one after the other, or neither.
  m.def("block", [kernels](py::handle x, py::handle attention, py::handle rotary, py::handle cache,
                           py::handle mlp, py::handle between, py::handle out, int num_threads) {
    return if_fit([&] {
      Lengths lengths;
      AttentionBlockParams first = read_attention(x, attention, rotary, cache, read(between), lengths);
      MlpParams second = read_mlp(between, mlp, read(out));
      first.num_threads = first.attention.num_threads = second.num_threads = usable_threads(num_threads);
      KernelScope scope;
      kernels->attention_block(first);
      kernels->mlp(second);
    });
  });
}
