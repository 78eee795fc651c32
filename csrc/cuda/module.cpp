// fastgpt._cuda: the Python binding of the CUDA kernels, and fastgpt._cuda_emulated, the same of the
// emulator's. The Python side is fastgpt/ops/*/cuda.py. Every call ends with its kernels queued; nothing
// waits for them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "attention.h"
#include "fastgpt/python.h"
#include "norm.h"
#ifdef FASTGPT_EMULATE
#include "../emulated/self_test.h"
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

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(FASTGPT_MODULE, m) {
  using namespace fastgpt;
  find_elements();

  m.def("unavailable", &unavailable);
#ifdef FASTGPT_EMULATE
  m.def("self_test", [](const std::string& name, Data out) { self_test(name, out); });
#endif

  m.def("attention_forward",
        [](const PyQueue& queue, int multiprocessors, const Array& q, const Array& k, const Array& v,
           const Array& out, Data lse, Data cu_seqlens_q, Data cu_seqlens_k, Data seqused_k, Data leftpad_k,
           int64_t batch, float softmax_scale, int64_t window_left, int64_t window_right) {
          AttentionParams p{};
          p.dtype = q.dtype();
          p.batch = batch;
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
          p.softmax_scale = softmax_scale;
          p.window_left = window_left;
          p.window_right = window_right;
          p.cu_seqlens_q = cu_seqlens_q;
          p.cu_seqlens_k = cu_seqlens_k;
          p.seqused_k = seqused_k;
          p.leftpad_k = leftpad_k;
          attention_forward(p, multiprocessors, queue_of(queue));
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
          norm_forward(p, queue_of(queue));
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
          norm_backward(p, queue_of(queue));
        });
}
