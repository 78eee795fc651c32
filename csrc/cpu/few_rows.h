// How linear, mlp, attention_block and block read their operands, for module.cpp: the tuples of
// fastgpt/ops/few_rows/spec.py, field by field. They are checked here, for in Python reading the dozen
// tensors of half a block takes as long as computing a norm.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "fastgpt/params.h"
#include "fastgpt/python.h"

namespace fastgpt {

// Thrown where an operand does not fit the others, or is not laid out as the kernels read it: then somebody
// else has to compute it.
struct Unfit {};
inline void require(bool fits) {
  if (!fits) throw Unfit{};
}

inline py::handle field(py::handle tuple, int index) { return PyTuple_GET_ITEM(tuple.ptr(), index); }

// None, or a tensor that is_plain.
inline Array read(py::handle tensor) {
  py::detail::make_caster<Array> caster;
  require((tensor.is_none() || is_plain(tensor)) && caster.load(tensor, false));
  return py::detail::cast_op<Array&>(caster);
}

// The same in x's type, the elements of a row side by side.
inline Array read(py::handle tensor, DType dtype, int64_t ndim) {
  Array t = read(tensor);
  require(t.ndim == ndim && t.is(dtype) && (t.size(1) == 1 || t.stride(1) == 1));
  return t;
}

// A vector of so many elements in x's type; null for None.
inline const void* read_vector(py::handle vector, DType dtype, int64_t size) {
  if (vector.is_none()) return nullptr;
  Array t = read(vector, dtype, 1);
  require(t.size(1) == size);
  return t;
}

// Rows x (..., in_features), at a uniform distance, and out, which is contiguous.
inline void read_rows(LinearParams& p, py::handle of_x, bool transposed, const Array& out) {
  Array x = read(of_x);
  require(x.ndim > 0 && (x.size(1) == 1 || x.stride(1) == 1));
  p.dtype = x.dtype();
  p.rows = 1;
  p.in_features = p.x_stride = x.size(1);
  for (int64_t from_end = 2; from_end <= x.ndim; from_end++) {
    if (x.size(from_end) == 1) continue;
    if (p.rows == 1) p.x_stride = x.stride(from_end);
    require(x.stride(from_end) == p.rows * p.x_stride);
    p.rows *= x.size(from_end);
  }
  require(p.rows > 0 && p.in_features > 0);
  p.x = x;
  p.count = 0;
  p.transposed = transposed;
  p.out = out;
}

// Projection: weight (out_features, in_features), or transposed, contiguous; bias (out_features) or None.
inline Projection read_projection(py::handle projection, const LinearParams& p, int64_t in_features) {
  Array weight = read(field(projection, 0), p.dtype, 2);
  require(weight.size(2) == 1 || weight.stride(2) == weight.size(1));
  require(weight.size(p.transposed ? 2 : 1) == in_features);
  int64_t out_features = weight.size(p.transposed ? 1 : 2);
  require(out_features > 0);
  return {weight, read_vector(field(projection, 1), p.dtype, out_features), out_features};
}

inline void read_projections(LinearParams& p, py::handle projections) {
  Py_ssize_t count = PyTuple_GET_SIZE(projections.ptr());
  require(0 < count && count <= kMostProjections);
  for (; p.count < count; p.count++)
    p.projections[p.count] = read_projection(field(projections, p.count), p, p.in_features);
}

// Norm, or None: rms, eps, weight, bias, weight_offset.
inline FewRowsNorm read_norm(py::handle norm, DType dtype, int64_t hidden) {
  FewRowsNorm result;
  if (norm.is_none()) return result;
  result.exists = true;
  result.rms = field(norm, 0).ptr() == Py_True;
  result.eps = py::cast<float>(field(norm, 1));
  result.weight = read_vector(field(norm, 2), dtype, hidden);
  result.bias = read_vector(field(norm, 3), dtype, hidden);
  result.weight_offset = py::cast<float>(field(norm, 4));
  require(result.weight || result.weight_offset == 0.0f);
  return result;
}

// Around, or None: before, after. What is added to x has its width.
inline void read_around(HalfBlockParams& p, py::handle around, int64_t out_features) {
  if (around.is_none()) return;
  require(out_features == p.in_features);
  p.before = read_norm(field(around, 0), p.dtype, p.in_features);
  p.after = read_norm(field(around, 1), p.dtype, p.in_features);
  p.residual = true;
}

// Mlp: up, down, gated, activation, transposed, around.
inline MlpParams read_mlp(py::handle x, py::handle spec, const Array& out) {
  static const char* const kActivations[] = {"silu", "gelu_tanh"};
  MlpParams p;
  read_rows(p, x, field(spec, 4).ptr() == Py_True, out);
  read_projections(p, field(spec, 0));
  p.gated = field(spec, 2).ptr() == Py_True;
  int64_t columns = p.out_stride(), width = p.gated ? columns / 2 : columns;
  require(p.count == 1
              ? columns == (p.gated ? 2 : 1) * width
              : p.count == 2 && p.gated && p.projections[0].out_features == p.projections[1].out_features);
  p.down = read_projection(field(spec, 1), p, width);
  auto found =
      std::find(std::begin(kActivations), std::end(kActivations), py::cast<std::string>(field(spec, 3)));
  require(found != std::end(kActivations));
  p.activation = static_cast<Activation>(found - std::begin(kActivations));
  read_around(p, field(spec, 5), p.down.out_features);
  return p;
}

// Rotary, or None: cos, sin, alike.
inline void read_rotary(AttentionBlockParams& p, py::handle rotary) {
  if (rotary.is_none()) return;
  const DecodeParams& a = p.attention;
  require(a.headdim % 2 == 0);
  Array cos = read(field(rotary, 0));
  p.rotary_dtype = cos.is(p.dtype) ? p.dtype : DType::f32;
  Array tables[] = {read(field(rotary, 0), p.rotary_dtype, 3), read(field(rotary, 1), p.rotary_dtype, 3)};
  p.second = field(rotary, 2).ptr() == Py_True ? 0 : a.headdim / 2;
  for (const Array& t : tables) {
    require(t.size(1) == a.headdim / 2 + p.second && t.sizes[1] == a.seqlen_q);
    require(t.sizes[0] == a.batch || t.sizes[0] == 1);
    int64_t* strides = &t == tables ? p.cos_strides : p.sin_strides;
    strides[0] = t.sizes[0] == 1 ? 0 : t.strides[0];
    strides[1] = t.strides[1];
  }
  p.cos = tables[0];
  p.sin = tables[1];
}

// Of a cache's sequences, for as long as the call takes.
struct Lengths {
  std::vector<int32_t> seqlens, leftpad;
};

// Attention: qkv, out, softmax_scale, window_left, softcap, q_norm, k_norm, heads_together, transposed,
// around. Cache: k, v, seqlens, key_ranges.
inline AttentionBlockParams read_attention(py::handle of_x, py::handle spec, py::handle rotary,
                                           py::handle cache, const Array& out, Lengths& lengths) {
  AttentionBlockParams p;
  DecodeParams& a = p.attention;
  read_rows(p, of_x, field(spec, 8).ptr() == Py_True, out);
  Array x = read(of_x), k = read(field(cache, 0), p.dtype, 4), v = read(field(cache, 1), p.dtype, 4);
  require(x.ndim == 3 && k.sizes[0] == x.sizes[0] && std::equal(k.sizes, k.sizes + 4, v.sizes));
  read_projections(p, field(spec, 0));
  a.dtype = p.dtype;
  a.batch = x.sizes[0];
  a.seqlen_q = a.seqlen_new = x.sizes[1];
  a.nheads_k = k.size(2);
  a.headdim = a.headdim_v = k.size(1);
  require(a.nheads_k > 0 && a.headdim > 0 && a.headdim <= 256);
  int64_t columns = p.out_stride(), of_k = a.nheads_k * a.headdim;
  a.nheads = columns / a.headdim - 2 * a.nheads_k;
  require(a.nheads > 0 && a.nheads % a.nheads_k == 0 && columns == a.nheads * a.headdim + 2 * of_k);
  require(p.count == 1 ||
          (p.count == 3 && p.projections[1].out_features == of_k && p.projections[2].out_features == of_k));
  p.to_out = read_projection(field(spec, 1), p, a.nheads * a.headdim);
  a.softmax_scale = py::cast<float>(field(spec, 2));
  a.window_left = py::cast<int64_t>(field(spec, 3));
  a.window_right = 0;
  a.softcap = py::cast<float>(field(spec, 4));
  p.heads_together = field(spec, 7).ptr() == Py_True;
  p.q_norm = read_norm(field(spec, 5), p.dtype, p.heads_together ? a.nheads * a.headdim : a.headdim);
  p.k_norm = read_norm(field(spec, 6), p.dtype, p.heads_together ? of_k : a.headdim);
  read_around(p, field(spec, 9), p.to_out.out_features);
  read_rotary(p, rotary);
  a.k = tensor(k);
  a.v = tensor(v);

  // Copies: without the GIL, another thread may write where they come from.
  if (py::handle seqlens = field(cache, 2); PyLong_Check(seqlens.ptr())) {
    int64_t past = py::cast<int64_t>(seqlens);
    require(0 <= past && past <= k.sizes[1]);
    lengths.seqlens.assign(a.batch, static_cast<int32_t>(past));
  } else {
    Array each = read(seqlens);
    require(each.ndim == 1 && each.size(1) == a.batch && (a.batch == 1 || each.stride(1) == 1));
    lengths.seqlens.assign(static_cast<const int32_t*>(each), static_cast<const int32_t*>(each) + a.batch);
  }
  for (int32_t past : lengths.seqlens) require(0 <= past && past + a.seqlen_new <= k.sizes[1]);
  p.cache_seqlens = lengths.seqlens.data();
  if (py::handle key_ranges = field(cache, 3); !key_ranges.is_none()) {
    Array ranges = read(key_ranges);
    require(ranges.ndim > 1 && ranges.sizes[0] == a.batch && ranges.size(1) == 2 && ranges.stride(1) == 1);
    for (int64_t b = 0; b < a.batch; b++) {
      const int32_t* range = static_cast<const int32_t*>(ranges) + b * ranges.strides[0];
      int32_t first = range[0], past = lengths.seqlens[b];
      require(0 <= first && first <= past && range[1] == past + a.seqlen_new);
      lengths.leftpad.push_back(first);
    }
    a.leftpad_k = lengths.leftpad.data();
  }
  return p;
}

}  // namespace fastgpt
