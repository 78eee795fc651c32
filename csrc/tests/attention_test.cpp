// Attention forward and backward: attention_forward.h, attention_backward.h, scores.h, dropout.h.

#include <cstring>

#include "reference.h"
#include "tests.h"

namespace fastgpt {
namespace test {
namespace {

typedef std::vector<int32_t> Lengths;

struct Case {
  const char* name;
  int64_t batch, sq, sk, heads, heads_k, d, dv;
  int64_t left = -1, right = -1;
  float softcap = 0;
  bool sink = false, dlse = false;
  const char* alibi = "";  // the axes that it has, of batch and head
  const char* bias = "";   // of batch, head, query, key
  Storage bias_type = Storage::f32;
  double dropout = 0;
  // Per sequence: packed ones (sq, sk are then the totals), rows of k that are used, and where they begin.
  Lengths lengths_q = {}, lengths_k = {}, used = {}, pad = {};
};

// Sizes around the register tiles (4 to 12 rows, 8 to 32 columns) and blocks (96; 32 to 96 queries and 32 to
// 128 keys) of all instruction sets. Few rows without dropout are decoded: decode_test.cpp has the rest.
const Case kCases[] = {
    {"one of each", 1, 1, 1, 1, 1, 1, 1, .right = 0},
    {"full", 1, 97, 131, 2, 1, 33, 17, .dlse = true},
    {"causal, as long as a block", 1, 96, 96, 1, 1, 16, 32, .right = 0},
    {"causal, grouped heads", 2, 101, 101, 4, 2, 20, 12, .right = 0},
    {"causal, fewer keys than queries: empty rows", 1, 70, 23, 2, 2, 8, 5, .right = 0, .dlse = true},
    {"causal, more keys than queries", 1, 19, 150, 2, 1, 40, 64, .right = 0},
    {"few queries of many heads", 1, 2, 77, 6, 2, 24, 10, .right = 0, .sink = true},
    {"wide heads", 1, 18, 35, 1, 1, 256, 255, .right = 0},
    {"window", 1, 140, 130, 2, 1, 9, 16, .left = 17, .right = 0},
    {"window to both sides", 1, 60, 99, 1, 1, 16, 8, .left = 3, .right = 11},
    {"window past every key", 1, 90, 20, 1, 1, 8, 8, .left = 5, .right = 2},
    {"no key", 2, 20, 0, 2, 1, 8, 8},
    {"no query", 2, 0, 20, 2, 1, 8, 8},
    {"softcap", 1, 50, 66, 2, 2, 16, 16, .right = 0, .softcap = 1.5f},
    {"ALiBi by head", 1, 45, 80, 3, 1, 16, 16, .right = 0, .alibi = "h"},
    {"ALiBi by batch and head", 2, 40, 30, 2, 1, 16, 16, .alibi = "bh"},
    {"sink", 1, 60, 33, 2, 1, 16, 16, .right = 0, .sink = true, .dlse = true},
    {"bias", 2, 29, 45, 2, 1, 12, 16, .bias = "bhqk"},
    {"bias, bf16, by key", 1, 50, 70, 2, 1, 8, 8, .right = 0, .bias = "k", .bias_type = Storage::bf16},
    {"bias, fp16, by query", 2, 33, 40, 2, 2, 8, 8, .bias = "bq", .bias_type = Storage::f16},
    {"bias, boolean", 2, 48, 61, 2, 1, 8, 8, .bias = "hqk", .bias_type = Storage::boolean},
    {"bias, boolean, by query", 1, 30, 41, 2, 1, 8, 8, .bias = "q", .bias_type = Storage::boolean},
    {"dropout", 2, 61, 83, 2, 1, 16, 24, .right = 0, .dropout = 0.3},
    {"dropout of few queries", 1, 1, 40, 1, 1, 16, 16, .dropout = 0.5},
    {"packed", 3, 110, 128, 2, 1, 16, 12, .right = 0, .sink = true, .dlse = true, .lengths_q = {37, 0, 73},
     .lengths_k = {60, 31, 37}},
    {"packed, part of the keys used", 3, 60, 90, 2, 1, 16, 12, .alibi = "bh", .lengths_q = {30, 13, 17},
     .lengths_k = {40, 30, 20}, .used = {33, 0, 20}, .pad = {5, 0, 19}},
    {"part of the keys used", 3, 33, 50, 2, 1, 8, 8, .right = 0, .bias = "bhqk", .used = {50, 0, 29},
     .pad = {3, 0, 28}},
    {"everything", 2, 57, 71, 4, 2, 31, 15, .left = 40, .right = 3, .softcap = 4, .sink = true, .dlse = true,
     .alibi = "bh", .bias = "bhqk", .dropout = 0.2, .used = {71, 60}, .pad = {0, 7}},
};

struct Call {
  const Case& c;
  Storage type;
  bool packed = !c.lengths_q.empty();
  int64_t sequences = packed ? 1 : c.batch;  // of the tensors
  Array q = Array::normal(type, {sequences, c.sq, c.heads, c.d});
  Array k = Array::normal(type, {sequences, c.sk, c.heads_k, c.d});
  Array v = Array::normal(type, {sequences, c.sk, c.heads_k, c.dv});
  Array dout = Array::normal(type, {sequences, c.sq, c.heads, c.dv});
  Array dlse = Array::normal(Storage::f32, {1, sequences, c.heads, c.sq}, Array::contiguous);
  Array slopes = Array::normal(Storage::f32, shape_of(c.alibi, "bh"), Array::contiguous, 0.1);
  Array sink = Array::normal(Storage::f32, {1, 1, 1, c.heads}, Array::contiguous);
  Array bias = Array::normal(c.bias_type, shape_of(c.bias, "bhqk"));
  Integers edges_q{edges(c.lengths_q)}, edges_k{edges(c.lengths_k)}, used{c.used}, pad{c.pad};
  float scale = 1 / std::sqrt(static_cast<float>(c.d));
  Dropout dropout;

  Call(const Case& the_case, Storage storage) : c(the_case), type(storage) {
    set_dropout(dropout, c.dropout);
  }

  Shape shape_of(const char* axes, const char* all) const {
    int64_t sizes[] = {c.batch, c.heads, c.sq, c.sk};
    Shape shape = {1, 1, 1, 1};
    for (int i = 0; all[i]; i++)
      if (std::strchr(axes, all[i])) shape[i] = sizes[i];
    return shape;
  }
  static Lengths edges(const Lengths& lengths) {
    if (lengths.empty()) return {};
    Lengths sums = {0};
    for (int32_t n : lengths) sums.push_back(sums.back() + n);
    return sums;
  }

  // Where the rows of sequence b lie, and how many there are.
  int64_t sequence(int64_t b) const { return packed ? 0 : b; }
  int64_t first_query(int64_t b) const { return packed ? edges(c.lengths_q)[b] : 0; }
  int64_t queries(int64_t b) const { return packed ? c.lengths_q[b] : c.sq; }
  int64_t padding(int64_t b) const { return c.pad.empty() ? 0 : c.pad[b]; }
  int64_t first_key(int64_t b) const { return (packed ? edges(c.lengths_k)[b] : 0) + padding(b); }
  int64_t keys(int64_t b) const {
    int64_t rows = packed ? c.lengths_k[b] : c.sk;
    return (c.used.empty() ? rows : c.used[b]) - padding(b);
  }

  AttentionBackwardParams params(const Array& out, const Array& lse, int threads) const {
    AttentionBackwardParams p{};
    static_cast<Dropout&>(p) = dropout;
    p.dtype = static_cast<DType>(type);
    p.batch = c.batch, p.seqlen_q = c.sq, p.seqlen_k = c.sk, p.nheads = c.heads, p.nheads_k = c.heads_k;
    p.headdim = c.d, p.headdim_v = c.dv;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.out = out.tensor();
    p.lse = static_cast<float*>(lse.data());
    p.softmax_scale = scale;
    p.window_left = c.left, p.window_right = c.right;
    p.num_threads = threads;
    p.cu_seqlens_q = edges_q.data(), p.cu_seqlens_k = edges_k.data();
    p.seqused_k = used.data(), p.leftpad_k = pad.data();
    p.softcap = c.softcap;
    if (*c.alibi) p.alibi_slopes = static_cast<const float*>(slopes.data());
    p.alibi_batch_stride = slopes.strides[0];
    if (c.sink) p.sink = static_cast<const float*>(sink.data());
    if (*c.bias) p.bias.data = bias.data();
    set_strides(p.bias, bias);
    p.bias.type = static_cast<BiasType>(c.bias_type);
    return p;
  }
  template <class Data>
  static void set_strides(BiasTensor<Data>& t, const Array& a) {
    t.batch_stride = a.strides[0], t.head_stride = a.strides[1];
    t.query_stride = a.strides[2], t.key_stride = a.strides[3];
  }
};

template <class Real>
struct Results {
  Dense<Real> out, lse, dq, dk, dv, dsink, dbias;

  explicit Results(const Call& call)
      : out(call.dout.shape),
        lse(call.dlse.shape),
        dq(call.q.shape),
        dk(call.k.shape),
        dv(call.v.shape),
        dsink({1, 1, call.c.batch, call.c.heads}),
        dbias(call.bias.shape) {
    for (int64_t b = 0; b < call.c.batch; b++)
      for (int64_t h = 0; h < call.c.heads; h++) compute(call, b, h);
  }

  void compute(const Call& call, int64_t b, int64_t h) {
    const Case& c = call.c;
    int64_t group = c.heads / c.heads_k, s = call.sequence(b), first_query = call.first_query(b);
    int64_t first_key = call.first_key(b), sq = call.queries(b), sk = call.keys(b);
    auto rows = [&](const Array& t, int64_t head, int64_t first, int64_t n) {
      Matrix<Real> m = zeros<Real>(n, t.shape[3]);
      for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < t.shape[3]; d++) m[i][d] = static_cast<Real>(t.get(s, first + i, head, d));
      return m;
    };
    auto add = [&](Dense<Real>& t, int64_t head, int64_t first, const Matrix<Real>& m) {
      for (size_t i = 0; i < m.size(); i++)
        for (size_t d = 0; d < m[i].size(); d++) t(s, first + i, head, d) += m[i][d];
    };
    // Indices on axes that a tensor does not have are 0.
    auto of_bias = [&](int64_t i, int64_t j) {
      int64_t key = j + call.padding(b);
      const Shape& own = call.bias.shape;
      return Shape{own[0] > 1 ? b : 0, own[1] > 1 ? h : 0, own[2] > 1 ? i : 0, own[3] > 1 ? key : 0};
    };
    Head<Real> head;
    head.q = rows(call.q, h, first_query, sq);
    head.k = rows(call.k, h / group, first_key, sk);
    head.v = rows(call.v, h / group, first_key, sk);
    head.storage = call.type;
    if (has_matrix_unit && call.type == Storage::bf16) {
      bool decoded = group * c.sq <= 16 && c.lengths_q.empty() && !c.dropout;  // few rows, by vectors
      head.forward_factors = decoded ? Storage::f32 : call.type;
      head.backward_factors = call.type;
    }
    head.left = c.left, head.right = c.right;
    head.scale = call.scale, head.softcap = c.softcap;
    head.slope = *c.alibi ? static_cast<Real>(call.slopes.get(b, h, 0, 0)) : 0;
    head.sink = c.sink ? static_cast<Real>(call.sink.get(0, 0, 0, h)) : -kInfinity;
    if (*c.bias)
      head.bias = [&](int64_t i, int64_t j) {
        Shape at = of_bias(i, j);
        double x = call.bias.get(at[0], at[1], at[2], at[3]);
        return static_cast<Real>(c.bias_type != Storage::boolean ? x : x ? 0 : -kInfinity);
      };
    if (c.dropout)
      head.keep = [&](int64_t i, int64_t j) -> Real {
        return dropout_factor(call.dropout, j, static_cast<uint32_t>(i),
                              static_cast<uint32_t>(b * c.heads + h));
      };
    head.forward();
    std::vector<Real> dlse(sq);
    for (int64_t i = 0; i < sq; i++) {
      lse(0, s, h, first_query + i) = head.lse[i];
      if (c.dlse) dlse[i] = static_cast<Real>(call.dlse.get(0, s, h, first_query + i));
    }
    head.backward(rows(call.dout, h, first_query, sq), dlse);
    add(out, h, first_query, head.out);
    add(dq, h, first_query, head.dq);
    add(dk, h / group, first_key, head.dk);
    add(dv, h / group, first_key, head.dv);
    dsink(0, 0, b, h) = head.dsink;
    for (int64_t i = 0; i < sq; i++)
      for (int64_t j = 0; j < sk; j++) {
        Shape at = of_bias(i, j);
        dbias(at[0], at[1], at[2], at[3]) += head.dbias[i][j];
      }
  }
};

struct Outputs {
  Array out, lse, dq, dk, dv, dsink, dbias;

  Outputs(const Call& call, const Array& plain_out, const Array& plain_lse, int threads)
      : out(call.type, call.dout.shape),
        lse(Storage::f32, call.dlse.shape, Array::contiguous),
        dq(call.type, call.q.shape),
        dk(call.type, call.k.shape),
        dv(call.type, call.v.shape),
        dsink(Storage::f32, {1, 1, call.c.batch, call.c.heads}, Array::contiguous),
        dbias(Storage::f32, call.bias.shape, Array::contiguous) {
    kernels->attention_forward(call.params(out, lse, threads));

    // Backward is given another's out and lse, so that what is wrong in forward does not show twice.
    AttentionBackwardParams p = call.params(plain_out, plain_lse, threads);
    p.dout = call.dout.tensor(), p.dq = dq.tensor(), p.dk = dk.tensor(), p.dv = dv.tensor();
    if (call.c.dlse) p.dlse = static_cast<const float*>(call.dlse.data());
    if (call.c.sink) p.dsink = static_cast<float*>(dsink.data());
    if (has_dbias(call.c)) {
      for_each(dbias.shape, [&](auto... i) { dbias.set(i..., 0); });
      p.dbias.data = static_cast<float*>(dbias.data());
      Call::set_strides(p.dbias, dbias);
    }
    kernels->attention_backward(p);
  }
  static bool has_dbias(const Case& c) { return *c.bias && c.bias_type != Storage::boolean; }
};

void run(const Case& c, Storage type) {
  Call call(c, type);
  Results<double> exact(call);
  Results<float> plain(call);
  Array out = Array::of(type, plain.out), lse = Array::of(Storage::f32, plain.lse, Array::contiguous);
  Outputs got(call, out, lse, 1), threaded(call, out, lse, 3);
  check("out", got.out, threaded.out, plain.out, exact.out, kOutput);
  check("lse", got.lse, threaded.lse, plain.lse, exact.lse, kOutput);
  check("dq", got.dq, threaded.dq, plain.dq, exact.dq, kGradient);
  check("dk", got.dk, threaded.dk, plain.dk, exact.dk, kGradient);
  check("dv", got.dv, threaded.dv, plain.dv, exact.dv, kGradient);
  if (c.sink) check("dsink", got.dsink, threaded.dsink, plain.dsink, exact.dsink, kGradient);
  if (Outputs::has_dbias(c)) check("dbias", got.dbias, threaded.dbias, plain.dbias, exact.dbias, kGradient);
}

}  // namespace

void test_attention() {
  for (const Case& c : kCases)
    for (Storage type : kDTypes) {
      begin_case("attention", c.name, type);
      // Where factors are rounded, the largest error is one of a few large factors', and a matter of luck.
      for (draws_to_come = has_matrix_unit && type == Storage::bf16 ? 15 : 0; draws_to_come >= 0;
           draws_to_come--)
        run(c, type);
    }
  draws_to_come = 0;
}

}  // namespace test
}  // namespace fastgpt
