// Attention over a KV cache: append, rotary embedding, quantised caches, attention itself (decode.h, and
// attention_forward.h for many rows).

#include <algorithm>
#include <cstring>

#include "reference.h"
#include "tests.h"

namespace fastgpt {
namespace test {
namespace {

typedef std::vector<int32_t> Lengths;

struct Case {
  const char* name;
  int64_t sq, heads, heads_k, d, dv;
  Lengths lengths;  // before the append, padding included
  int64_t added = 0, left = -1, right = -1, splits = 0, page = 0;
  CacheType type = CacheType::same;
  bool scale_by_batch = false;
  int64_t rotary_dim = 0;
  bool interleaved = false, rotary_fp32 = true;
  float softcap = 0;
  bool alibi = false, sink = false;
  Lengths sequences = {}, pad = {};  // which of the cache's sequences; where their keys begin
};

// Parts have 256 keys, blocks 64; more than 16 rows (queries times heads of a group) are packed.
const Case kCases[] = {
    {"one key", 1, 1, 1, 1, 1, {1}},
    {"heads of their own", 1, 3, 3, 64, 33, {70, 1, 65}},
    {"grouped heads", 1, 6, 2, 40, 64, {129, 31}},
    {"wide heads", 1, 2, 1, 256, 255, {37}},
    {"several parts", 1, 4, 2, 24, 20, {700, 256, 257}},
    {"splits", 1, 2, 1, 16, 16, {300, 17, 5}, .splits = 4},
    {"a sequence without keys", 1, 2, 1, 16, 16, {0, 40}, .splits = 3},
    {"several queries, fewer keys: empty rows", 4, 6, 2, 16, 9, {90, 2}, .right = 0},
    {"window", 3, 2, 2, 16, 16, {400, 20}, .left = 30, .right = 0},
    {"softcap, ALiBi, sink",
     2,
     4,
     2,
     16,
     16,
     {100, 0},
     .right = 0,
     .softcap = 2,
     .alibi = true,
     .sink = true},
    {"append", 2, 2, 2, 19, 35, {60, 0}, .added = 2, .right = 0},
    {"append more than is asked about", 1, 2, 1, 16, 16, {60, 3}, .added = 5, .right = 0},
    {"paged", 1, 4, 2, 32, 17, {100, 3, 64}, .added = 1, .page = 16},
    {"paged, pages of one key", 2, 2, 2, 9, 9, {20, 7}, .added = 2, .right = 0, .page = 1},
    {"rotary, halves", 2, 4, 2, 24, 16, {30, 5}, .added = 2, .right = 0, .rotary_dim = 24},
    {"rotary, neighbours, in part",
     2,
     2,
     1,
     40,
     8,
     {30, 5},
     .added = 3,
     .rotary_dim = 18,
     .interleaved = true,
     .rotary_fp32 = false},
    {"rotary, paged", 1, 2, 1, 256, 8, {30, 5}, .added = 1, .right = 0, .page = 8, .rotary_dim = 256},
    {"int8", 1, 4, 2, 33, 64, {150, 20}, .added = 1, .type = CacheType::int8},
    {"int8, paged, rotary",
     1,
     2,
     1,
     32,
     32,
     {40, 9},
     .added = 2,
     .page = 8,
     .type = CacheType::int8,
     .scale_by_batch = true,
     .rotary_dim = 32},
    {"e4m3", 1, 4, 2, 33, 64, {150, 20}, .added = 1, .type = CacheType::e4m3},
    {"e4m3, many queries",
     20,
     2,
     2,
     16,
     40,
     {60, 19},
     .added = 1,
     .right = 0,
     .type = CacheType::e4m3,
     .scale_by_batch = true},
    {"other sequences of the cache, padded",
     1,
     2,
     1,
     16,
     16,
     {50, 31, 7},
     .added = 1,
     .right = 0,
     .sequences = {3, 0, 2},
     .pad = {4, 30, 0}},
    {"many queries", 40, 2, 2, 20, 12, {70, 90}, .added = 40, .right = 0, .sink = true},
    {"many queries, paged, padded, rotary",
     9,
     4,
     2,
     16,
     33,
     {30, 50},
     .added = 9,
     .left = 20,
     .right = 0,
     .page = 16,
     .rotary_dim = 8,
     .interleaved = true,
     .softcap = 3,
     .alibi = true,
     .pad = {0, 11}},
};

struct Call {
  const Case& c;
  Storage type, cache_type;
  int64_t batch = c.lengths.size();
  int64_t longest = *std::max_element(c.lengths.begin(), c.lengths.end()) + c.added;
  int64_t blocks = c.page ? (longest + c.page - 1) / c.page : 0;  // of a sequence, at most
  Lengths table;                                                  // (batch, blocks)
  Array q = Array::normal(type, {batch, c.sq, c.heads, c.d});
  Array k_new = Array::normal(type, {batch, c.added, c.heads_k, c.d});
  Array v_new = Array::normal(type, {batch, c.added, c.heads_k, c.dv});
  Shape scale_shape = {c.scale_by_batch ? batch : 1, 1, 1, c.heads_k};
  Array k_scale = Array::normal(Storage::f32, scale_shape, Array::contiguous, 0.02);
  Array v_scale = Array::normal(Storage::f32, scale_shape, Array::contiguous, 0.02);
  Array slopes = Array::normal(Storage::f32, {1, 1, 1, c.heads}, Array::contiguous, 0.1);
  Array sink = Array::normal(Storage::f32, {1, 1, 1, c.heads}, Array::contiguous);
  Storage rotary_type = c.rotary_fp32 ? Storage::f32 : type;
  Shape rotary_shape = {1, 1, longest + c.sq, c.rotary_dim / 2};
  Array cos = Array::normal(rotary_type, rotary_shape, Array::contiguous);
  Array sin = Array::normal(rotary_type, rotary_shape, Array::contiguous);
  float scale = 1 / std::sqrt(static_cast<float>(c.d));

  Call(const Case& the_case, Storage storage) : c(the_case), type(storage) {
    cache_type = c.type == CacheType::int8 ? Storage::int8 : c.type == CacheType::e4m3 ? Storage::e4m3 : type;
    // Pages in any order; entries behind a sequence's keys point nowhere.
    Lengths pages(batch * blocks);
    for (size_t i = 0; i < pages.size(); i++) pages[i] = static_cast<int32_t>(i);
    std::shuffle(pages.begin(), pages.end(), generator);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t i = 0; i < blocks; i++)
        table.push_back(i * c.page < c.lengths[b] + c.added ? pages[b * blocks + i] : INT32_MAX);
  }

  bool quantised() const { return c.type != CacheType::same; }
  int64_t padding(int64_t b) const { return c.pad.empty() ? 0 : c.pad[b]; }
  // Where row r of sequence b is in a cache: indices of its first two axes.
  std::pair<int64_t, int64_t> place(int64_t b, int64_t r) const {
    if (c.page) return {table[b * blocks + r / c.page], r % c.page};
    return {c.sequences.empty() ? b : c.sequences[b], r};
  }
  double scale_of(const Array& scales, int64_t b, int64_t h) const {
    return quantised() ? scales.get(c.scale_by_batch ? b : 0, 0, 0, h) : 1;
  }

  // A cache with the keys that every sequence has; NaN behind them.
  Array cache(int64_t dim, const Array& scales) const {
    Shape shape = {c.page ? batch * blocks : batch + 1, c.page ? c.page : longest, c.heads_k, dim};
    Array cache(cache_type, shape);
    for (int64_t b = 0; b < batch; b++)
      for_each({1, c.lengths[b], c.heads_k, dim}, [&](int64_t, int64_t r, int64_t h, int64_t d) {
        auto [first, second] = place(b, r);
        cache.set(first, second, h, d, random_normal() / scale_of(scales, b, h));
      });
    return cache;
  }
};

// Element d of head h of a token at a position, rotated.
template <class Real>
Real rotated(const Call& call, const Array& x, int64_t b, int64_t token, int64_t h, int64_t d,
             int64_t position) {
  int64_t half = call.c.rotary_dim / 2, pair = call.c.interleaved ? d / 2 : d % (half ? half : 1);
  auto at = [&](int64_t i) { return static_cast<Real>(x.get(b, token, h, i)); };
  if (d >= 2 * half) return at(d);
  Real cos = static_cast<Real>(call.cos.get(0, 0, position, pair));
  Real sin = static_cast<Real>(call.sin.get(0, 0, position, pair));
  Real x1 = at(call.c.interleaved ? 2 * pair : pair),
       x2 = at(call.c.interleaved ? 2 * pair + 1 : pair + half);
  bool first = call.c.interleaved ? d % 2 == 0 : d < half;
  return first ? x1 * cos - x2 * sin : x2 * cos + x1 * sin;
}

// What the queries and the new rows of the caches have to be.
template <class Real>
struct Tokens {
  Dense<Real> q, k, v;

  explicit Tokens(const Call& call) : q(call.q.shape), k(call.k_new.shape), v(call.v_new.shape) {
    const Case& c = call.c;
    bool positioned = c.left >= 0 || c.right >= 0;  // else all queries are where the first new token is
    for_each(q.shape, [&](int64_t b, int64_t i, int64_t h, int64_t d) {
      q(b, i, h, d) = rotated<Real>(call, call.q, b, i, h, d, c.lengths[b] + (positioned ? i : 0));
    });
    for_each(k.shape, [&](int64_t b, int64_t t, int64_t h, int64_t d) {
      Real x = rotated<Real>(call, call.k_new, b, t, h, d, c.lengths[b] + t);
      k(b, t, h, d) = quantise(call, call.k_scale, b, h, x);
    });
    for_each(v.shape, [&](int64_t b, int64_t t, int64_t h, int64_t d) {
      v(b, t, h, d) = quantise(call, call.v_scale, b, h, static_cast<Real>(call.v_new.get(b, t, h, d)));
    });
  }
  // The plain computation rounds to the type of the tokens, and then divides by the scale.
  static Real quantise(const Call& call, const Array& scales, int64_t b, int64_t h, Real x) {
    if (!call.quantised()) return x;
    if (sizeof(Real) == sizeof(float)) x = static_cast<Real>(rounded(call.type, x));
    Real limit = call.cache_type == Storage::int8 ? 127 : 448;
    return std::min(std::max(x / static_cast<Real>(call.scale_of(scales, b, h)), -limit), limit);
  }
};

// Attention of the queries over the caches, both as the kernel left them.
template <class Real>
struct Results {
  Dense<Real> out, lse;

  Results(const Call& call, const Array& q, const Array& k_cache, const Array& v_cache)
      : out({call.batch, call.c.sq, call.c.heads, call.c.dv}), lse({1, call.batch, call.c.heads, call.c.sq}) {
    const Case& c = call.c;
    for (int64_t b = 0; b < call.batch; b++)
      for (int64_t h = 0; h < c.heads; h++) {
        int64_t h_k = h / (c.heads / c.heads_k), first = call.padding(b),
                keys = c.lengths[b] + c.added - first;
        auto rows = [&](const Array& cache, const Array& scales) {
          Matrix<Real> m = zeros<Real>(keys, cache.shape[3]);
          for (int64_t j = 0; j < keys; j++)
            for (int64_t d = 0; d < cache.shape[3]; d++) {
              auto [block, row] = call.place(b, first + j);
              m[j][d] = static_cast<Real>(cache.get(block, row, h_k, d)) *
                        static_cast<Real>(call.scale_of(scales, b, h_k));
            }
          return m;
        };
        Head<Real> head;
        head.q = zeros<Real>(c.sq, c.d);
        for (int64_t i = 0; i < c.sq; i++)
          for (int64_t d = 0; d < c.d; d++) head.q[i][d] = static_cast<Real>(q.get(b, i, h, d));
        head.k = rows(k_cache, call.k_scale);
        head.v = rows(v_cache, call.v_scale);
        head.storage = call.type;
        head.left = c.left, head.right = c.right;
        head.scale = call.scale, head.softcap = c.softcap;
        head.slope = c.alibi ? static_cast<Real>(call.slopes.get(0, 0, 0, h)) : 0;
        head.sink = c.sink ? static_cast<Real>(call.sink.get(0, 0, 0, h)) : -kInfinity;
        head.forward();
        for (int64_t i = 0; i < c.sq; i++) {
          lse(0, b, h, i) = head.lse[i];
          for (size_t d = 0; d < head.out[i].size(); d++) out(b, i, h, d) = head.out[i][d];
        }
      }
  }
};

struct Outputs {
  Array q, k_cache, v_cache, out, lse;

  // The caches are copies of those given.
  Outputs(const Call& call, const Array& k, const Array& v, int threads)
      : q(call.q),
        k_cache(copy(k)),
        v_cache(copy(v)),
        out(call.type, {call.batch, call.c.sq, call.c.heads, call.c.dv}),
        lse(Storage::f32, {1, call.batch, call.c.heads, call.c.sq}, Array::contiguous) {
    const Case& c = call.c;
    if (c.rotary_dim) q = Array(call.type, call.q.shape);
    Lengths used = c.lengths;
    for (int32_t& n : used) n += static_cast<int32_t>(c.added);
    Integers lengths(used), sequences(c.sequences), pad(c.pad), table(call.table);
    auto floats = [](bool given, const Array& t) {
      return given ? static_cast<const float*>(t.data()) : nullptr;
    };
    DecodeParams p{};
    p.dtype = static_cast<DType>(call.type);
    p.batch = call.batch, p.seqlen_q = c.sq, p.seqlen_k = call.longest, p.nheads = c.heads;
    p.nheads_k = c.heads_k, p.headdim = c.d, p.headdim_v = c.dv;
    p.q = q.tensor(), p.k = k_cache.tensor(), p.v = v_cache.tensor(), p.out = out.tensor();
    p.lse = static_cast<float*>(lse.data());
    p.softmax_scale = call.scale;
    p.window_left = c.left, p.window_right = c.right;
    p.num_threads = threads;
    p.seqused_k = lengths.data(), p.leftpad_k = pad.data();
    p.softcap = c.softcap;
    p.alibi_slopes = floats(c.alibi, call.slopes), p.sink = floats(c.sink, call.sink);
    p.seqlen_new = c.added;
    p.k_new = call.k_new.tensor(), p.v_new = call.v_new.tensor();
    p.num_splits = c.splits;
    p.cache_batch_idx = sequences.data();
    p.block_table = table.data(), p.block_table_stride = call.blocks, p.page_size = c.page;
    p.cache_type = c.type;
    p.k_descale = floats(call.quantised(), call.k_scale),
    p.v_descale = floats(call.quantised(), call.v_scale);
    p.descale_batch_stride = call.k_scale.strides[0];
    if (c.rotary_dim) p.rotary_cos = call.cos.data(), p.rotary_sin = call.sin.data();
    p.rotary_dtype = static_cast<DType>(call.rotary_type), p.rotary_dim = c.rotary_dim;
    p.rotary_interleaved = c.interleaved;
    p.q_source = call.q.tensor();
    kernels->decode(p);
  }

  static Array copy(const Array& source) {
    Array array = source;
    array.memory = std::make_shared<Guarded>(source.memory->size());
    std::memcpy(array.data(), source.data(), source.memory->size());
    return array;
  }
};

// The new rows of a cache, as a tensor like what was appended; `before` gets them too, and must then be
// equal.
Array take_new_rows(const Call& call, const Array& cache, Array before, const char* what) {
  const Case& c = call.c;
  Array rows(cache.storage, {call.batch, c.added, c.heads_k, cache.shape[3]});
  for_each(rows.shape, [&](int64_t b, int64_t t, int64_t h, int64_t d) {
    auto [first, second] = call.place(b, c.lengths[b] + t);
    std::memcpy(rows.at(b, t, h, d), cache.at(first, second, h, d), size_of(cache.storage));
    std::memcpy(before.at(first, second, h, d), cache.at(first, second, h, d), size_of(cache.storage));
  });
  expect(!std::memcmp(before.data(), cache.data(), cache.memory->size()),
         std::string(what) + ": wrote other rows than the new ones");
  return rows;
}

void run(const Case& c, Storage type) {
  Call call(c, type);
  Array k = call.cache(c.d, call.k_scale), v = call.cache(c.dv, call.v_scale);
  Outputs got(call, k, v, 1), threaded(call, k, v, 3);
  Tokens<double> exact_tokens(call);
  Tokens<float> plain_tokens(call);
  auto appended = [&](const char* what, Array Outputs::* cache, const Array& before,
                      const Dense<float>& plain, const Dense<double>& exact) {
    check(what, take_new_rows(call, got.*cache, Outputs::copy(before), what),
          take_new_rows(call, threaded.*cache, Outputs::copy(before), what), plain, exact, kOutput);
  };
  check("q", got.q, threaded.q, plain_tokens.q, exact_tokens.q, kOutput);
  appended("k_cache", &Outputs::k_cache, k, plain_tokens.k, exact_tokens.k);
  appended("v_cache", &Outputs::v_cache, v, plain_tokens.v, exact_tokens.v);
  Results<double> exact(call, got.q, got.k_cache, got.v_cache);
  Results<float> plain(call, got.q, got.k_cache, got.v_cache);
  check("out", got.out, threaded.out, plain.out, exact.out, kOutput);
  check("lse", got.lse, threaded.lse, plain.lse, exact.lse, kOutput);
}

}  // namespace

void test_decode() {
  for (const Case& c : kCases)
    for (Storage type : kDTypes) {
      begin_case("decode", c.name, type);
      run(c, type);
    }
}

}  // namespace test
}  // namespace fastgpt
