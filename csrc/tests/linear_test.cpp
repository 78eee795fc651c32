// The products of a few rows with a matrix: linear.h.

#include "tests.h"

namespace fastgpt {
namespace test {
namespace {

struct Case {
  const char* name;
  int64_t rows, in_features, out_features;
  bool bias = true;
  int parts = 1;  // matrices that the rows of the weight are cut into
};

const Case kCases[] = {
    {"one element", 1, 1, 1},
    {"whole lines", 2, 64, 48},
    {"odd", 3, 75, 33, .bias = false},
    {"one row", 1, 301, 130},
    {"as many rows as are multiplied at a time", 6, 130, 40},
    {"two groups of rows", 8, 65, 70, .bias = false},
    {"three groups of rows", 13, 40, 17},
    {"fewer weight rows than threads", 4, 900, 2},
    {"several threads", 5, 700, 400},
    {"several stretches for each of three threads", 1, 1100, 3000},
    {"long rows", 2, 9000, 20},
    {"three matrices", 1, 576, 960, .parts = 3},
    {"two matrices, odd", 4, 75, 67, .bias = false, .parts = 2},
};

struct Call {
  const Case& c;
  Storage type;
  bool transposed;
  Shape weight_shape = {1, 1, transposed ? c.in_features : c.out_features,
                        transposed ? c.out_features : c.in_features};
  Array x = Array::normal(type, {1, 1, c.rows, c.in_features});
  Array weight = Array::normal(type, weight_shape, Array::contiguous);
  Array bias = Array::normal(type, {1, 1, 1, c.out_features});

  Array run(int threads) const {
    Array out(type, {1, 1, c.rows, c.out_features}, Array::contiguous);
    LinearParams p{};
    p.dtype = static_cast<DType>(type);
    p.rows = c.rows, p.in_features = c.in_features;
    p.x = x.data(), p.x_stride = x.strides[2];
    // As one matrix, or as several whose results lie side by side: stretches of its rows.
    int64_t first = 0;
    p.count = transposed ? 1 : c.parts;
    for (int i = 0; i < p.count; i++) {
      int64_t end = c.out_features * (i + 1) / p.count;
      p.projections[i].weight = weight.at(0, 0, first, 0);
      p.projections[i].bias = c.bias ? bias.at(0, 0, 0, first) : nullptr;
      p.projections[i].out_features = end - first;
      first = end;
    }
    p.transposed = transposed;
    p.out = out.data();
    p.num_threads = threads;
    kernels->linear(p);
    return out;
  }

  template <class Real>
  Dense<Real> reference() const {
    Dense<Real> out({1, 1, c.rows, c.out_features});
    for_each(out.shape, [&](int64_t, int64_t, int64_t r, int64_t o) {
      Real sum = 0;
      for (int64_t i = 0; i < c.in_features; i++)
        sum += static_cast<Real>(x.get(0, 0, r, i)) *
               static_cast<Real>(transposed ? weight.get(0, 0, i, o) : weight.get(0, 0, o, i));
      out(0, 0, r, o) = sum + (c.bias ? static_cast<Real>(bias.get(0, 0, 0, o)) : 0);
    });
    return out;
  }
};

}  // namespace

void test_linear() {
  for (const Case& c : kCases)
    for (Storage type : kDTypes)
      for (bool transposed : {false, true}) {
        begin_case(transposed ? "linear, transposed" : "linear", c.name, type);
        Call call{c, type, transposed};
        check("out", call.run(1), call.run(3), call.reference<float>(), call.reference<double>(), kOutput);
      }
}

}  // namespace test
}  // namespace fastgpt
