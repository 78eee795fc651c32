// fastgpt._cuda: the Python binding of the CUDA kernels, and fastgpt._cuda_emulated, the same of the
// emulator's. The Python side is fastgpt/ops/*/cuda.py. Every call ends with its kernels queued; nothing
// waits for them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "attention.h"
#include "decode.h"
#include "fastgpt/python.h"
#include "norm.h"
#ifdef FASTGPT_EMULATE
#include "../emulated/self_test.h"
#include "emulator.h"
#endif

namespace fastgpt {
namespace {

typedef std::tuple<Data, uint32_t, float> PyDropout;  // the fields of DeviceDropout

DeviceDropout dropout_of(const std::optional<PyDropout>& dropout) {
  if (!dropout) return {};
  return {std::get<0>(*dropout), std::get<1>(*dropout), std::get<2>(*dropout)};
}

typedef std::tuple<int, uintptr_t> PyQueue;  // the fields of Queue

Queue queue_of(const PyQueue& queue) {
  return {std::get<0>(queue), reinterpret_cast<void*>(std::get<1>(queue))};
}

// cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch, softmax_scale, window_left, window_right
typedef std::tuple<Data, Data, Data, Data, int64_t, float, int64_t, int64_t> PyAttention;

template <class Params>
Params attention_of(const Array& q, const Array& k, const Array& v, const Array& out, Data lse,
                    const PyAttention& options) {
  Params p{};
  p.dtype = q.dtype();
  p.seqlen_q = q.size(3);
  p.seqlen_k = k.size(3);
  p.nheads = q.size(2);
  p.nheads_k = k.size(2);
  p.headdim = p.headdim_v = q.size(1);
  p.q = tensor(q);
  p.k = tensor(k);
  p.v = tensor(v);
  p.out = tensor(out);
  p.lse = lse;
  Data cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k;
  std::tie(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, p.batch, p.softmax_scale, p.window_left,
           p.window_right) = options;
  p.cu_seqlens_q = cu_seqlens_q;
  p.cu_seqlens_k = cu_seqlens_k;
  p.seqused_k = seqused_k;
  p.leftpad_k = leftpad_k;
  return p;
}

// While kernels are launched: other Python threads go on, and the queue's device is the current one.
struct Launching {
  py::gil_scoped_release others;
  OnDevice on;
  explicit Launching(const Queue& queue) : on(queue) {}
};

CacheType cache_type_of(const Data& cache) {
  Element element = cache.element();
  return element == Element::int8   ? CacheType::int8
         : element == Element::e4m3 ? CacheType::e4m3
                                    : CacheType::same;
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(FASTGPT_MODULE, m) {
  using namespace fastgpt;
  find_elements();

  m.def("unavailable", &unavailable, py::arg("major") = 0);
#ifdef FASTGPT_EMULATE
  m.def("self_test", [](const std::string& name, Data in, Data out) { self_test(name, in, out); });
  m.def("set_schedule", &emulated::set_schedule);
#endif

  m.def("attention_forward", [](const PyQueue& queue, int multiprocessors, const Array& q, const Array& k,
                                const Array& v, const Array& out, Data lse, const PyAttention& options) {
    auto p = attention_of<AttentionParams>(q, k, v, out, lse, options);
    Queue on = queue_of(queue);
    Launching launching(on);
    attention_forward(p, multiprocessors, on);
  });

  m.def("attention_backward_workspace", [](const Array& q, const Array& k, const PyAttention& options) {
    return attention_backward_workspace(attention_of<AttentionBackwardParams>(q, k, k, q, {}, options));
  });

  m.def("attention_backward",
        [](const PyQueue& queue, const Array& q, const Array& k, const Array& v, const Array& out, Data lse,
           const Array& dout, Data dlse, const Array& dq, const Array& dk, const Array& dv, Data workspace,
           const PyAttention& options) {
          auto p = attention_of<AttentionBackwardParams>(q, k, v, out, lse, options);
          p.dout = tensor(dout);
          p.dlse = dlse;
          p.dq = tensor(dq);
          p.dk = tensor(dk);
          p.dv = tensor(dv);
          Queue on = queue_of(queue);
          Launching launching(on);
          attention_backward(p, workspace, on);
        });

  m.def("norm_forward",
        [](const PyQueue& queue, int64_t rows, int64_t hidden, Data x, int64_t x_stride, Data residual,
           int64_t residual_stride, Data weight, Data bias, Data out, Data residual_out, Data mean, Data rstd,
           const std::optional<PyDropout>& dropout, float eps) {
          DeviceNormForward p{};
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
          p.out = out;
          p.residual_out = residual_out;
          p.mean = mean;
          p.rstd = rstd;
          p.dropout = dropout_of(dropout);
          p.eps = eps;
          Queue on = queue_of(queue);
          Launching launching(on);
          norm_forward(p, on);
        });

  m.def("norm_backward",
        [](const PyQueue& queue, int64_t multiprocessors, int64_t rows, int64_t hidden, Data dout,
           int64_t dout_stride, Data dresidual_out, int64_t dresidual_stride, Data z, int64_t z_stride,
           Data weight, Data mean, Data rstd, Data dx, Data dresidual, Data dweight, Data dbias, Data partial,
           int64_t partial_rows, const std::optional<PyDropout>& dropout) {
          DeviceNormBackward p{};
          p.dtype = z.dtype();
          p.weight_dtype = dweight.object ? dweight.dtype() : dbias.object ? dbias.dtype() : p.dtype;
          p.rows = rows;
          p.hidden = hidden;
          p.dout = dout;
          p.dout_stride = dout_stride;
          p.dresidual_out = dresidual_out;
          p.dresidual_stride = dresidual_stride;
          p.z = z;
          p.z_stride = z_stride;
          p.weight = weight;
          p.mean = mean;
          p.rstd = rstd;
          p.dx = dx;
          p.dresidual = dresidual;
          p.dweight = dweight;
          p.dbias = dbias;
          p.partial_dweight = partial;
          p.partial_dbias = p.partial_dweight + partial_rows * hidden;
          p.partial_rows = partial_rows;
          p.dropout = dropout_of(dropout);
          p.multiprocessors = multiprocessors;
          Queue on = queue_of(queue);
          Launching launching(on);
          norm_backward(p, on);
        });

  m.def("decode_parts", [](int64_t multiprocessors, Data q, Data k_cache, int64_t batch, int64_t seqlen_q,
                           int64_t seqlen_new, int64_t nheads, int64_t nheads_k, int64_t headdim,
                           int64_t headdim_v, int64_t capacity, int64_t window_left, int64_t num_splits) {
    DeviceDecode p{};
    p.dtype = q.dtype();
    p.cache_type = cache_type_of(k_cache);
    p.batch = batch;
    p.seqlen_q = seqlen_q;
    p.seqlen_new = seqlen_new;
    p.nheads = nheads;
    p.nheads_k = nheads_k;
    p.headdim = headdim;
    p.headdim_v = headdim_v;
    p.capacity = capacity;
    p.window_left = window_left;
    return decode_parts(p, num_splits, multiprocessors);
  });

  m.def("decode_ranges", [](const std::vector<int64_t>& tiles, int64_t parts) {
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> all;
    for (const RangePart& part : decode_ranges(tiles, parts))
      all.emplace_back(part.range, part.b, part.begin, part.end);
    return all;
  });

  m.def("decode",
        [](const PyQueue& queue, const Array& q, const Array& k_cache, const Array& v_cache,
           const Array& k_new, const Array& v_new, int64_t capacity, Data out, Data lse, int64_t parts,
           Data part_out, Data part_lse, Data cuts, Data cache_seqlens, const Array& rotary_cos,
           Data rotary_sin, Data cache_batch_idx, Data cache_leftpad, const Array& block_table,
           const Array& alibi_slopes, Data sink, const Array& k_descale, Data v_descale, float softmax_scale,
           int64_t window_left, int64_t window_right, float softcap, bool rotary_interleaved) {
          DeviceDecode p{};
          p.dtype = q.dtype();
          p.cache_type = cache_type_of(k_cache);
          p.batch = q.size(4);
          p.seqlen_q = q.size(3);
          p.seqlen_new = k_new.ndim ? k_new.size(3) : 0;
          p.nheads = q.size(2);
          p.nheads_k = k_cache.size(2);
          p.headdim = q.size(1);
          p.headdim_v = v_cache.size(1);
          p.capacity = capacity;
          p.q = tensor(q);
          p.k_cache = tensor(k_cache);
          p.v_cache = tensor(v_cache);
          p.k_new = tensor(k_new);
          p.v_new = tensor(v_new);
          p.out = out;
          p.lse = lse;
          p.parts = parts;
          p.part_out = part_out;
          p.part_lse = part_lse;
          p.cuts = cuts;
          p.cache_seqlens = cache_seqlens;
          p.cache_batch_idx = cache_batch_idx;
          p.cache_leftpad = cache_leftpad;
          p.block_table = block_table;
          p.block_table_stride = batch_stride(block_table);
          p.page_size = k_cache.size(3);
          p.k_descale = k_descale;
          p.v_descale = v_descale;
          p.descale_batch_stride = batch_stride(k_descale);
          p.alibi_slopes = alibi_slopes;
          p.alibi_batch_stride = batch_stride(alibi_slopes);
          p.sink = sink;
          if (rotary_cos.ndim) {
            p.rotary_cos = rotary_cos;
            p.rotary_sin = rotary_sin;
            p.rotary_dtype = rotary_cos.dtype();
            p.positions = rotary_cos.size(2);
            p.rotary_dim = 2 * rotary_cos.size(1);
          }
          p.rotary_interleaved = rotary_interleaved;
          p.softmax_scale = softmax_scale;
          p.softcap = softcap;
          p.window_left = window_left;
          p.window_right = window_right;
          Queue on = queue_of(queue);
          Launching launching(on);
          decode(p, on);
        });
}
