// What the tests share: memory that catches reads and writes past its ends, the storage types as they are
// defined, tensors of them, and the parity rule. Nothing here knows how a kernel works.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fastgpt/params.h"

namespace fastgpt {

struct Primitives;

namespace test {

constexpr double kInfinity = __builtin_inf();

extern const Kernels* kernels;  // under test
extern const Primitives* primitives;
extern bool has_matrix_unit;  // whether the kernels multiply bf16 by one, whose factors are bf16
extern int draws_to_come;     // of the case at hand, with fresh inputs, which are judged as one
extern std::string context;   // the case at hand, for messages
extern std::mt19937_64 generator;
extern int failures;

void fail(const std::string& what);
void expect(bool condition, const std::string& what);

int64_t random_integer(int64_t low, int64_t high);  // both included
double random_normal();

// --- storage types ---

enum class Storage { f32, bf16, f16, boolean, int8, e4m3 };  // those that DType and BiasType have: as there

int64_t size_of(Storage storage);
double decode(Storage storage, uint32_t bits);
// Rounded to nearest even; saturated where there is no infinity. NaN gives some NaN, in int8 0.
uint32_t encode(Storage storage, double x);
inline double rounded(Storage storage, double x) { return decode(storage, encode(storage, x)); }

// --- memory ---

// Bytes directly before a page that faults on access, like the one before them; what is left of their own
// pages is checked at the end. All are 0xff at first: NaN in every floating type.
class Guarded {
 public:
  explicit Guarded(int64_t bytes, int64_t alignment = 1);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  void forbid_writing();
  int64_t size() const { return bytes_; }
  char* data;

 private:
  int64_t body_, bytes_;
  char* body_begin_;
};

typedef std::array<int64_t, 4> Shape;

// What a reference computes: zeros at first.
template <class Real>
struct Dense {
  Shape shape;
  std::vector<Real> values;
  explicit Dense(const Shape& s) : shape(s), values(s[0] * s[1] * s[2] * s[3]) {}
  Real& operator()(int64_t a, int64_t b, int64_t c, int64_t d) {
    return values[((a * shape[1] + b) * shape[2] + c) * shape[3] + d];
  }
};

// A tensor of four axes. The last stride is 1; axes of one element have stride 0, so that they broadcast.
class Array {
 public:
  enum Layout { contiguous, any };  // any: the other axes in any order, and gaps between the rows
  Array(Storage storage, const Shape& shape, Layout layout = any);

  // Inputs: they cannot be written.
  static Array normal(Storage storage, const Shape& shape, Layout layout = any, double scale = 1.0);
  static Array of(Storage storage, const Dense<float>& values, Layout layout = any);

  char* at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return memory->data +
           size_of(storage) * (a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]);
  }
  double get(int64_t a, int64_t b, int64_t c, int64_t d) const;
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double x);
  void* data() const { return memory->data; }
  Tensor tensor() const { return {memory->data, strides[0], strides[1], strides[2]}; }

  Storage storage;
  Shape shape, strides;
  std::shared_ptr<Guarded> memory;
};

// Calls body(a, b, c, d) for every element of a shape, the last index fastest.
template <class Body>
void for_each(const Shape& shape, const Body& body) {
  for (int64_t a = 0; a < shape[0]; a++)
    for (int64_t b = 0; b < shape[1]; b++)
      for (int64_t c = 0; c < shape[2]; c++)
        for (int64_t d = 0; d < shape[3]; d++) body(a, b, c, d);
}

// Integers behind which nothing can be read.
struct Integers {
  explicit Integers(const std::vector<int32_t>& values);
  const int32_t* data() const { return memory ? reinterpret_cast<const int32_t*>(memory->data) : nullptr; }
  std::shared_ptr<Guarded> memory;  // null if there are none
};

// --- judgement ---

constexpr double kOutput = 2, kGradient = 3;

// max|got - exact| <= factor max|plain - exact| + 1e-5 max(1, max|exact|), with plain rounded to got's type;
// infinities in the same places, no NaN, and nothing written between the elements. `threaded` is what several
// threads computed: the same bits.
void check(const std::string& what, const Array& got, const Array& threaded, const Dense<float>& plain,
           const Dense<double>& exact, double factor);

}  // namespace test
}  // namespace fastgpt
