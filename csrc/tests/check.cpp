#include "check.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>

namespace fastgpt {
namespace test {

const Kernels* kernels;
const Primitives* primitives;
bool has_matrix_unit;
int draws_to_come;
std::string context;
std::mt19937_64 generator;
int failures;

void fail(const std::string& what) {
  failures++;
  std::printf("FAILED %s: %s\n", context.c_str(), what.c_str());
}

void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

int64_t random_integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

double random_normal() { return std::normal_distribution<double>()(generator); }

// --- storage types ---

namespace {

struct Format {
  int exponent_bits, fraction_bits;
  bool has_infinity;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t sign() const { return 1u << (exponent_bits + fraction_bits); }
  // The first pattern that is not a finite number.
  uint32_t end() const { return sign() - (has_infinity ? 1u << fraction_bits : 1u); }
};

Format format(Storage storage) {
  switch (storage) {
    case Storage::f32:
      return {8, 23, true};
    case Storage::bf16:
      return {8, 7, true};
    case Storage::f16:
      return {5, 10, true};
    default:
      return {4, 3, false};
  }
}

}  // namespace

int64_t size_of(Storage storage) {
  if (storage == Storage::f32) return 4;
  return storage == Storage::bf16 || storage == Storage::f16 ? 2 : 1;
}

double decode(Storage storage, uint32_t bits) {
  if (storage == Storage::boolean) return bits != 0;
  if (storage == Storage::int8) return static_cast<int8_t>(bits);
  Format f = format(storage);
  uint32_t magnitude = bits & (f.sign() - 1), exponent = magnitude >> f.fraction_bits;
  uint32_t implicit = 1u << f.fraction_bits, fraction = magnitude & (implicit - 1);
  double size;
  if (magnitude >= f.end())
    size = f.has_infinity && fraction == 0 ? kInfinity : std::nan("");
  else if (exponent == 0)
    size = std::ldexp(fraction, 1 - f.bias() - f.fraction_bits);
  else
    size = std::ldexp(implicit + fraction, static_cast<int>(exponent) - f.bias() - f.fraction_bits);
  return bits & f.sign() ? -size : size;
}

uint32_t encode(Storage storage, double x) {
  if (storage == Storage::boolean) return x != 0;
  if (storage == Storage::int8)
    return static_cast<uint8_t>(std::isnan(x) ? 0 : std::lrint(std::clamp(x, -127.0, 127.0)));
  Format f = format(storage);
  uint32_t sign = std::signbit(x) ? f.sign() : 0, end = f.end();
  if (std::isnan(x)) return f.sign() - 1;
  uint32_t largest = f.has_infinity ? end : end - 1;
  if (std::isinf(x)) return sign | largest;
  // n steps of the size that numbers of this exponent have. In subnormal numbers n is the bits; in others
  // its leading 1 adds the 1 by which the exponent's field is greater.
  int exponent = x == 0 ? 1 - f.bias() : std::max(std::ilogb(x), 1 - f.bias());
  double n = std::nearbyint(std::ldexp(std::fabs(x), f.fraction_bits - exponent));
  double bits = std::ldexp(exponent + f.bias() - 1, f.fraction_bits) + n;
  return sign | (bits >= end ? largest : static_cast<uint32_t>(bits));
}

// --- memory ---

Guarded::Guarded(int64_t bytes, int64_t alignment) : bytes_(bytes) {
  int64_t page = sysconf(_SC_PAGESIZE);
  body_ = (bytes + page - 1) / page * page;
  void* mapped = mmap(nullptr, body_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  body_begin_ = static_cast<char*>(mapped) + page;
  if (body_) mprotect(body_begin_, body_, PROT_READ | PROT_WRITE);
  std::memset(body_begin_, 0xff, body_);
  data = body_begin_ + body_ - (bytes + alignment - 1) / alignment * alignment;
}

Guarded::~Guarded() {
  auto clean = [](char* begin, char* end) {
    return std::all_of(begin, end, [](char c) { return c == '\xff'; });
  };
  expect(clean(body_begin_, data), "wrote before the beginning of a buffer");
  expect(clean(data + bytes_, body_begin_ + body_), "wrote past the end of a buffer");
  int64_t page = sysconf(_SC_PAGESIZE);
  munmap(body_begin_ - page, body_ + 2 * page);
}

void Guarded::forbid_writing() {
  if (body_) mprotect(body_begin_, body_, PROT_READ);
}

Array::Array(Storage type, const Shape& sizes, Layout layout) : storage(type), shape(sizes) {
  int order[3] = {2, 1, 0};  // from the innermost
  int64_t gap = 0;
  if (layout == any) {
    std::shuffle(order, order + 3, generator);
    gap = random_integer(0, 3);
  }
  int64_t stride = shape[3] + gap, end = 1;
  for (int axis : order) {
    strides[axis] = shape[axis] == 1 ? 0 : stride;
    stride *= shape[axis];
  }
  strides[3] = shape[3] == 1 ? 0 : 1;
  for (int axis = 0; axis < 4; axis++) end += (shape[axis] - 1) * strides[axis];
  bool empty = std::count(shape.begin(), shape.end(), 0) > 0;
  memory = std::make_shared<Guarded>(empty ? 0 : end * size_of(storage));
}

Array Array::normal(Storage storage, const Shape& shape, Layout layout, double scale) {
  Dense<float> values(shape);
  for (float& x : values.values) x = static_cast<float>(scale * random_normal());
  return of(storage, values, layout);
}

Array Array::of(Storage storage, const Dense<float>& values, Layout layout) {
  Array array(storage, values.shape, layout);
  const float* next = values.values.data();
  for_each(array.shape, [&](auto... i) { array.set(i..., *next++); });
  array.memory->forbid_writing();
  return array;
}

double Array::get(int64_t a, int64_t b, int64_t c, int64_t d) const {
  uint32_t bits = 0;
  std::memcpy(&bits, at(a, b, c, d), size_of(storage));
  return decode(storage, bits);
}

void Array::set(int64_t a, int64_t b, int64_t c, int64_t d, double x) {
  uint32_t bits = encode(storage, x);
  std::memcpy(at(a, b, c, d), &bits, size_of(storage));
}

Integers::Integers(const std::vector<int32_t>& values) {
  if (values.empty()) return;
  memory = std::make_shared<Guarded>(values.size() * sizeof(int32_t));
  std::memcpy(memory->data, values.data(), values.size() * sizeof(int32_t));
  memory->forbid_writing();
}

// --- judgement ---

// Of the draws that are judged as one: what check was called with, the case included.
struct Errors {
  double error = 0, plain_error = 0, size = 1;
};
static std::map<std::string, Errors> errors;

void check(const std::string& what, const Array& got, const Array& threaded, const Dense<float>& plain,
           const Dense<double>& exact, double factor) {
  auto& [error, plain_error, size] = errors[context + what];
  long long nans = 0, infinities = 0, next = 0;
  bool same_bits = true;
  std::vector<bool> written(got.memory->size() / size_of(got.storage));
  for_each(got.shape, [&](auto... i) {
    double x = got.get(i...), want = exact.values[next], other = rounded(got.storage, plain.values[next]);
    next++;
    written[(got.at(i...) - got.memory->data) / size_of(got.storage)] = true;
    if (std::isnan(x)) {
      nans++;
    } else if (std::isinf(want) || std::isinf(x)) {
      infinities += x != want;
    } else {
      error = std::max(error, std::fabs(x - want));
      plain_error = std::max(plain_error, std::fabs(other - want));
      size = std::max(size, std::fabs(want));
    }
    same_bits &= !std::memcmp(got.at(i...), threaded.at(i...), size_of(got.storage));
  });
  expect(same_bits, what + ": other bits than on several threads");
  double bound = factor * plain_error + 1e-5 * size;
  if (nans || infinities || (!draws_to_come && !(error <= bound))) {
    char text[200];
    std::snprintf(text, sizeof(text),
                  ": error %.3e, bound %.3e (plain %.3e); %lld NaN and %lld wrong infinities of %lld", error,
                  bound, plain_error, nans, infinities, next);
    fail(what + text);
  }
  if (!draws_to_come) errors.erase(context + what);
  const char* byte = got.memory->data;
  for (size_t e = 0; e < written.size(); e++, byte += size_of(got.storage))
    for (int64_t i = 0; i < size_of(got.storage) && !written[e]; i++)
      if (byte[i] != '\xff') return fail(what + ": wrote between the rows");
}

}  // namespace test
}  // namespace fastgpt
