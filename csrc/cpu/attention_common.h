// What attention forward and backward share: typed access to a head, softmax constants, scheduling.

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// The rows of one (batch, head): row i at data + i * stride.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  FASTGPT_INLINE T* operator[](int64_t i) const { return data + i * stride; }
  FASTGPT_INLINE Rows from(int64_t i) const { return {data + i * stride, stride}; }
};

template <class T>
FASTGPT_INLINE Rows<T> rows_of(const Tensor& t, int64_t b, int64_t h, int64_t first_row) {
  return {static_cast<T*>(t.data) + b * t.batch_stride + h * t.head_stride + first_row * t.seq_stride,
          t.seq_stride};
}

// Where attention forward finds the keys and values of (b, h), and what their elements are multiplied by.
template <class T>
struct DenseKeys {
  const AttentionParams& p;
  FASTGPT_INLINE Rows<const T> k(int64_t b, int64_t h) const {
    return rows_of<const T>(p.k, b, h, p.first_key_row(b));
  }
  FASTGPT_INLINE Rows<const T> v(int64_t b, int64_t h) const {
    return rows_of<const T>(p.v, b, h, p.first_key_row(b));
  }
  FASTGPT_INLINE float k_factor(int64_t, int64_t) const { return 1.0f; }
  FASTGPT_INLINE float v_factor(int64_t, int64_t) const { return 1.0f; }
};

// Units of work, numbered through the batch, of which sequence b has starts[b + 1] - starts[b].
struct Units {
  int64_t batch, *starts;

  template <class Count>
  Units(int64_t size, int64_t* memory, const Count& count) : batch(size), starts(memory) {
    starts[0] = 0;
    for (int64_t b = 0; b < batch; b++) starts[b + 1] = starts[b] + count(b);
  }
  int64_t total() const { return starts[batch]; }
  int64_t sequence_of(int64_t unit) const {
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (starts[middle] <= unit ? low : high) = middle;
    }
    return low;
  }
};

FASTGPT_INLINE int64_t next_unit(int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

// How many of the threads so many products are worth waking for.
FASTGPT_INLINE int64_t threads_for(double products, int64_t threads) {
  constexpr double kThreadProducts = 1 << 22;
  return products < kThreadProducts * static_cast<double>(threads - 1)
             ? 1 + static_cast<int64_t>(products / kThreadProducts)
             : max(1, threads);
}

// What a thread has written before it counts down is seen by those that waited for zero.
// Waiting takes a processor only while nobody else wants it (but for real-time priorities, where a thread
// that yields is not passed by one of lower rank).
FASTGPT_INLINE void count_down(int64_t* counter) { __atomic_fetch_sub(counter, 1, __ATOMIC_RELEASE); }
FASTGPT_INLINE void wait_for_zero(const int64_t* counter) {
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) != 0) sched_yield();
}

// Sets scores[r][c] to -inf where key first_key + c is not in the interval that the mask gives query
// first_query + r, for c in [col_begin, col_end); both are multiples of kLanes.
FASTGPT_INLINE void mask_tile(const Mask& mask, int64_t first_query, int64_t rows, int64_t first_key,
                              int64_t col_begin, int64_t col_end, float* scores, int64_t stride) {
  vi lanes = lane_index();
  for (int64_t r = 0; r < rows; r++) {
    int32_t lo = static_cast<int32_t>(max(mask.begin(first_query + r) - first_key, 0));
    int32_t hi = static_cast<int32_t>(min(mask.end(first_query + r) - first_key, col_end));
    for (int64_t c = col_begin; c < col_end; c += kLanes) {
      float* s = scores + r * stride + c;
      vi index = lanes + static_cast<int32_t>(c);
      store(s, (index >= lo) & (index < hi) ? load(s) : splat(-kInf));
    }
  }
}
