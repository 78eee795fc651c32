// Attention of a few queries over a KV cache (Flash-Decoding, Dao et al. 2023): appends the new keys and
// values, then out = softmax(s) v as in attention_forward.h, for few rows per kv head.
//
// Caches (B, capacity, Hk, D) and (B, capacity, Hk, Dv) in fp32, bf16 or fp16, read once, where they lie:
// this kernel is bound by memory. The rows of one kv head are all query heads of its group times the
// queries, so a group costs one pass over its keys. One unit of work = one kv head and one part of its
// keys, with its own softmax state (m, l, acc) in fp32; a second pass merges the parts in order. Parts are
// kSplitKeys keys unless num_splits is given, so the bits depend neither on the threads nor on the batch.
// Nothing behind a sequence's keys is read. Many rows (a prefill) go to attention_forward.h instead.
//
// A row that sees no key: out = 0, lse = -inf. Error bound: tests/test_decode.py::test_parity.

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kDecodeBlock = 64;     // keys whose scores are held at a time
constexpr int64_t kDecodeRows = 16;      // more rows than this are attention_forward.h's work
constexpr int64_t kSerialBytes = 65536;  // less K and V than this is not worth waking a thread for

// Sums each of N vectors; lane i of the result is the sum of x[i] (N = kLanes). Each step adds the halves
// of two vectors into one.
template <int N>
FASTGPT_INLINE vf sums(vf* x) {
  typename MakeLanes<kLanes>::type lanes;
#pragma GCC unroll 16
  for (int i = 0; i < N / 2; i++)
    x[i] = interleave_low(x[i], x[i + N / 2], lanes) + interleave_high(x[i], x[i + N / 2], lanes);
  return sums<N / 2>(x);
}
template <>
FASTGPT_INLINE vf sums<1>(vf* x) {
  return x[0];
}

// The caches are two streams that the hardware does not predict (short rows, far apart, in turn).
template <class T>
FASTGPT_INLINE void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// scores[r][j] = q_r . k_j for kRows rows (of width kWidth floats, zero behind dim) and `keys` keys.
template <int kRows, class T>
void dot_rows(const float* q, int64_t width, int64_t dim, Rows<const T> k, int64_t keys, float* scores) {
  constexpr int kKeys = kLanes / kRows;
  // Loops over acc are unrolled whole, so that it stays in registers.
  for (int64_t j = 0; j < keys; j += kKeys) {
    vf acc[kLanes];
    const T* rows[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; i++) rows[i] = k[min(j + i, keys - 1)];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) acc[i] = vf{};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; i++) {
        vf ki = load(rows[i] + d);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) acc[r * kKeys + i] += ki * load(q + r * width + d);
      }
    if (d < dim)
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; i++) {
        vf ki = load_first(rows[i] + d, dim - d);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) acc[r * kKeys + i] += ki * load(q + r * width + d);
      }
    float flat[kLanes];
    store(flat, sums<kLanes>(acc));
    for (int r = 0; r < kRows; r++)
      __builtin_memcpy(scores + r * kDecodeBlock + j, flat + r * kKeys, kKeys * sizeof(float));
  }
}

// out[r][:] += sum_j probs[r][j] v_j for kRows rows, in blocks of kVectors vectors of the head dim.
template <int kRows, int kVectors, class T>
FASTGPT_INLINE void accumulate_columns(const float* probs, Rows<const T> v, int64_t d, int64_t keys,
                                       float* out, int64_t width) {
  vf acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) acc[r][i] = load(out + r * width + d + i * kLanes);
  for (int64_t j = 0; j < keys; j++) {
    const T* row = v[j] + d;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      vf vi = load(row + i * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) acc[r][i] += vi * probs[r * kDecodeBlock + j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) store(out + r * width + d + i * kLanes, acc[r][i]);
}

template <int kRows, class T>
void accumulate_rows(const float* probs, Rows<const T> v, int64_t dim, int64_t keys, float* out,
                     int64_t width) {
  constexpr int kVectors = kLanes >= 16 ? 16 / kRows : 8 / kRows;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes)
    accumulate_columns<kRows, kVectors>(probs, v, d, keys, out, width);
  for (; d + kLanes <= dim; d += kLanes) accumulate_columns<kRows, 1>(probs, v, d, keys, out, width);
  if (d < dim)
    for (int64_t j = 0; j < keys; j++) {
      vf tail = load_first(v[j] + d, dim - d);
      for (int r = 0; r < kRows; r++)
        store(out + r * width + d, load(out + r * width + d) + tail * probs[r * kDecodeBlock + j]);
    }
}

template <class T>
struct Decode {
  const DecodeParams& p;
  int64_t group = p.nheads / p.nheads_k, rows = group * p.seqlen_q;
  int64_t width = round_up(p.headdim, kLanes), width_v = round_up(p.headdim_v, kLanes);
  // Of any sequence: a shorter one may be cut into more parts than the longest is.
  int64_t parts_max =
      p.num_splits ? min(p.num_splits, p.seqlen_k) : (p.seqlen_k + kSplitKeys - 1) / kSplitKeys;
  // One part's state: acc (rows, width_v), m (rows), l (rows).
  int64_t state_size = rows * width_v + 2 * round_up(rows, kLanes);
  int64_t thread_size = round_up(rows * width + rows * kDecodeBlock, 16);
  float *states = nullptr, *workspaces = nullptr;
  bool terms = has_score_terms(p);

  void run() {
    int64_t kv_bytes = p.batch * p.nheads_k * p.seqlen_k * (p.headdim + p.headdim_v) * sizeof(T);
    int threads = kv_bytes < kSerialBytes ? 1 : p.num_threads;
    bool tiled = rows > kDecodeRows;
    int64_t units = p.batch * p.nheads_k * parts_max;
    if (!tiled) {
      states = scratch(units * state_size + threads * thread_size);
      workspaces = states + units * state_size;
    }
    int64_t append_counter = 0, unit_counter = 0, thread_counter = 0, merge_counter = 0;
#pragma omp parallel num_threads(threads)
    {
      if (p.seqlen_new) {
        for (int64_t u; (u = next_unit(&append_counter)) < p.batch * p.seqlen_new;)
          append(u / p.seqlen_new, u % p.seqlen_new);
#pragma omp barrier
      }
      if (!tiled) {
        float* workspace = workspaces + next_unit(&thread_counter) * thread_size;
        for (int64_t u; (u = next_unit(&unit_counter)) < units;) {
          int64_t head = u / parts_max;
          part(head / p.nheads_k, head % p.nheads_k, u % parts_max, states + u * state_size, workspace);
        }
#pragma omp barrier
        for (int64_t u; (u = next_unit(&merge_counter)) < p.batch * p.nheads_k;)
          merge(u / p.nheads_k, u % p.nheads_k, states + u * parts_max * state_size);
      }
    }
    if (tiled) AttentionForward<T>{p}.run();
  }

  void append(int64_t b, int64_t token) {
    int64_t position = p.keys(b) - p.seqlen_new + token;
    for (int64_t h = 0; h < p.nheads_k; h++) {
      Rows<T> k = rows_of<T>(p.k, b, h, 0), v = rows_of<T>(p.v, b, h, 0);
      __builtin_memcpy(k[position], rows_of<const T>(p.k_new, b, h, token)[0], p.headdim * sizeof(T));
      __builtin_memcpy(v[position], rows_of<const T>(p.v_new, b, h, token)[0], p.headdim_v * sizeof(T));
    }
  }

  int64_t part_keys(int64_t b) const {
    return p.num_splits ? max(1, (p.keys(b) + p.num_splits - 1) / p.num_splits) : kSplitKeys;
  }
  int64_t parts(int64_t b) const { return (p.keys(b) + part_keys(b) - 1) / part_keys(b); }

  void part(int64_t b, int64_t h_k, int64_t index, float* state, float* workspace) {
    if (index >= parts(b)) return;
    Mask mask(p.seqlen_q, p.keys(b), p.window_left, p.window_right);
    Rows<const T> k = rows_of<const T>(p.k, b, h_k, p.first_key_row(b));
    Rows<const T> v = rows_of<const T>(p.v, b, h_k, p.first_key_row(b));
    float *acc = state, *m = acc + rows * width_v, *l = m + round_up(rows, kLanes);
    float *q = workspace, *scores = q + rows * width;
    for (int64_t g = 0; g < group; g++) {
      Rows<const T> source = rows_of<const T>(p.q, b, h_k * group + g, 0);
      pack_rows(source, p.seqlen_q, p.headdim, p.softmax_scale * kLog2e, q + g * p.seqlen_q * width, width);
    }
    fill_zero(acc, rows * width_v);
    for (int64_t r = 0; r < rows; r++) m[r] = -kInf, l[r] = 0.0f;

    int64_t first = max(index * part_keys(b), mask.begin(0));
    int64_t last = min((index + 1) * part_keys(b), mask.end(p.seqlen_q - 1));
    for (int64_t j = first; j < last; j += kDecodeBlock) {
      int64_t keys = min(kDecodeBlock, last - j);
      Rows<const T> k_block{k[j], k.stride}, v_block{v[j], v.stride};
      for (int64_t i = 0; i < keys; i++) {
        prefetch_row(v_block[i], p.headdim_v);
        if (j + i + kDecodeBlock < last) prefetch_row(k_block[i + kDecodeBlock], p.headdim);
      }
      by_rows([&](auto count, int64_t r) {
        dot_rows<count.value>(q + r * width, width, p.headdim, k_block, keys, scores + r * kDecodeBlock);
      });
      for (int64_t r = 0; r < rows; r++) {
        int64_t i = r % p.seqlen_q;
        if (terms)
          add_score_terms(p, b, h_k * group + r / p.seqlen_q, i, 1, j, 0, round_up(keys, kLanes),
                          scores + r * kDecodeBlock, kDecodeBlock, nullptr);
        softmax_row(scores + r * kDecodeBlock, mask.begin(i) - j, mask.end(i) - j, keys, m[r], l[r],
                    acc + r * width_v);
      }
      by_rows([&](auto count, int64_t r) {
        accumulate_rows<count.value>(scores + r * kDecodeBlock, v_block, p.headdim_v, keys, acc + r * width_v,
                                     width_v);
      });
    }
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };
  // Calls f(Count<n>, first row) over all rows, four, two and one at a time.
  template <class F>
  FASTGPT_INLINE void by_rows(F f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f(Count<4>{}, r);
    for (; r + 2 <= rows; r += 2) f(Count<2>{}, r);
    for (; r < rows; r++) f(Count<1>{}, r);
  }

  // Online softmax of one row's scores, of which [begin, end) are visible; rescales acc if the maximum rises.
  FASTGPT_INLINE void softmax_row(float* scores, int64_t begin, int64_t end, int64_t keys, float& m, float& l,
                                  float* acc) {
    vi lanes = lane_index();
    int32_t lo = static_cast<int32_t>(max(begin, 0)), hi = static_cast<int32_t>(max(min(end, keys), 0));
    vf top = splat(m);
    for (int64_t c = 0; c < keys; c += kLanes) {
      vi index = lanes + static_cast<int32_t>(c);
      vf s = (index >= lo) & (index < hi) ? load(scores + c) : splat(-kInf);
      store(scores + c, s);
      top = max(top, s);
    }
    float new_m = m;
    for (int i = 0; i < kLanes; i++) new_m = top[i] > new_m ? top[i] : new_m;
    float reference = new_m == -kInf ? 0.0f : new_m;
    if (new_m > m) {
      float rescale = exp2(splat(m - reference))[0];
      l *= rescale;
      for (int64_t d = 0; d < width_v; d += kLanes) store(acc + d, load(acc + d) * rescale);
      m = new_m;
    }
    vf sum = vf{};
    for (int64_t c = 0; c < keys; c += kLanes) {
      vf prob = exp2(load(scores + c) - reference);
      store(scores + c, prob);
      sum += prob;
    }
    l += horizontal_sum(sum);
  }

  // out = sum_s 2^(m_s - m) acc_s / sum_s 2^(m_s - m) l_s over the parts s, in order.
  void merge(int64_t b, int64_t h_k, float* head_states) {
    int64_t count = parts(b);
    for (int64_t r = 0; r < rows; r++) {
      int64_t h = h_k * group + r / p.seqlen_q, i = r % p.seqlen_q;
      float sink = p.sink ? p.sink[h] * kLog2e : -kInf, m = sink;
      for (int64_t s = 0; s < count; s++) {
        float ms = head_states[s * state_size + rows * width_v + r];
        m = ms > m ? ms : m;
      }
      float l = sink == -kInf ? 0.0f : exp2(splat(sink - m))[0];
      T* out = rows_of<T>(p.out, b, h, i)[0];
      float* acc = head_states + r * width_v;  // the first part's, into which the others are added
      for (int64_t s = 0; s < count; s++) {
        float* state = head_states + s * state_size;
        // Without a maximum the sums are 0, or NaN, which has to come through.
        float weight = m == -kInf ? 1.0f : exp2(splat(state[rows * width_v + r] - m))[0];
        l += weight * state[rows * width_v + round_up(rows, kLanes) + r];
        for (int64_t d = 0; d < width_v; d += kLanes)
          store(acc + d, load(state + r * width_v + d) * weight + (s ? load(acc + d) : vf{}));
      }
      float inverse = 1.0f / l;
      for (int64_t d = 0; d < p.headdim_v; d += kLanes)
        store_upto(out + d, count == 0 || l == 0.0f ? vf{} : load(acc + d) * inverse, p.headdim_v - d);
      p.lse[(b * p.nheads + h) * p.seqlen_q + i] = l == 0.0f ? -kInf : (m + __builtin_log2f(l)) * kLn2;
    }
  }
};
