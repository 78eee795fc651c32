// The merge of attention over two sets of keys, forward and backward: merge.h.

#include <cmath>

#include "tests.h"

namespace fastgpt {
namespace test {
namespace {

struct Case {
  const char* name;
  int64_t batch, seqlen, heads, dim;
  bool dlse = true;
};

const Case kCases[] = {
    {"one element", 1, 1, 1, 1}, {"whole vectors", 2, 40, 3, 64}, {"odd", 2, 31, 3, 75, .dlse = false},
    {"wide", 1, 70, 2, 255},     {"no query", 1, 0, 2, 8},
};

struct Call {
  const Case& c;
  Storage type;
  Shape shape = {c.batch, c.seqlen, c.heads, c.dim}, lse_shape = {c.batch, c.seqlen, c.heads, 1};
  Dense<float> lse_a = random_lse(), lse_b = random_lse();
  Array lses_a = Array::of(Storage::f32, lse_a), lses_b = Array::of(Storage::f32, lse_b);
  Array out_a = state(lse_a), out_b = state(lse_b);
  Array dout = Array::normal(type, shape), dlse = Array::normal(Storage::f32, lse_shape);

  // Far apart at times, and -inf: a state that saw no key.
  Dense<float> random_lse() const {
    Dense<float> lse(lse_shape);
    for (float& x : lse.values)
      x = static_cast<float>(random_integer(0, 4) ? 20 * random_normal() : -kInfinity);
    return lse;
  }
  // NaN where there is no key: nothing may be read.
  Array state(Dense<float>& lse) const {
    Dense<float> out(shape);
    for_each(shape, [&](int64_t b, int64_t i, int64_t h, int64_t d) {
      out(b, i, h, d) = static_cast<float>(lse(b, i, h, 0) == -kInfinity ? std::nan("") : random_normal());
    });
    return Array::of(type, out);
  }

  template <class Params>
  void set(Params& p, int threads) const {
    p.dtype = static_cast<DType>(type);
    p.batch = c.batch, p.seqlen = c.seqlen, p.nheads = c.heads, p.headdim_v = c.dim;
    p.out_a = out_a.tensor(), p.lse_a = lses_a.tensor();
    p.out_b = out_b.tensor(), p.lse_b = lses_b.tensor();
    p.num_threads = threads;
  }
};

template <class Real>
struct Results {
  Dense<Real> out, lse, dout_a, dlse_a, dout_b, dlse_b;

  explicit Results(const Call& call)
      : out(call.shape),
        lse(call.lse_shape),
        dout_a(call.shape),
        dlse_a(call.lse_shape),
        dout_b(call.shape),
        dlse_b(call.lse_shape) {
    for_each(call.lse_shape, [&](int64_t b, int64_t i, int64_t h, int64_t) {
      Real a = static_cast<Real>(call.lses_a.get(b, i, h, 0)),
           bb = static_cast<Real>(call.lses_b.get(b, i, h, 0));
      Real top = std::max(a, bb), sum = lse(b, i, h, 0) = -kInfinity;
      if (top == -kInfinity) return;
      sum = lse(b, i, h, 0) = top + std::log(std::exp(a - top) + std::exp(bb - top));
      Real w_a = std::exp(a - sum), w_b = std::exp(bb - sum), shift = 0;
      for (int64_t d = 0; d < call.c.dim; d++) {
        Real x_a = a == -kInfinity ? 0 : static_cast<Real>(call.out_a.get(b, i, h, d));
        Real x_b = bb == -kInfinity ? 0 : static_cast<Real>(call.out_b.get(b, i, h, d));
        Real dy = static_cast<Real>(call.dout.get(b, i, h, d));
        out(b, i, h, d) = w_a * x_a + w_b * x_b;
        dout_a(b, i, h, d) = w_a * dy;
        dout_b(b, i, h, d) = w_b * dy;
        shift += dy * (x_a - x_b);
      }
      Real dlse = call.c.dlse ? static_cast<Real>(call.dlse.get(b, i, h, 0)) : 0;
      dlse_a(b, i, h, 0) = w_a * dlse + w_a * w_b * shift;
      dlse_b(b, i, h, 0) = w_b * dlse - w_a * w_b * shift;
    });
  }
};

struct Outputs {
  Array out, lse, dout_a, dlse_a, dout_b, dlse_b;

  Outputs(const Call& call, int threads)
      : out(call.type, call.shape),
        lse(Storage::f32, call.lse_shape),
        dout_a(call.type, call.shape),
        dlse_a(Storage::f32, call.lse_shape),
        dout_b(call.type, call.shape),
        dlse_b(Storage::f32, call.lse_shape) {
    MergeParams forward{};
    call.set(forward, threads);
    forward.out = out.tensor(), forward.lse = lse.tensor();
    kernels->merge_forward(forward);
    MergeBackwardParams backward{};
    call.set(backward, threads);
    backward.dout = call.dout.tensor();
    if (call.c.dlse) backward.dlse = call.dlse.tensor();
    backward.dout_a = dout_a.tensor(), backward.dlse_a = dlse_a.tensor();
    backward.dout_b = dout_b.tensor(), backward.dlse_b = dlse_b.tensor();
    kernels->merge_backward(backward);
  }
};

void run(const Case& c, Storage type) {
  Call call{c, type};
  Results<double> exact(call);
  Results<float> plain(call);
  Outputs got(call, 1), threaded(call, 3);
  check("out", got.out, threaded.out, plain.out, exact.out, kOutput);
  check("lse", got.lse, threaded.lse, plain.lse, exact.lse, kOutput);
  check("dout_a", got.dout_a, threaded.dout_a, plain.dout_a, exact.dout_a, kGradient);
  check("dlse_a", got.dlse_a, threaded.dlse_a, plain.dlse_a, exact.dlse_a, kGradient);
  check("dout_b", got.dout_b, threaded.dout_b, plain.dout_b, exact.dout_b, kGradient);
  check("dlse_b", got.dlse_b, threaded.dlse_b, plain.dlse_b, exact.dlse_b, kGradient);
}

}  // namespace

void test_merge() {
  for (const Case& c : kCases)
    for (Storage type : kDTypes) {
      begin_case("merge", c.name, type);
      run(c, type);
    }
}

}  // namespace test
}  // namespace fastgpt
