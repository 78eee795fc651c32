// Merges attention over two disjoint sets of keys, forward and backward, one row (a query of a head) at a
// time.
//
//   lse = log(exp(lse_a) + exp(lse_b))
//   w_a = exp(lse_a - lse) = 1 / (1 + exp(lse_b - lse_a)),  w_b = exp(lse_b - lse)
//   out = w_a out_a + w_b out_b
//
// The (m, l, acc) merge of Flash-Decoding (Dao et al. 2023), of finished states: FlashInfer's merge_state (Ye
// et al. 2025, arXiv:2501.01005).
//
// out_a, out_b, out, dout, dout_a, dout_b (batch, seqlen, nheads, headdim_v) in fp32, bf16 or fp16, any
// strides whose last is 1; lse_a, lse_b, lse, dlse, dlse_a, dlse_b (batch, nheads, seqlen) fp32, any strides.
// All arithmetic is fp32, and storage is rounded once. The weights come from the difference of lse_a and
// lse_b, which is exact where they are close, in backward too.
//
// A state of weight 0 (lse -inf: it saw no key) is not read; where both have none, out = 0, lse = -inf and
// every gradient is 0. One unit of work owns a number of queries, all their heads, that depends on the shape
// alone; each row is computed by itself, so the bits depend neither on the number of threads nor on the
// batch. Error bounds: tests/test_merge.py::test_parity.

struct MergeWeights {
  float a, b, lse;
};

FASTGPT_INLINE MergeWeights merge_weights(float lse_a, float lse_b) {
  if (lse_a == -kInf && lse_b == -kInf) return {0.0f, 0.0f, -kInf};
  bool a_is_high = lse_a > lse_b;
  float high = a_is_high ? lse_a : lse_b, low = a_is_high ? lse_b : lse_a;
  float ratio = __builtin_expf(low - high);
  float of_high = 1.0f / (1.0f + ratio), of_low = ratio * of_high;
  return {a_is_high ? of_high : of_low, a_is_high ? of_low : of_high, high + __builtin_log1pf(ratio)};
}

// Element (b, h, i) of a (batch, nheads, seqlen) tensor.
FASTGPT_INLINE float& lse_element(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  return *rows_of<float>(t, b, h, i)[0];
}

// n elements of a state's row, zeros if its weight is 0.
template <class T>
FASTGPT_INLINE vf load_state(float weight, const T* row, int64_t n) {
  return weight == 0.0f ? vf{} : load_upto(row, n);
}

// Calls body(b, h, i) for every row.
template <class Params, class Body>
FASTGPT_INLINE void for_each_row(const Params& p, const Body& body) {
  int64_t unit_queries = max(1, kUnitElements / max(1, p.nheads * p.headdim_v));
  int64_t queries = p.batch * p.seqlen, units = (queries + unit_queries - 1) / unit_queries;
  parallel_units(units, min(units, p.num_threads), [&](int64_t unit, int64_t) {
    int64_t end = min(queries, (unit + 1) * unit_queries);
    for (int64_t q = unit * unit_queries; q < end; q++)
      for (int64_t h = 0; h < p.nheads; h++) body(q / p.seqlen, h, q % p.seqlen);
  });
}

template <class T>
struct MergeForward {
  const MergeParams& p;

  void run() {
    for_each_row(p, [&](int64_t b, int64_t h, int64_t i) { merge(b, h, i); });
  }

  FASTGPT_INLINE void merge(int64_t b, int64_t h, int64_t i) {
    const T *out_a = rows_of<const T>(p.out_a, b, h, i)[0], *out_b = rows_of<const T>(p.out_b, b, h, i)[0];
    T* out = rows_of<T>(p.out, b, h, i)[0];
    MergeWeights w = merge_weights(lse_element(p.lse_a, b, h, i), lse_element(p.lse_b, b, h, i));
    for_each_vector(p.headdim_v, [&](int64_t d, int64_t n, int) {
      store_upto(out + d, load_state(w.a, out_a + d, n) * w.a + load_state(w.b, out_b + d, n) * w.b, n);
    });
    lse_element(p.lse, b, h, i) = w.lse;
  }
};

// With d w_a / d lse_a = w_a (1 - w_a) = w_a w_b = -d w_b / d lse_a, and d lse / d lse_a = w_a:
//   dout_a = w_a dout,  dlse_a = w_a dlse + w_a w_b s,  s = sum over d of dout_d (out_a - out_b)_d
//   dout_b = w_b dout,  dlse_b = w_b dlse - w_a w_b s
// which is w_a (dlse + sum of dout (out_a - out)), as out_a - out = w_b (out_a - out_b), without the rounding
// of out.
template <class T>
struct MergeBackward {
  const MergeBackwardParams& p;

  void run() {
    for_each_row(p, [&](int64_t b, int64_t h, int64_t i) { differentiate(b, h, i); });
  }

  FASTGPT_INLINE void differentiate(int64_t b, int64_t h, int64_t i) {
    const T *out_a = rows_of<const T>(p.out_a, b, h, i)[0], *out_b = rows_of<const T>(p.out_b, b, h, i)[0];
    const T* dout = rows_of<const T>(p.dout, b, h, i)[0];
    T *dout_a = rows_of<T>(p.dout_a, b, h, i)[0], *dout_b = rows_of<T>(p.dout_b, b, h, i)[0];
    MergeWeights w = merge_weights(lse_element(p.lse_a, b, h, i), lse_element(p.lse_b, b, h, i));
    vf sums[kSums] = {};
    for_each_vector(p.headdim_v, [&](int64_t d, int64_t n, int s) {
      vf dy = load_upto(dout + d, n);
      sums[s] += dy * (load_state(w.a, out_a + d, n) - load_state(w.b, out_b + d, n));
      store_upto(dout_a + d, w.a == 0.0f ? vf{} : dy * w.a, n);
      store_upto(dout_b + d, w.b == 0.0f ? vf{} : dy * w.b, n);
    });
    float dlse = p.dlse.data ? lse_element(p.dlse, b, h, i) : 0.0f, shift = total(sums);
    lse_element(p.dlse_a, b, h, i) = w.a == 0.0f ? 0.0f : w.a * (dlse + w.b * shift);
    lse_element(p.dlse_b, b, h, i) = w.b == 0.0f ? 0.0f : w.b * (dlse - w.a * shift);
  }
};
