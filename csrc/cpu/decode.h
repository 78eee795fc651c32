// Attention of a few queries over a KV cache (Flash-Decoding, Dao et al. 2023): appends the new keys and
// values, then out = softmax(s) v as in attention_forward.h, for few rows per kv head.
//
// Caches (B, capacity, Hk, D) and (B, capacity, Hk, Dv), or paged, in fp32, bf16 or fp16 like q, or in int8
// or fp8-e4m3 with a scale per head; read once, where they lie: this kernel is bound by memory. The rows of
// one kv head are all query heads of its group times the queries, so a group costs one pass over its keys.
// One unit of work = one part of the keys of one sequence and as many neighbouring heads as their state
// allows: a few keys at a time, all heads of a key before the next keys, so that memory is read in a few long
// streams, which is what the hardware prefetches. Each row has a softmax state (m, l, acc) of its own in
// fp32. A second pass merges the parts in order. The size of a part is fixed unless num_splits is given, so
// the bits depend neither on the threads nor on the batch. Nothing behind a sequence's keys is read. Many
// rows (a prefill) go to attention_forward.h instead.
//
// Rotary embedding (Su et al. 2021, arXiv:2104.09864) of q and the new keys: the pairs (x1, x2) of the first
// rotary_dim elements, halves or neighbours, become (x1 cos - x2 sin, x2 cos + x1 sin).
//
// A row that sees no key: out = 0, lse = -inf. Error bound: tests/test_decode.py::test_parity.

constexpr int64_t kSplitKeys = 256;    // of a part
constexpr int64_t kMinSplitKeys = 16;  // of a part with num_splits: bounds the memory of the states
constexpr int64_t kUnitRows = 32;      // of a unit's heads together: their q and acc stay in the caches
constexpr int64_t kUnitsOfThread = 4;  // at least, where a unit has several heads
constexpr int64_t kDecodeBlock = 64;   // keys whose scores are held at a time
constexpr int64_t kStreams = 8;        // keys that are read side by side; twice as many of less than a page
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kAheadBytes = 16384;     // prefetched: of the next keys, of all heads of a unit
constexpr int64_t kAheadKeys = 32;         // at most, and half of it at least
constexpr int64_t kDecodeRows = 16;        // more rows than this are attention_forward.h's work
constexpr int64_t kSerialBytes = 3 << 16;  // less K and V than this is not worth waking a thread for

// Bytes of a cache line, in elements.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// Into the second cache: prefetches into the first would wait for its few miss buffers.
FASTGPT_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

template <int N>
struct Count {
  static constexpr int value = N;
};

// scores[r][j] = q_r . k_j for `keys` keys k_j = k[j] + offset and kRows rows of a head, of each of kHeads
// heads. A row of q has `width` floats, zero behind dim; the next head's are q_head further, its keys k_head.
// Meanwhile the same columns of the row `ahead` places further in k are prefetched: where that is a row of
// the other cache and its strides are others, not quite what will be read.
template <int kHeads, int kRows, class T>
void dot_rows(const float* q, int64_t width, int64_t q_head, int64_t dim, const T* const* k, int64_t offset,
              int64_t k_head, int64_t ahead, int64_t keys, float* scores, int64_t scores_head) {
  constexpr int kKeys = kLanes / kRows / kHeads;
  // Loops over acc are unrolled whole, so that it stays in registers.
  for (int64_t j = 0; j < keys; j += kKeys) {
    vf acc[kLanes];
    const T *rows[kKeys], *next[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; i++) {
      rows[i] = k[min(j + i, keys - 1)] + offset;
      next[i] = k[min(j + i, keys - 1) + ahead] + offset;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) acc[i] = vf{};
#pragma GCC unroll 2
    for (int h = 0; h < kHeads; h++) {
      auto add = [&](int64_t d, auto vectors, auto load_row) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; i++) {
          vf ki[vectors.value];
          load_row(rows[i] + h * k_head + d, ki);
#pragma GCC unroll 2
          for (int c = 0; c < vectors.value; c++)
#pragma GCC unroll 16
            for (int r = 0; r < kRows; r++)
              acc[(h * kRows + r) * kKeys + i] += ki[c] * load(q + h * q_head + r * width + d + c * kLanes);
        }
        if (d % kLine<T> == 0)
#pragma GCC unroll 16
          for (int i = 0; i < kKeys; i++) prefetch(next[i] + h * k_head + d);
      };
      auto load_k = [](const T* row, auto& ki) { load_together(row, ki); };
      constexpr int kStep = kTogether<T> * kLanes;
      int64_t d = 0;
      for (; d + kStep <= dim; d += kStep) add(d, Count<kTogether<T>>{}, load_k);
      if (kStep > kLanes && d + kLanes <= dim) add(d, Count<1>{}, load_k), d += kLanes;
      if (d < dim) add(d, Count<1>{}, [&](const T* row, auto& ki) { ki[0] = load_first(row, dim - d); });
    }
    float flat[kLanes];
    store(flat, sums(acc));
    for (int h = 0; h < kHeads; h++)
      for (int r = 0; r < kRows; r++)
        __builtin_memcpy(scores + h * scores_head + r * kDecodeBlock + j, flat + (h * kRows + r) * kKeys,
                         kKeys * sizeof(float));
  }
}

// out[r] += sum_j probs[r][j] v_j for kRows rows and kVectors vectors of the head dim, v_j = v[j] + offset.
template <int kRows, int kVectors, class T>
FASTGPT_INLINE void accumulate_columns(const float* probs, const T* const* v, int64_t offset, int64_t ahead,
                                       int64_t keys, float* out, int64_t width) {
  constexpr int kStep = kVectors % kTogether<T> ? 1 : kTogether<T>;
  vf acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) acc[r][i] = load(out + r * width + i * kLanes);
  for (int64_t j = 0; j < keys; j++) {
    const T *row = v[j] + offset, *next = v[j + ahead] + offset;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i += kStep) {
      vf vi[kStep];
      load_together(row + i * kLanes, vi);
#pragma GCC unroll 2
      for (int c = 0; c < kStep; c++)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) acc[r][i + c] += vi[c] * probs[r * kDecodeBlock + j];
    }
#pragma GCC unroll 16
    for (int64_t d = 0; d < kVectors * kLanes; d += kLine<T>) prefetch(next + d);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) store(out + r * width + i * kLanes, acc[r][i]);
}

template <int kRows, class T>
void accumulate_rows(const float* probs, const T* const* v, int64_t offset, int64_t ahead, int64_t dim,
                     int64_t keys, float* out, int64_t width) {
  // As many accumulators as hide the latency of an addition, and fit the registers.
  constexpr int kVectors = kLanes >= 16 && kRows == 4 ? 4 : 8 / kRows;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes)
    accumulate_columns<kRows, kVectors>(probs, v, offset + d, ahead, keys, out + d, width);
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes)
    accumulate_columns<kRows, 2>(probs, v, offset + d, ahead, keys, out + d, width);
  for (; d + kLanes <= dim; d += kLanes)
    accumulate_columns<kRows, 1>(probs, v, offset + d, ahead, keys, out + d, width);
  if (d < dim)
    for (int64_t j = 0; j < keys; j++) {
      vf tail = load_first(v[j] + offset + d, dim - d);
      for (int r = 0; r < kRows; r++)
        store(out + r * width + d, load(out + r * width + d) + tail * probs[r * kDecodeBlock + j]);
    }
}

// The rows of one head of a sequence's cache, from its first key on.
template <class T>
struct CacheRows {
  T* data;
  int64_t stride;
  const int32_t* table;  // the sequence's blocks; null: rows lie at a uniform distance
  int64_t page_size, page_stride, first;

  FASTGPT_INLINE T* operator[](int64_t j) const {
    int64_t row = first + j;
    if (!table) return data + row * stride;
    return data + table[row / page_size] * page_stride + row % page_size * stride;
  }
  FASTGPT_INLINE CacheRows from(int64_t j) const {
    return {data, stride, table, page_size, page_stride, first + j};
  }
};

template <class T>
FASTGPT_INLINE CacheRows<T> cache_rows(const DecodeParams& p, const Tensor& cache, int64_t b, int64_t h) {
  T* data = static_cast<T*>(cache.data) + h * cache.head_stride;
  int64_t first = p.leftpad_k ? p.leftpad_k[b] : 0;
  if (p.block_table)
    return {data,        cache.seq_stride,   p.block_table + b * p.block_table_stride,
            p.page_size, cache.batch_stride, first};
  int64_t sequence = p.cache_batch_idx ? p.cache_batch_idx[b] : b;
  return {data + sequence * cache.batch_stride, cache.seq_stride, nullptr, 0, 0, first};
}

FASTGPT_INLINE float descale(const DecodeParams& p, const float* scales, int64_t b, int64_t h) {
  return scales ? scales[b * p.descale_batch_stride + h] : 1.0f;
}

// Where attention forward finds the keys of a cache: DenseKeys.
template <class KV>
struct CachedKeys {
  const DecodeParams& p;
  CacheRows<const KV> k(int64_t b, int64_t h) const { return cache_rows<const KV>(p, p.k, b, h); }
  CacheRows<const KV> v(int64_t b, int64_t h) const { return cache_rows<const KV>(p, p.v, b, h); }
  float k_factor(int64_t b, int64_t h) const { return descale(p, p.k_descale, b, h); }
  float v_factor(int64_t b, int64_t h) const { return descale(p, p.v_descale, b, h); }
};

template <class T, class KV = T>
struct Decode {
  static constexpr int64_t kStep = kTogether<KV> * kLanes;
  const DecodeParams& p;
  int64_t group = p.nheads / p.nheads_k, rows = group * p.seqlen_q;
  int64_t width = round_up(p.headdim, kLanes), width_v = round_up(p.headdim_v, kLanes);
  // Of any sequence: a shorter one may be cut into more parts than the longest is.
  int64_t parts_max = p.num_splits ? min(p.num_splits, (p.seqlen_k + kMinSplitKeys - 1) / kMinSplitKeys)
                                   : (p.seqlen_k + kSplitKeys - 1) / kSplitKeys;
  int64_t kv_bytes = p.batch * p.nheads_k * p.seqlen_k * (p.headdim + p.headdim_v) * sizeof(KV);
  int threads = kv_bytes < kSerialBytes ? 1 : p.num_threads;
  // Neighbouring heads of a unit, fewer where threads would wait for the last of a few units; one, if a
  // head's keys lie side by side. The bits do not depend on it.
  int64_t heads = p.k.head_stride < p.k.seq_stride ? shared_heads() : 1;
  int64_t head_blocks = (p.nheads_k + heads - 1) / heads;
  // The states of all heads of each part in turn, and the threads' workspaces.
  float *states = nullptr, *workspaces = nullptr;
  bool terms = has_score_terms(p);

  int64_t shared_heads() const {
    int64_t n = max(1, min(p.nheads_k, kUnitRows / max(1, rows)));
    int64_t all_parts = 0;
    for (int64_t b = 0; b < p.batch; b++) all_parts += parts(b);
    while (n > 1 && all_parts * ((p.nheads_k + n - 1) / n) < kUnitsOfThread * threads) n = (n + 1) / 2;
    return n;
  }

  // Of one part of one head: acc (rows, width_v), m (rows), l (rows).
  struct State {
    float *acc, *m, *l;
  };
  // q, and the scores of a block, of a unit's heads.
  struct Workspace {
    float *q, *scores;
  };

  FASTGPT_INLINE int64_t lay_out(State& state, float* memory) const {
    Parts parts{memory};
    state.acc = parts.take(rows * width_v);
    state.m = parts.take(rows);
    state.l = parts.take(rows);
    return parts.size;
  }
  FASTGPT_INLINE int64_t lay_out(Workspace& w, float* memory) const {
    Parts parts{memory};
    w.q = parts.take(heads * rows * width);
    w.scores = parts.take(heads * rows * kDecodeBlock);
    return parts.size;
  }
  template <class Part>
  int64_t size_of() const {
    Part unused;
    return lay_out(unused, nullptr);
  }
  int64_t state_size = size_of<State>(), workspace_size = size_of<Workspace>();

  FASTGPT_INLINE State state(int64_t b, int64_t h_k, int64_t index) const {
    State result;
    lay_out(result, states + ((b * parts_max + index) * p.nheads_k + h_k) * state_size);
    return result;
  }

  void run() {
    bool tiled = rows > kDecodeRows;
    int64_t tokens = p.seqlen_new + (p.rotary_dim ? p.seqlen_q : 0);
    int64_t units = p.batch * head_blocks * parts_max, all_states = p.batch * p.nheads_k * parts_max;
    AttentionForward<T, KV, CachedKeys<KV>> forward{p, {p}};
    if (tiled) {
      scratch(forward.scratch_size());  // out of memory before anything is appended, or not at all
    } else {
      states = scratch(all_states * state_size + threads * workspace_size);
      workspaces = states + all_states * state_size;
    }
    int64_t append_counter = 0, unit_counter = 0, thread_counter = 0, merge_counter = 0;
#pragma omp parallel num_threads(threads)
    {
      if (tokens) {
        for (int64_t u; (u = next_unit(&append_counter)) < p.batch * tokens;) {
          int64_t b = u / tokens, token = u % tokens;
          if (token < p.seqlen_new)
            append(b, token);
          else
            rotate_query(b, token - p.seqlen_new);
        }
#pragma omp barrier
      }
      if (!tiled) {
        Workspace w;
        lay_out(w, workspaces + next_unit(&thread_counter) * workspace_size);
        for (int64_t u; (u = next_unit(&unit_counter)) < units;)
          part(u / (head_blocks * parts_max), u / parts_max % head_blocks, u % parts_max, w);
#pragma omp barrier
        for (int64_t u; (u = next_unit(&merge_counter)) < p.batch * p.nheads_k;)
          merge(u / p.nheads_k, u % p.nheads_k);
      }
    }
    if (tiled) forward.run();
  }

  // --- rotary embedding and append ---

  // The row of cosines or sines of a position, as fp32.
  void rotary_row(const void* table, int64_t position, float* row) const {
    int64_t half = p.rotary_dim / 2;
    auto widen = [&](const auto* source) {
      for (int64_t d = 0; d < half; d += kLanes)
        store_upto(row + d, load_upto(source + position * half + d, half - d), half - d);
    };
    if (p.rotary_dtype == DType::f32)
      widen(static_cast<const float*>(table));
    else if (p.rotary_dtype == DType::bf16)
      widen(static_cast<const bf16*>(table));
    else
      widen(static_cast<const f16*>(table));
  }

  // Rotates heads of one token, in registers of fp32, rounded to their type.
  void rotate(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t count,
              int64_t position) const {
    constexpr int64_t kMaxDim = 256;
    float cos[kMaxDim / 2], sin[kMaxDim / 2], x[kMaxDim + kLanes], y[kMaxDim + kLanes];
    rotary_row(p.rotary_cos, position, cos);
    rotary_row(p.rotary_sin, position, sin);
    int64_t half = p.rotary_dim / 2;
    for (int64_t h = 0; h < count; h++, in += in_stride, out += out_stride) {
      for (int64_t d = 0; d < p.headdim; d += kLanes) {
        vf value = load_upto(in + d, p.headdim - d);
        store(x + d, value);
        store(y + d, value);
      }
      if (p.rotary_interleaved)
        turn<2>(x, x + 1, y, y + 1, cos, sin, half);
      else
        turn<1>(x, x + half, y, y + half, cos, sin, half);
      for (int64_t d = 0; d < p.headdim; d += kLanes) store_upto(out + d, load(y + d), p.headdim - d);
    }
  }

  // Pair i is at i * kStep; y1, y2 take the turned pairs.
  template <int kStep>
  static void turn(const float* __restrict x1, const float* __restrict x2, float* __restrict y1,
                   float* __restrict y2, const float* __restrict cos, const float* __restrict sin,
                   int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
      y1[i * kStep] = x1[i * kStep] * cos[i] - x2[i * kStep] * sin[i];
      y2[i * kStep] = x2[i * kStep] * cos[i] + x1[i * kStep] * sin[i];
    }
  }

  void rotate_query(int64_t b, int64_t i) {
    // Without a mask by position, all queries are at that of the first new token.
    bool positioned = p.window_left >= 0 || p.window_right >= 0;
    int64_t position = row_of(b, positioned ? i : 0);
    Rows<const T> in = rows_of<const T>(p.q_source, b, 0, i);
    Rows<T> out = rows_of<T>(p.q, b, 0, i);
    rotate(in[0], p.q_source.head_stride, out[0], p.q.head_stride, p.nheads, position);
  }

  // The row of the cache, padding included, where new token t of sequence b is: its rotary position.
  int64_t row_of(int64_t b, int64_t t) const {
    return p.keys(b) - p.seqlen_new + t + (p.leftpad_k ? p.leftpad_k[b] : 0);
  }

  void append(int64_t b, int64_t token) {
    int64_t position = p.keys(b) - p.seqlen_new + token;
    for (int64_t h = 0; h < p.nheads_k; h++) {
      const T* k = rows_of<const T>(p.k_new, b, h, token)[0];
      T rotated[256];
      if (p.rotary_dim) {
        rotate(k, 0, rotated, 0, 1, row_of(b, token));
        k = rotated;
      }
      put(cache_rows<KV>(p, p.k, b, h)[position], k, p.headdim, descale(p, p.k_descale, b, h));
      put(cache_rows<KV>(p, p.v, b, h)[position], rows_of<const T>(p.v_new, b, h, token)[0], p.headdim_v,
          descale(p, p.v_descale, b, h));
    }
  }

  static void put(T* place, const T* row, int64_t dim, float) {
    __builtin_memcpy(place, row, dim * sizeof(T));
  }
  template <class Quantised>
  static void put(Quantised* place, const T* row, int64_t dim, float scale) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      float x[kLanes];
      store(x, load_upto(row + d, dim - d) / scale);
      for (int64_t i = 0; i < min(kLanes, dim - d); i++) quantise(place + d + i, x[i]);
    }
  }

  // --- attention ---

  int64_t part_keys(int64_t b) const {
    return p.num_splits ? max(kMinSplitKeys, (p.keys(b) + p.num_splits - 1) / p.num_splits) : kSplitKeys;
  }
  int64_t parts(int64_t b) const { return (p.keys(b) + part_keys(b) - 1) / part_keys(b); }

  // In the order in which keys are loaded.
  void pack_query(const T* source, float scale, float* q) const {
    int64_t d = 0;
    for (; d + kStep <= p.headdim; d += kStep) {
      vf x[kTogether<KV>];
      load_together(source + d, x);
      for (int c = 0; c < kTogether<KV>; c++) store(q + d + c * kLanes, x[c] * scale);
    }
    for (; d < p.headdim; d += kLanes) store(q + d, load_upto(source + d, p.headdim - d) * scale);
  }

  void part(int64_t b, int64_t head_block, int64_t index, const Workspace& w) {
    if (index >= parts(b)) return;
    int64_t h_first = head_block * heads, h_count = min(heads, p.nheads_k - h_first);
    Mask mask(p.seqlen_q, p.keys(b), p.window_left, p.window_right);
    CacheRows<const KV> k = cache_rows<const KV>(p, p.k, b, h_first);
    CacheRows<const KV> v = cache_rows<const KV>(p, p.v, b, h_first);
    float *q = w.q, *scores = w.scores;
    for (int64_t n = 0; n < h_count; n++) {
      int64_t h_k = h_first + n;
      for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < p.seqlen_q; i++)
          pack_query(rows_of<const T>(p.q, b, h_k * group + g, i)[0],
                     p.softmax_scale * kLog2e * descale(p, p.k_descale, b, h_k),
                     q + (n * rows + g * p.seqlen_q + i) * width);
      auto [acc, m, l] = state(b, h_k, index);
      fill_zero(acc, rows * width_v);
      for (int64_t r = 0; r < rows; r++) m[r] = -kInf, l[r] = 0.0f;
    }

    int64_t first = max(index * part_keys(b), mask.begin(0));
    int64_t last = min((index + 1) * part_keys(b), mask.end(p.seqlen_q - 1));
    int64_t key_bytes = heads * p.headdim * static_cast<int64_t>(sizeof(KV));
    int64_t streams = heads > 1 && key_bytes > kPageBytes ? kStreams : 2 * kStreams;
    int64_t ahead = max(kAheadKeys / 2, min(kAheadKeys, kAheadBytes / key_bytes));
    for (int64_t j = first; j < last; j += kDecodeBlock) {
      int64_t keys = min(kDecodeBlock, last - j);
      // The block's keys and, prefetched meanwhile, the first of its values; then its values and the next
      // keys.
      const KV* kv_rows[kDecodeBlock + kAheadKeys];
      for (int64_t i = 0; i < keys; i++) kv_rows[i] = k[j + i];
      for (int64_t i = 0; i < ahead; i++) kv_rows[keys + i] = v[min(j + i, last - 1)];
      for (int64_t i = 0; i < keys; i += streams)
        score(q, kv_rows + i, ahead, h_count, min(streams, keys - i), scores + i);
      for (int64_t n = 0; n < h_count * rows; n++) {
        int64_t h = n / rows, r = n % rows, i = r % p.seqlen_q;
        auto [acc, m, l] = state(b, h_first + h, index);
        float* row = scores + n * kDecodeBlock;
        if (terms)
          add_score_terms(p, b, (h_first + h) * group + r / p.seqlen_q, i, 1, j, 0, round_up(keys, kLanes),
                          1.0f, row, kDecodeBlock, nullptr);
        softmax_row(row, mask.begin(i) - j, mask.end(i) - j, keys, m[r], l[r], acc + r * width_v);
      }
      for (int64_t i = 0; i < keys; i++) kv_rows[i] = v[j + i];
      for (int64_t i = 0; i < ahead; i++) kv_rows[keys + i] = k[min(j + keys + i, last - 1)];
      for (int64_t i = 0; i < keys; i += streams)
        for (int64_t n = 0; n < h_count; n++) {
          float* acc = state(b, h_first + n, index).acc;
          by_rows([&](auto count, int64_t r) {
            accumulate_rows<count.value>(scores + (n * rows + r) * kDecodeBlock + i, kv_rows + i,
                                         n * p.v.head_stride, ahead, p.headdim_v, min(streams, keys - i),
                                         acc + r * width_v, width_v);
          });
        }
    }
  }

  // Scores of a few keys and all heads of a unit. A row that is alone in its tile shares it with the next
  // head's (the last of an odd number: with itself): one head's would be of more keys than kStreams.
  void score(const float* q, const KV* const* k, int64_t ahead, int64_t h_count, int64_t keys,
             float* scores) {
    auto dot = [&](auto tile_heads, auto tile_rows, int64_t n, int64_t r, int64_t distance) {
      dot_rows<tile_heads.value, tile_rows.value>(
          q + (n * rows + r) * width, width, distance * rows * width, p.headdim, k, n * p.k.head_stride,
          distance * p.k.head_stride, ahead, keys, scores + (n * rows + r) * kDecodeBlock,
          distance * rows * kDecodeBlock);
    };
    constexpr int kPair = kLanes > kStreams ? 2 : 1;
    for (int64_t n = 0; n < h_count; n += heads > 1 ? kPair : 1) {
      int64_t count = heads > 1 ? min(kPair, h_count - n) : 1;
      by_rows([&](auto tile_rows, int64_t r) {
        if (tile_rows.value == 1 && heads > 1) return dot(Count<kPair>{}, Count<1>{}, n, r, count - 1);
        for (int64_t i = 0; i < count; i++) dot(Count<1>{}, tile_rows, n + i, r, 0);
      });
    }
  }

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
    float new_m = horizontal_max(top);
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
  void merge(int64_t b, int64_t h_k) {
    int64_t count = parts(b);
    for (int64_t r = 0; r < rows; r++) {
      int64_t h = h_k * group + r / p.seqlen_q, i = r % p.seqlen_q;
      float sink = p.sink ? p.sink[h] * kLog2e : -kInf, m = sink;
      for (int64_t s = 0; s < count; s++) {
        float ms = state(b, h_k, s).m[r];
        m = ms > m ? ms : m;
      }
      float l = sink == -kInf ? 0.0f : exp2(splat(sink - m))[0];
      T* out = rows_of<T>(p.out, b, h, i)[0];
      float* acc = state(b, h_k, 0).acc + r * width_v;  // the first part's, into which the others are added
      for (int64_t s = 0; s < count; s++) {
        State of_part = state(b, h_k, s);
        // Without a maximum the sums are 0, or NaN, which has to come through.
        float weight = m == -kInf ? 1.0f : exp2(splat(of_part.m[r] - m))[0];
        l += weight * of_part.l[r];
        for (int64_t d = 0; d < width_v; d += kLanes)
          store(acc + d, load(of_part.acc + r * width_v + d) * weight + (s ? load(acc + d) : vf{}));
      }
      float inverse = descale(p, p.v_descale, b, h_k) / l;
      auto result = [&](int64_t d) { return count == 0 || l == 0.0f ? vf{} : load(acc + d) * inverse; };
      int64_t d = 0;
      for (; d + kStep <= p.headdim_v; d += kStep) {
        vf x[kTogether<KV>];
        for (int c = 0; c < kTogether<KV>; c++) x[c] = result(d + c * kLanes);
        in_order<KV>(x);
        for (int c = 0; c < kTogether<KV>; c++) store(out + d + c * kLanes, x[c]);
      }
      for (; d < p.headdim_v; d += kLanes) store_upto(out + d, result(d), p.headdim_v - d);
      p.lse[(b * p.nheads + h) * p.seqlen_q + i] = l == 0.0f ? -kInf : (m + __builtin_log2f(l)) * kLn2;
    }
  }
};
