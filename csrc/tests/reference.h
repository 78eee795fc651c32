// Attention as it is defined, one head of one sequence at a time, with its matrices written out; and the
// random words of dropout. Real is double for what is exact, float for the error that is allowed.
#pragma once

#include <cmath>
#include <functional>

#include "check.h"

namespace fastgpt {
namespace test {

// Word `word` of Philox4x32-10 (Salmon et al. 2011) of a counter.
inline uint32_t random_word(uint64_t seed, std::array<uint32_t, 4> x, int word) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
  }
  return x[word];
}

// What dropout multiplies element `column` of a row by; the row is c1, c2.
inline float dropout_factor(const Dropout& p, int64_t column, uint32_t c1, uint32_t c2) {
  uint32_t word = random_word(p.dropout_seed, {static_cast<uint32_t>(column / 4), c1, c2, p.dropout_offset},
                              static_cast<int>(column % 4));
  return word >= p.dropout_threshold ? p.dropout_scale : 0.0f;
}

inline void set_dropout(Dropout& p, double probability) {
  if (probability == 0) return;
  p.dropout_threshold = static_cast<uint32_t>(probability * 4294967296.0);
  p.dropout_offset = static_cast<uint32_t>(generator());
  p.dropout_seed = generator();
  p.dropout_scale = static_cast<float>(1 / (1 - probability));
}

template <class Real>
using Matrix = std::vector<std::vector<Real>>;

template <class Real>
Matrix<Real> zeros(size_t rows, size_t columns) {
  return Matrix<Real>(rows, std::vector<Real>(columns));
}

template <class Real>
Real dot(const std::vector<Real>& a, const std::vector<Real>& b) {
  Real sum = 0;
  for (size_t d = 0; d < a.size(); d++) sum += a[d] * b[d];
  return sum;
}

// A factor of a product as plain PyTorch stores it; what is exact is not rounded.
template <class Real>
Real factor(Storage stored, Real x) {
  return sizeof(Real) == sizeof(float) ? static_cast<Real>(rounded(stored, x)) : x;
}

template <class Real>
struct Head {
  Matrix<Real> q, k, v;
  Storage storage;  // of out
  // Of probabilities in forward, and of these and dx in backward, as factors. Only kernels of a matrix unit
  // may round them, too.
  Storage forward_factors = Storage::f32, backward_factors = Storage::f32;
  int64_t left, right;
  Real scale, softcap, slope, sink;                      // sink: -inf for none
  std::function<Real(int64_t i, int64_t j)> bias, keep;  // -inf hides; what a probability is multiplied by

  Matrix<Real> p, slopes_of_softcap, out;
  std::vector<Real> lse;

  void forward() {
    int64_t sq = q.size(), sk = k.size();
    size_t dim_v = sk ? v[0].size() : 0;
    p = zeros<Real>(sq, sk);
    slopes_of_softcap = zeros<Real>(sq, sk);
    out = zeros<Real>(sq, dim_v);
    lse.assign(sq, -kInfinity);
    for (int64_t i = 0; i < sq; i++) {
      std::vector<Real> s(sk, -kInfinity);
      Real top = sink, sum = 0;
      for (int64_t j = 0; j < sk; j++) {
        int64_t distance = i + sk - sq - j;
        if ((left >= 0 && distance > left) || (right >= 0 && -distance > right)) continue;
        Real x = scale * dot(q[i], k[j]), t = softcap ? std::tanh(x / softcap) : 0;
        s[j] = (softcap ? softcap * t : x) + (bias ? bias(i, j) : 0) - slope * std::abs(distance);
        slopes_of_softcap[i][j] = 1 - t * t;
        top = std::max(top, s[j]);
      }
      if (top == -kInfinity) continue;
      for (int64_t j = 0; j < sk; j++) sum += std::exp(s[j] - top);
      sum += std::exp(sink - top);
      lse[i] = top + std::log(sum);
      for (int64_t j = 0; j < sk; j++) {
        p[i][j] = std::exp(s[j] - lse[i]);
        Real kept = factor(forward_factors, p[i][j] * (keep ? keep(i, j) : 1));
        for (size_t d = 0; d < dim_v; d++) out[i][d] += kept * v[j][d];
      }
      // The plain computation is one of the storage type: so is what its backward finds.
      for (Real& x : out[i])
        if (sizeof(Real) == sizeof(float)) x = static_cast<Real>(rounded(storage, x));
    }
  }

  Matrix<Real> dq, dk, dv, dbias;
  Real dsink = 0;

  void backward(const Matrix<Real>& dout, const std::vector<Real>& dlse) {
    size_t sq = q.size(), sk = k.size(), dim = sq ? q[0].size() : 0;
    dq = zeros<Real>(sq, dim);
    dk = zeros<Real>(sk, dim);
    dv = zeros<Real>(sk, sk ? v[0].size() : 0);
    dbias = zeros<Real>(sq, sk);
    for (size_t i = 0; i < sq; i++) {
      if (lse[i] == -kInfinity) continue;
      Real delta = dot(dout[i], out[i]) - dlse[i];
      dsink -= std::exp(sink - lse[i]) * delta;
      for (size_t j = 0; j < sk; j++) {
        Real z = keep ? keep(i, j) : 1;
        Real ds = p[i][j] * (z * dot(dout[i], v[j]) - delta), dx = ds * slopes_of_softcap[i][j] * scale;
        dbias[i][j] = ds;
        Real kept = factor(backward_factors, p[i][j] * z);
        for (size_t d = 0; d < dv[j].size(); d++) dv[j][d] += kept * dout[i][d];
        dx = factor(backward_factors, dx);
        for (size_t d = 0; d < dim; d++) {
          dq[i][d] += dx * k[j][d];
          dk[j][d] += dx * q[i][d];
        }
      }
    }
  }
};

}  // namespace test
}  // namespace fastgpt
