// The products of a few rows with a matrix, which take most of a token of generation: as fast as memory is
// read.
//
//   out = x weight^T + bias,  or  x weight + bias where the weight is transposed
//
// x (rows, in_features), any row stride; weight (out_features, in_features), transposed (in_features,
// out_features), bias (out_features), out (rows, out_features), contiguous; all in fp32, bf16 or fp16. Sums
// are fp32, and storage is rounded once. With several weights, their results lie side by side in out's rows.
//
// Each element of the weight is read once, by one thread, and multiplied by up to kRows rows of x at a time
// (what is more than that finds it in the cache), which are widened to fp32 before. Several rows of the
// weight are read side by side, and as many behind them asked for: what one core needs to keep memory busy. A
// stretch of the weight belongs to one thread; where it ends another's begins, so that little is asked for in
// vain.
//
// As it is: out's elements are dot products over in_features, each computed by itself in an order that
// depends on in_features alone. Transposed: out's rows are sums of weight rows, kept in fp32 for each of a
// few parts of in_features and added in order. So the bits depend neither on the number of threads
// nor on the other rows. Error bounds: tests/test_linear.py::test_parity.

constexpr int kRows = 6;                             // of x at most, multiplied at a time
constexpr int kSideBySide = 4;                       // rows of the weight, transposed
constexpr int64_t kMostParts = 16, kLeastQuads = 8;  // of in_features, transposed: parts, and what is in one
constexpr int64_t kLineBytes = 64;
constexpr int64_t kThreadBytes = 1 << 16;  // of the weight, that a thread is worth waking for
constexpr int64_t kStretchBytes = 1 << 20;
constexpr int64_t kMostAhead = 1 << 16, kAheadInRow = 1 << 11;  // bytes

template <int kR>
struct RowCount {
  static constexpr int value = kR;
};

template <class T>
struct Linear {
  const LinearParams& p;
  static constexpr int64_t kLine = kLineBytes / sizeof(T), kGroup = kTogether<T> * kLanes;
  static_assert(kLine % kGroup == 0);
  int64_t out_stride = p.out_stride();
  int64_t columns = p.in_features;  // of a weight; transposed: of the one at work
  int64_t width = round_up(columns, kLine);

  // One of the weights; `out` is its first column.
  struct Part {
    const T *weight, *bias;
    T* out;
    int64_t out_features;
  };
  FASTGPT_INLINE Part part_of(const Projection& of, int64_t first_column) const {
    return {static_cast<const T*>(of.weight), static_cast<const T*>(of.bias),
            static_cast<T*>(p.out) + first_column, of.out_features};
  }

  void run() {
    if (!p.transposed) return dot_products();
    int64_t first_column = 0;
    for (int i = 0; i < p.count; i++) {
      columns = p.projections[i].out_features;
      width = round_up(columns, kLine);
      sum_rows(part_of(p.projections[i], first_column));
      first_column += columns;
    }
  }

  // How many elements behind the one that is read to ask for: the same place in the rows behind the `rows`
  // that are read side by side, or, where those are long, a place in the same row.
  FASTGPT_INLINE int64_t ahead(int64_t rows) const {
    int64_t bytes = rows * columns * sizeof(T);
    return (bytes <= kMostAhead ? bytes : kAheadInRow) / sizeof(T);
  }

  FASTGPT_INLINE static void ask_for(const T* line) {
    __builtin_prefetch(reinterpret_cast<const char*>(line), 0, 2);
  }

  // out[row][column...] = x + bias, n <= kLanes elements.
  FASTGPT_INLINE void store_out(const Part& part, int64_t row, int64_t column, vf x, int64_t n) {
    if (part.bias) x += load_upto(part.bias + column, n);
    store_upto(part.out + row * out_stride + column, x, n);
  }

  // Calls body(first, last) for stretches of `units` units of so many bytes.
  template <class Body>
  void for_each_stretch(int64_t units, int64_t bytes, const Body& body) {
    int64_t threads = max(1, min(min(p.num_threads, units), units * bytes / kThreadBytes));
    int64_t stretches = min(units, threads * max(1, units * bytes / (threads * kStretchBytes)));
    // All threads or one: where teams differ in size from call to call, libgomp ends threads and starts
    // others.
    parallel_units(stretches, threads == 1 ? 1 : p.num_threads,
                   [&](int64_t s, int64_t) { body(units * s / stretches, units * (s + 1) / stretches); });
  }

  // Calls body(r, rows) for groups of rows of x, from r on, as equal as they can be.
  template <class Body>
  FASTGPT_INLINE void for_each_group(const Body& body) {
    int64_t groups = (p.rows + kRows - 1) / kRows, most = (p.rows + groups - 1) / groups;
    for (int64_t r = 0; r < p.rows; r += most) {
      switch (min(most, p.rows - r)) {
        case 1:
          body(r, RowCount<1>{});
          break;
        case 2:
          body(r, RowCount<2>{});
          break;
        case 3:
          body(r, RowCount<3>{});
          break;
        case 4:
          body(r, RowCount<4>{});
          break;
        case 5:
          body(r, RowCount<5>{});
          break;
        case 6:
          body(r, RowCount<6>{});
          break;
      }
    }
  }

  // --- weight (out_features, in_features) ---

  void dot_products() {
    float* x = scratch(p.rows * width);
    for (int64_t r = 0; r < p.rows; r++) widen(static_cast<const T*>(p.x) + r * p.x_stride, x + r * width);
    auto blocks_of = [](const Projection& of) { return (of.out_features + kLanes - 1) / kLanes; };
    int64_t blocks = 0;
    for (int i = 0; i < p.count; i++) blocks += blocks_of(p.projections[i]);
    for_each_stretch(blocks, kLanes * columns * sizeof(T), [&](int64_t first, int64_t last) {
      int64_t first_block = 0, first_column = 0;  // of a part
      for (int i = 0; i < p.count; i++) {
        Part part = part_of(p.projections[i], first_column);
        int64_t count = blocks_of(p.projections[i]);
        for (int64_t block = max(0, first - first_block); block < min(count, last - first_block); block++)
          for_each_group([&](int64_t r, auto rows) {
            by_block<decltype(rows)::value>(part, r, x + r * width, block * kLanes);
          });
        first_block += count;
        first_column += part.out_features;
      }
    });
  }

  // A row of x in fp32, in the order in which the weight is loaded, zeros behind it.
  FASTGPT_INLINE void widen(const T* row, float* x) {
    for (int64_t i = 0; i < width; i += kGroup) {
      T padded[kGroup] = {};
      vf group[kTogether<T>];
      __builtin_memcpy(padded, row + i, max(0, min(kGroup, columns - i)) * sizeof(T));
      load_together(padded, group);
      for (int v = 0; v < kTogether<T>; v++) store(x + i + v * kLanes, group[v]);
    }
  }

  template <int kR>
  __attribute__((noinline)) void by_block(const Part& part, int64_t row, const float* x, int64_t column) {
    // Rows of the weight side by side, as many as there are registers for their sums.
    constexpr int kW = kLanes == 16 || kR <= 2 ? 4 : 2;
    int64_t n = min(kLanes, part.out_features - column);
    vf acc[kR][kLanes] = {};
    const T* first = part.weight + column * columns;
    int64_t w = 0;
    for (; w + kW <= n; w += kW) dot<kR, kW>(x, first + w * columns, w, acc);
    for (; w < n; w++) dot<kR, 1>(x, first + w * columns, w, acc);
    for (int r = 0; r < kR; r++) store_out(part, row + r, column, sums(acc[r]), n);
  }

  // out[r][to + w] += x row r . weight row w, lane by lane
  template <int kR, int kW>
  FASTGPT_INLINE void dot(const float* x, const T* row, int64_t to, vf (&out)[kR][kLanes]) {
    for (int64_t begin = 0; begin < columns; begin += kSummed) {
      int64_t i = begin, end = min(columns, begin + kSummed), next = ahead(kW);
      vf acc[kR][kW] = {};
      for (; i + kLine <= end; i += kLine) {
#pragma GCC unroll 4
        for (int w = 0; w < kW; w++) ask_for(row + w * columns + i + next);
        add_line<kR, kW>(x + i, row + i, columns, acc);
      }
      if (i < end) {
        T padded[kW][kLine] = {};
        for (int w = 0; w < kW; w++)
          __builtin_memcpy(padded[w], row + w * columns + i, (end - i) * sizeof(T));
        add_line<kR, kW>(x + i, padded[0], kLine, acc);
      }
      for (int r = 0; r < kR; r++)
        for (int w = 0; w < kW; w++) out[r][to + w] += acc[r][w];
    }
  }

  template <int kR, int kW>
  FASTGPT_INLINE void add_line(const float* x, const T* row, int64_t stride, vf (&acc)[kR][kW]) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLine; i += kGroup)
#pragma GCC unroll 4
      for (int w = 0; w < kW; w++) {
        vf group[kTogether<T>];
        load_together(row + w * stride + i, group);
#pragma GCC unroll 6
        for (int r = 0; r < kR; r++)
#pragma GCC unroll 2
          for (int v = 0; v < kTogether<T>; v++) acc[r][w] += group[v] * load(x + r * width + i + v * kLanes);
      }
  }

  // --- weight (in_features, out_features) ---

  void sum_rows(const Part& part) {
    int64_t quads = (p.in_features + kSideBySide - 1) / kSideBySide;
    int64_t parts = max(1, min(kMostParts, quads / kLeastQuads));
    float* sums = scratch(parts * p.rows * width);  // (parts, rows, width)
    for_each_stretch(parts, quads / parts * kSideBySide * columns * sizeof(T), [&](int64_t i, int64_t last) {
      for (; i < last; i++) {
        int64_t begin = quads * i / parts * kSideBySide;
        int64_t end = min(p.in_features, quads * (i + 1) / parts * kSideBySide);
        sum_stretch(part, begin, end, sums + i * p.rows * width);
      }
    });
    for_each_stretch(
        width / kGroup, parts * p.rows * kGroup * sizeof(float),
        [&](int64_t first, int64_t last) { add_sums(part, sums, parts, first * kGroup, last * kGroup); });
  }

  void sum_stretch(const Part& part, int64_t begin, int64_t end, float* sums) {
    fill_zero(sums, p.rows * width);
    for (int64_t i = begin; i < end; i += kSideBySide)
      for_each_group([&](int64_t r, auto rows) {
        by_quad<decltype(rows)::value>(part, r, i, min(kSideBySide, end - i), sums + r * width);
      });
  }

  // Columns [begin, end) of out.
  void add_sums(const Part& of, const float* sums, int64_t parts, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < p.rows; r++)
      for (int64_t c = begin; c < end; c += kGroup) {
        vf group[kTogether<T>] = {};
        for (int64_t part = 0; part < parts; part++)
          for (int v = 0; v < kTogether<T>; v++)
            group[v] += load(sums + (part * p.rows + r) * width + c + v * kLanes);
        in_order<T>(group);
        for (int v = 0; v < kTogether<T>; v++)
          if (int64_t i = c + v * kLanes; i < columns)
            store_out(of, r, i, group[v], min(kLanes, columns - i));
      }
  }

  template <int kR>
  __attribute__((noinline)) void by_quad(const Part& part, int64_t row, int64_t first, int64_t n,
                                         float* sums) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride + first;
    if (n == kSideBySide) return add_rows<kR, kSideBySide>(x, part.weight + first * columns, sums);
    for (int64_t i = 0; i < n; i++) add_rows<kR, 1>(x + i, part.weight + (first + i) * columns, sums);
  }

  // sums[r] += sum over w of x[r][w] weight row w
  template <int kR, int kW>
  FASTGPT_INLINE void add_rows(const T* x, const T* row, float* sums) {
    float factors[kR][kW];
    for (int r = 0; r < kR; r++)
      for (int w = 0; w < kW; w++) factors[r][w] = load_first(x + r * p.x_stride + w, 1)[0];
    int64_t i = 0, next = ahead(kW);
    for (; i + kLine <= columns; i += kLine) {
#pragma GCC unroll 4
      for (int w = 0; w < kW; w++) ask_for(row + w * columns + i + next);
      add_lines<kR, kW>(factors, row + i, columns, sums + i);
    }
    if (i < columns) {
      T padded[kW][kLine] = {};
      for (int w = 0; w < kW; w++)
        __builtin_memcpy(padded[w], row + w * columns + i, (columns - i) * sizeof(T));
      add_lines<kR, kW>(factors, padded[0], kLine, sums + i);
    }
  }

  template <int kR, int kW>
  FASTGPT_INLINE void add_lines(const float (&factors)[kR][kW], const T* lines, int64_t stride, float* sums) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLine; i += kGroup) {
      vf group[kW][kTogether<T>];
#pragma GCC unroll 4
      for (int w = 0; w < kW; w++) load_together(lines + w * stride + i, group[w]);
#pragma GCC unroll 6
      for (int r = 0; r < kR; r++)
#pragma GCC unroll 2
        for (int v = 0; v < kTogether<T>; v++) {
          float* sum = sums + r * width + i + v * kLanes;
          vf acc = load(sum);
#pragma GCC unroll 4
          for (int w = 0; w < kW; w++) acc += group[w][v] * factors[r][w];
          store(sum, acc);
        }
    }
  }
};
