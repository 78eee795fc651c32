// Layer norm and RMS norm, forward and backward: norm.h.

#include <cmath>

#include "reference.h"
#include "tests.h"

namespace fastgpt {
namespace test {
namespace {

struct Case {
  const char* name;
  int64_t rows, hidden;
  bool rms = false, weight = true, bias = true, residual = false, store_sum = false, weight_fp32 = false;
  double dropout = 0;
};

// A unit of work is 16384 elements, so the longer ones are shared among threads.
const Case kCases[] = {
    {"layer norm, one element", 1, 1},
    {"layer norm", 50, 768},
    {"layer norm, odd", 37, 1001, .weight_fp32 = true},
    {"layer norm, no parameters", 5, 33, .weight = false, .bias = false},
    {"layer norm, residual", 9, 130, .residual = true, .store_sum = true},
    {"layer norm, residual, sum not stored", 9, 131, .bias = false, .residual = true},
    {"layer norm, dropout, residual", 40, 517, .residual = true, .store_sum = true, .dropout = 0.3},
    {"layer norm, dropout", 7, 70, .dropout = 0.1},
    {"RMS norm", 600, 64, .rms = true, .bias = false},
    {"RMS norm, odd, residual", 21, 999, .rms = true, .bias = false, .residual = true, .store_sum = true},
    {"RMS norm, dropout", 3, 15, .rms = true, .weight = false, .store_sum = true, .dropout = 0.5},
    {"no row", 0, 17},
};

constexpr float kEps = 1e-5f;

struct Call {
  const Case& c;
  Storage type, weight_type = c.weight_fp32 ? Storage::f32 : type;
  Shape shape = {1, 1, c.rows, c.hidden}, parameter = {1, 1, 1, c.hidden}, statistic = {1, 1, 1, c.rows};
  Array x = Array::normal(type, shape), residual = Array::normal(type, shape);
  Array weight = Array::normal(weight_type, parameter), bias = Array::normal(weight_type, parameter);
  // Of backward; z is what was normalised, as stored.
  Array z = Array::normal(type, shape), dout = Array::normal(type, shape),
        dsum_out = Array::normal(type, shape);
  Dropout dropout{};

  Call(const Case& the_case, Storage storage) : c(the_case), type(storage) {
    set_dropout(dropout, c.dropout);
  }
};

template <class Real>
struct Results {
  Dense<Real> out, sum, mean, rstd;  // of x
  Dense<Real> z_mean, z_rstd;        // of z
  Dense<Real> dx, dsum, dweight, dbias;

  explicit Results(const Call& call)
      : out(call.shape),
        sum(call.shape),
        mean(call.statistic),
        rstd(call.statistic),
        z_mean(call.statistic),
        z_rstd(call.statistic),
        dx(call.shape),
        dsum(call.shape),
        dweight(call.parameter),
        dbias(call.parameter) {
    const Case& c = call.c;
    auto at = [](const Array& t, int64_t r, int64_t i) { return static_cast<Real>(t.get(0, 0, r, i)); };
    auto keep = [&](int64_t r, int64_t i) -> Real {
      if (!c.dropout) return 1;
      return dropout_factor(call.dropout, i, static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32));
    };
    auto weight = [&](int64_t i) { return c.weight ? at(call.weight, 0, i) : 1; };
    auto statistics = [&](const std::vector<Real>& row, Real& row_mean, Real& row_rstd) {
      Real total = 0, squares = 0;
      for (Real element : row) total += element;
      row_mean = c.rms ? 0 : total / c.hidden;
      for (Real element : row) squares += (element - row_mean) * (element - row_mean);
      row_rstd = 1 / std::sqrt(squares / c.hidden + static_cast<Real>(kEps));
    };
    for (int64_t r = 0; r < c.rows; r++) {
      std::vector<Real> row(c.hidden), z(c.hidden);
      for (int64_t i = 0; i < c.hidden; i++) {
        row[i] = at(call.x, r, i) * keep(r, i) + (c.residual ? at(call.residual, r, i) : 0);
        if (sizeof(Real) == sizeof(float)) row[i] = static_cast<Real>(rounded(call.type, row[i]));
        sum(0, 0, r, i) = row[i];
        z[i] = at(call.z, r, i);
      }
      Real& row_mean = mean(0, 0, 0, r);
      Real& row_rstd = rstd(0, 0, 0, r);
      statistics(row, row_mean, row_rstd);
      for (int64_t i = 0; i < c.hidden; i++)
        out(0, 0, r, i) = (row[i] - row_mean) * row_rstd * weight(i) + (c.bias ? at(call.bias, 0, i) : 0);

      Real &m = z_mean(0, 0, 0, r), &s = z_rstd(0, 0, 0, r), g_mean = 0, gx_mean = 0;
      statistics(z, m, s);
      for (int64_t i = 0; i < c.hidden; i++) {
        Real dy = at(call.dout, r, i), xhat = (z[i] - m) * s;
        dweight(0, 0, 0, i) += dy * xhat;
        dbias(0, 0, 0, i) += dy;
        g_mean += c.rms ? 0 : dy * weight(i) / c.hidden;
        gx_mean += dy * weight(i) * xhat / c.hidden;
      }
      for (int64_t i = 0; i < c.hidden; i++) {
        Real dz = s * (at(call.dout, r, i) * weight(i) - g_mean - (z[i] - m) * s * gx_mean);
        if (c.store_sum) dz += at(call.dsum_out, r, i);
        dsum(0, 0, r, i) = dz;
        dx(0, 0, r, i) = dz * keep(r, i);
      }
    }
  }
};

struct Outputs {
  Array out, sum, mean, rstd, dx, dsum, dweight, dbias;

  Outputs(const Call& call, const Array& z_mean, const Array& z_rstd, int threads)
      : out(call.type, call.shape, Array::contiguous),
        sum(call.type, call.shape, Array::contiguous),
        mean(Storage::f32, call.statistic),
        rstd(Storage::f32, call.statistic),
        dx(call.type, call.shape, Array::contiguous),
        dsum(call.type, call.shape, Array::contiguous),
        dweight(call.weight_type, call.parameter),
        dbias(call.weight_type, call.parameter) {
    const Case& c = call.c;
    NormForwardParams forward{};
    static_cast<Dropout&>(forward) = call.dropout;
    forward.dtype = static_cast<DType>(call.type),
    forward.weight_dtype = static_cast<DType>(call.weight_type);
    forward.rows = c.rows, forward.hidden = c.hidden;
    forward.x = call.x.data(), forward.x_stride = call.x.strides[2];
    if (c.residual)
      forward.residual = call.residual.data(), forward.residual_stride = call.residual.strides[2];
    if (c.weight) forward.weight = call.weight.data();
    if (c.bias) forward.bias = call.bias.data();
    forward.eps = kEps;
    forward.out = out.data();
    if (c.store_sum) forward.residual_out = sum.data();
    if (!c.rms) forward.mean = static_cast<float*>(mean.data());
    forward.rstd = static_cast<float*>(rstd.data());
    forward.num_threads = threads;
    kernels->norm_forward(forward);

    NormBackwardParams backward{};
    static_cast<Dropout&>(backward) = call.dropout;
    backward.dtype = forward.dtype, backward.weight_dtype = forward.weight_dtype;
    backward.rows = c.rows, backward.hidden = c.hidden;
    backward.dout = call.dout.data(), backward.dout_stride = call.dout.strides[2];
    backward.x = call.z.data(), backward.x_stride = call.z.strides[2];
    backward.weight = forward.weight;
    if (c.store_sum)
      backward.dresidual = call.dsum_out.data(), backward.dresidual_stride = call.dsum_out.strides[2];
    if (!c.rms) backward.mean = static_cast<const float*>(z_mean.data());
    backward.rstd = static_cast<const float*>(z_rstd.data());
    backward.dx = dx.data();
    if (has_dsum(c)) backward.dsum = dsum.data();
    if (c.weight) backward.dweight = dweight.data();
    if (c.bias) backward.dbias = dbias.data();
    backward.num_threads = threads;
    kernels->norm_backward(backward);
  }
  static bool has_dsum(const Case& c) { return c.dropout && c.residual; }
};

void run(const Case& c, Storage type) {
  Call call(c, type);
  Results<double> exact(call);
  Results<float> plain(call);
  Array z_mean = Array::of(Storage::f32, plain.z_mean), z_rstd = Array::of(Storage::f32, plain.z_rstd);
  Outputs got(call, z_mean, z_rstd, 1), threaded(call, z_mean, z_rstd, 3);
  check("out", got.out, threaded.out, plain.out, exact.out, kOutput);
  check("rstd", got.rstd, threaded.rstd, plain.rstd, exact.rstd, kOutput);
  if (!c.rms) check("mean", got.mean, threaded.mean, plain.mean, exact.mean, kOutput);
  if (c.store_sum) check("sum", got.sum, threaded.sum, plain.sum, exact.sum, kOutput);
  check("dx", got.dx, threaded.dx, plain.dx, exact.dx, kGradient);
  if (Outputs::has_dsum(c)) check("dsum", got.dsum, threaded.dsum, plain.dsum, exact.dsum, kGradient);
  if (c.weight) check("dweight", got.dweight, threaded.dweight, plain.dweight, exact.dweight, kGradient);
  if (c.bias) check("dbias", got.dbias, threaded.dbias, plain.dbias, exact.dbias, kGradient);
}

}  // namespace

void test_norm() {
  for (const Case& c : kCases)
    for (Storage type : kDTypes) {
      begin_case("norm", c.name, type);
      run(c, type);
    }
}

}  // namespace test
}  // namespace fastgpt
