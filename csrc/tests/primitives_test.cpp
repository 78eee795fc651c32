// simd.h and its like against scalar definitions; the mask against its own.

#include "primitives.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fastgpt/mask.h"
#include "reference.h"
#include "tests.h"

namespace fastgpt {
namespace test {
namespace {

// What is stored in whole vectors and in part, and loaded again, lies directly before memory that faults.
std::vector<float> widened(const Primitives::Conversions& conversions, Storage storage,
                           const std::vector<uint32_t>& bits) {
  Guarded source(bits.size() * size_of(storage)), target(bits.size() * sizeof(float));
  for (size_t i = 0; i < bits.size(); i++)
    std::memcpy(source.data + i * size_of(storage), &bits[i], size_of(storage));
  std::vector<float> values(bits.size());
  conversions.widen(source.data, bits.size(), reinterpret_cast<float*>(target.data));
  std::memcpy(values.data(), target.data, bits.size() * sizeof(float));
  return values;
}

std::vector<uint32_t> narrowed(void (*narrow)(const float*, int64_t, void*), Storage storage,
                               const std::vector<float>& values) {
  Guarded source(values.size() * sizeof(float)), target(values.size() * size_of(storage));
  std::memcpy(source.data, values.data(), values.size() * sizeof(float));
  narrow(reinterpret_cast<const float*>(source.data), values.size(), target.data);
  std::vector<uint32_t> bits(values.size());
  for (size_t i = 0; i < bits.size(); i++)
    std::memcpy(&bits[i], target.data + i * size_of(storage), size_of(storage));
  return bits;
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// All patterns are loaded. Stored are all numbers, those halfway between neighbours, and those next to
// either.
void test_conversions(const Primitives::Conversions& conversions, Storage storage) {
  std::vector<uint32_t> patterns(storage == Storage::int8 || storage == Storage::e4m3 ? 1 << 8 : 1 << 16);
  for (size_t i = 0; i < patterns.size(); i++) patterns[i] = static_cast<uint32_t>(i);
  std::vector<float> values = widened(conversions, storage, patterns);
  int wrong = 0;
  for (size_t i = 0; i < patterns.size(); i++) wrong += !same(values[i], decode(storage, patterns[i]));
  expect(!wrong, "load: " + std::to_string(wrong) + " patterns wrong");

  std::vector<float> given = {NAN, -NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, -1e-45f, 0.0f, -0.0f};
  std::vector<float> numbers;
  for (float x : values)
    if (std::isfinite(x)) numbers.push_back(x);
  std::sort(numbers.begin(), numbers.end());
  for (size_t i = 0; i < numbers.size(); i++) {
    float next = i + 1 < numbers.size() ? numbers[i + 1] : 2 * numbers[i];
    for (float x : {numbers[i], numbers[i] + (next - numbers[i]) / 2})
      for (float y : {x, std::nextafter(x, INFINITY), std::nextafter(x, -INFINITY)}) given.push_back(y);
  }
  auto narrow = conversions.narrow ? conversions.narrow : conversions.quantise;
  std::vector<uint32_t> stored = narrowed(narrow, storage, given);
  float first_wrong = 0;
  wrong = 0;
  for (size_t i = 0; i < given.size(); i++)
    if (!same(decode(storage, stored[i]), rounded(storage, given[i])))
      if (!wrong++) first_wrong = given[i];
  expect(!wrong,
         "store: " + std::to_string(wrong) + " numbers wrong, the first " + std::to_string(first_wrong));
}

// Of 1 to 2 vectors: what is loaded and stored in part.
void test_parts(const Primitives::Conversions& conversions, Storage storage) {
  for (int64_t n = 0; n <= 2 * primitives->lanes; n++) {
    std::vector<uint32_t> bits(n);
    for (uint32_t& x : bits) x = encode(storage, std::nearbyint(50 * random_normal()));
    std::vector<float> values = widened(conversions, storage, bits);
    for (int64_t i = 0; i < n; i++) expect(same(values[i], decode(storage, bits[i])), "load in part");
    auto narrow = conversions.narrow ? conversions.narrow : conversions.quantise;
    expect(narrowed(narrow, storage, values) == bits, "store in part");
  }
}

template <class Function>
void for_each_number(double low, double high, double step, void (*function)(float*), const Function& body) {
  std::vector<float> given(primitives->lanes), got;
  for (double x = low; x < high; x += step * primitives->lanes) {
    for (size_t i = 0; i < given.size(); i++)
      given[i] =
          static_cast<float>(std::min(high, x + step * (i + std::uniform_real_distribution<>()(generator))));
    got = given;
    function(got.data());
    for (size_t i = 0; i < given.size(); i++) body(given[i], got[i]);
  }
}

float of_one(void (*function)(float*), float x) {
  std::vector<float> vector(primitives->lanes, x);
  function(vector.data());
  return vector.back();
}

void test_functions() {
  double worst = 0, below = 0;
  for_each_number(-125.9, 127.9, 1e-3, primitives->exp2, [&](float x, float got) {
    worst = std::max(worst, std::fabs(got / std::exp2(static_cast<double>(x)) - 1));
  });
  expect(worst < 1.04e-7, "exp2: relative error " + std::to_string(1e9 * worst) + "e-9");
  for_each_number(-150, -125.9, 1e-3, primitives->exp2, [&](float x, float got) {
    below = std::max(below, std::fabs(got - std::exp2(static_cast<double>(x))));
  });
  expect(below < 1.1 * std::exp2(-125.9), "exp2: wrong below the normal numbers");
  expect(of_one(primitives->exp2, 0) == 1, "exp2(0)");
  expect(std::isnan(of_one(primitives->exp2, NAN)), "exp2(NaN)");
  for (float x : {-150.001f, -200.0f, -1e30f, -INFINITY})
    expect(same(of_one(primitives->exp2, x), 0), "exp2 of little");

  worst = 0;
  auto compare_tanh = [&](float x, float got) {
    double want = std::tanh(static_cast<double>(x));
    worst = std::max(worst, want == 0 ? std::fabs(got) : std::fabs(got / want - 1));
  };
  for_each_number(-12, 12, 1e-3, primitives->tanh, compare_tanh);
  for_each_number(-0.01, 0.01, 1e-6, primitives->tanh, compare_tanh);
  expect(worst < 4e-7, "tanh: relative error " + std::to_string(1e9 * worst) + "e-9");
  expect(of_one(primitives->tanh, INFINITY) == 1 && of_one(primitives->tanh, -INFINITY) == -1, "tanh(inf)");
  expect(std::isnan(of_one(primitives->tanh, NAN)), "tanh(NaN)");
}

void test_shuffles() {
  int n = primitives->lanes;
  std::vector<float> square(n * n), transposed, sums;
  for (float& x : square) x = static_cast<float>(random_integer(-1000, 1000));
  transposed = sums = square;
  primitives->transpose(transposed.data());
  primitives->sums(sums.data());
  for (int i = 0; i < n; i++) {
    const float* row = square.data() + i * n;
    for (int j = 0; j < n; j++) expect(transposed[j * n + i] == row[j], "transpose");
    float sum = 0;
    for (int j = 0; j < n; j++) sum += row[j];  // of integers: exact
    expect(sums[i] == sum, "sums");
    expect(primitives->horizontal_sum(row) == sum, "horizontal_sum");
    expect(primitives->horizontal_max(row) == *std::max_element(row, row + n), "horizontal_max");

    std::vector<float> with_nan(row, row + n), other(n, 5.0f);
    with_nan[i] = NAN;
    float top = primitives->horizontal_max(with_nan.data());
    expect(std::isnan(top) || std::count(with_nan.begin(), with_nan.end(), top), "horizontal_max with a NaN");
    primitives->max(other.data(), with_nan.data());
    expect(std::isnan(with_nan[i]), "max(5, NaN)");
    primitives->max(with_nan.data(), other.data());
    expect(other[i] == 5.0f, "max(NaN, 5)");
  }
}

void test_keep_elements() {
  for (double probability : {0.0001, 0.5, 0.9999}) {
    Dropout p;
    set_dropout(p, probability);
    uint32_t c1 = static_cast<uint32_t>(generator()), c2 = static_cast<uint32_t>(generator());
    int64_t first = 4 * random_integer(0, 1 << 20);
    std::vector<float> keep(4 * primitives->lanes);
    primitives->keep_elements(p, first, c1, c2, keep.data());
    for (size_t i = 0; i < keep.size(); i++)
      expect(keep[i] == (dropout_factor(p, first + i, c1, c2) ? 1.0f : 0.0f), "keep_elements");
  }
}

void test_mask() {
  for (int repeat = 0; repeat < 200; repeat++) {
    int64_t sq = random_integer(1, 9), sk = random_integer(0, 9);
    int64_t left = random_integer(-1, 10), right = random_integer(-1, 10);
    Mask mask(sq, sk, left, right);
    auto visible = [&](int64_t i, int64_t j) {
      int64_t diagonal = i + sk - sq;
      return (left < 0 || j >= diagonal - left) && (right < 0 || j <= diagonal + right);
    };
    for (int64_t i = 0; i < sq; i++)
      for (int64_t j = 0; j < sk; j++) {
        expect(visible(i, j) == (j >= mask.begin(i) && j < mask.end(i)), "interval of keys");
        if (visible(i, j))
          expect(i >= mask.first_query(j) && i < mask.last_query(j, sq), "interval of queries");
      }
  }
}

}  // namespace

void test_primitives() {
  const std::pair<Storage, const Primitives::Conversions*> types[] = {{Storage::bf16, &primitives->bf16},
                                                                      {Storage::f16, &primitives->f16},
                                                                      {Storage::int8, &primitives->int8},
                                                                      {Storage::e4m3, &primitives->e4m3}};
  for (auto [storage, conversions] : types) {
    begin_case("primitives", "conversion", storage);
    test_conversions(*conversions, storage);
    test_parts(*conversions, storage);
  }
  begin_case("primitives", "the rest", Storage::f32);
  test_parts(primitives->f32, Storage::f32);
  test_functions();
  test_shuffles();
  test_keep_elements();
  test_mask();
}

}  // namespace test
}  // namespace fastgpt
