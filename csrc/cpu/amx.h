// Products of bf16 operands by the matrix unit of Intel's processors, AMX (since Sapphire Rapids, 2023): one
// instruction adds the product of 16 x 32 and 32 x 16 elements, exact products summed in fp32, to 16 x 16
// sums in fp32: 16 times the rate of fp32's fused multiply-add. The left operand is stored by rows; of the
// right one two rows interleaved, so that what is multiplied together stands together. Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2, TDPBF16PS.

constexpr int kMatrixRows = 16;   // of a tile register, and columns in fp32
constexpr int kMatrixDepth = 32;  // bf16 elements of its rows
static_assert(kLanes == kMatrixRows && kTileCols == kMatrixDepth && kGradBlock % kMatrixDepth == 0);

struct MatrixUnit {
#ifdef FASTGPT_EMULATE_AMX
  // The same on any processor, for tests.
  static inline __thread uint8_t tiles[8][kMatrixRows][64];
  template <class T>
  static T* row(int tile, int r) {
    return reinterpret_cast<T*>(tiles[tile][r]);
  }
  template <int kTile>
  static void zero() {
    __builtin_memset(row<uint8_t>(kTile, 0), 0, kMatrixRows * 64);
  }
  template <int kTile>
  static void load(const void* source, int64_t stride) {
    for (int r = 0; r < kMatrixRows; r++)
      __builtin_memcpy(row<uint8_t>(kTile, r), static_cast<const char*>(source) + r * stride, 64);
  }
  template <int kTile>
  static void store(void* target, int64_t stride) {
    for (int r = 0; r < kMatrixRows; r++)
      __builtin_memcpy(static_cast<char*>(target) + r * stride, row<uint8_t>(kTile, r), 64);
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    for (int m = 0; m < kMatrixRows; m++) {
      vf a[2], b[2], even = vf{}, odd = vf{};
      load_together(row<bf16>(kA, m), a);
      for (int k = 0; k < kMatrixRows; k++) {
        load_together(row<bf16>(kB, k), b);
        even += b[0] * a[0][k];
        odd += b[1] * a[1][k];
      }
      float* sums = row<float>(kC, m);
      fastgpt::store(sums, fastgpt::load(sums) + (even + odd));
    }
  }
#else
  // A thread's tile registers, from here to the end of a scope: 16 rows of 64 bytes each.
  MatrixUnit() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }

  // GCC's intrinsics do not say that they read memory: what is written before could be moved behind them.
  template <int kTile>
  static FASTGPT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static FASTGPT_INLINE void load(const void* source, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static FASTGPT_INLINE void store(void* target, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  static FASTGPT_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
#endif
};

// C = A B (overwrite) or C + A B (add), C in fp32:
//   A(m, k) = a[m * lda + k], m < rows, 16 or 32, and k < depth, a multiple of 32
//   B(k, n) = b[k / 2 * ldb + 2 n + k % 2],  C(m, n) = c[m * ldc + n], n < cols, a multiple of 32
template <Update kUpdate, int kRows>
FASTGPT_INLINE void matrix_columns(int64_t depth, int64_t cols, const bf16* a, int64_t lda, const bf16* b,
                                   int64_t ldb, float* c, int64_t ldc) {
  static_assert(kUpdate != Update::rescale);
  constexpr int64_t kN = kMatrixRows, kBytes = sizeof(bf16), kSum = sizeof(float);
  constexpr bool kLower = kRows > kMatrixRows;  // two tiles of rows
  for (int64_t n = 0; n < cols; n += 2 * kN, b += 4 * kN, c += 2 * kN) {
    float* lower = c + kMatrixRows * ldc;
    if (kUpdate == Update::overwrite) {
      MatrixUnit::zero<0>(), MatrixUnit::zero<1>();
      if (kLower) MatrixUnit::zero<2>(), MatrixUnit::zero<3>();
    } else {
      MatrixUnit::load<0>(c, ldc * kSum), MatrixUnit::load<1>(c + kN, ldc * kSum);
      if (kLower) MatrixUnit::load<2>(lower, ldc * kSum), MatrixUnit::load<3>(lower + kN, ldc * kSum);
    }
    for (int64_t k = 0; k < depth; k += kMatrixDepth) {
      const bf16* bk = b + k / 2 * ldb;
      MatrixUnit::load<4>(a + k, lda * kBytes);
      MatrixUnit::load<6>(bk, ldb * kBytes), MatrixUnit::multiply<0, 4, 6>();
      MatrixUnit::load<7>(bk + 2 * kN, ldb * kBytes), MatrixUnit::multiply<1, 4, 7>();
      if (kLower) {
        MatrixUnit::load<5>(a + kMatrixRows * lda + k, lda * kBytes);
        MatrixUnit::multiply<2, 5, 6>(), MatrixUnit::multiply<3, 5, 7>();
      }
    }
    MatrixUnit::store<0>(c, ldc * kSum), MatrixUnit::store<1>(c + kN, ldc * kSum);
    if (kLower) MatrixUnit::store<2>(lower, ldc * kSum), MatrixUnit::store<3>(lower + kN, ldc * kSum);
  }
}
template <Update kUpdate>
__attribute__((noinline)) void matrix_product(int64_t rows, int64_t depth, int64_t cols, const bf16* a,
                                              int64_t lda, const bf16* b, int64_t ldb, float* c,
                                              int64_t ldc) {
  if (rows > kMatrixRows)
    matrix_columns<kUpdate, 2 * kMatrixRows>(depth, cols, a, lda, b, ldb, c, ldc);
  else
    matrix_columns<kUpdate, kMatrixRows>(depth, cols, a, lda, b, ldb, c, ldc);
}

// --- packing ---

typedef uint16_t vw __attribute__((vector_size(64)));  // 32 elements of bf16
typedef uint16_t vw_unaligned __attribute__((vector_size(64), aligned(2), may_alias));

// The first n elements, then zeros.
FASTGPT_INLINE vw load_words(const bf16* p, int64_t n) {
  if (n >= kMatrixDepth) return *reinterpret_cast<const vw_unaligned*>(p);
  bf16 padded[kMatrixDepth] = {};
  __builtin_memcpy(padded, p, n * sizeof(bf16));
  return *reinterpret_cast<const vw_unaligned*>(padded);
}
FASTGPT_INLINE void store_words(bf16* p, vw x) { *reinterpret_cast<vw_unaligned*>(p) = x; }

template <int... I>
FASTGPT_INLINE vw interleave_words(vw a, vw b, int half, Lanes<I...>) {
  return half ? __builtin_shuffle(a, b, vw{(I % 2 * 32 + 16 + I / 2)...})
              : __builtin_shuffle(a, b, vw{(I % 2 * 32 + I / 2)...});
}
// Elements of a and b in turn, 64 of them.
FASTGPT_INLINE void store_interleaved(bf16* p, vw a, vw b) {
  typename MakeLanes<32>::type lanes;
  store_words(p, interleave_words(a, b, 0, lanes));
  store_words(p + 32, interleave_words(a, b, 1, lanes));
}

FASTGPT_INLINE vw to_words(vf low, vf high) {
#ifdef __AVX512BF16__
  return (vw)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  bf16 words[2 * kLanes];
  store(words, low), store(words + kLanes, high);
  return *reinterpret_cast<const vw_unaligned*>(words);
#endif
}

// The 16 elements of each, in turn.
template <int... I>
FASTGPT_INLINE vw to_pairs(vf even, vf odd, Lanes<I...>) {
  return __builtin_shuffle(to_words(even, odd), vw{(I % 2 * 16 + I / 2)...});
}

// Rows as they are, filled up with zeros.
template <class Source>
void copy_rows(const Source& source, int64_t rows, int64_t padded, int64_t dim, bf16* packed, int64_t width) {
  for (int64_t row = 0; row < padded; row++)
    for (int64_t d = 0; d < width; d += kMatrixDepth, packed += kMatrixDepth)
      store_words(packed, row < rows ? load_words(source[row] + d, dim - d) : vw{});
}

// As right operand of products over their elements, in panels of kTileCols rows: element d of row r of panel
// i at packed[((i * width + d) / 2 * kTileCols + r) * 2 + d % 2]. Zeros behind the rows and elements.
template <class Source>
void pack_columns(const Source& source, int64_t rows, int64_t dim, bf16* packed) {
  int64_t width = round_up(dim, kMatrixDepth);
  for (int64_t panel = 0; panel < rows; panel += kTileCols, packed += width * kTileCols)
    for (int64_t r = 0; r < kTileCols; r += kLanes)
      for (int64_t d = 0; d < width; d += kMatrixDepth) {
        vf block[kLanes];  // of pairs
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
          int64_t row = panel + r + i;
          block[i] = row < rows ? (vf)load_words(source[row] + d, dim - d) : vf{};
        }
        transpose(block);
        for (int i = 0; i < kLanes; i++)
          store(reinterpret_cast<float*>(packed + ((d / 2 + i) * kTileCols + r) * 2), block[i]);
      }
}

// As right operand of products over the rows: element d of row r at packed[(r / 2 * width + d) * 2 + r % 2].
// Zeros behind the elements, and behind the rows up to a multiple of kMatrixDepth.
template <class Source>
void pack_pairs(const Source& source, int64_t rows, int64_t dim, bf16* packed, int64_t width) {
  for (int64_t row = 0; row < round_up(rows, kMatrixDepth); row += 2)
    for (int64_t d = 0; d < width; d += kMatrixDepth, packed += 2 * kMatrixDepth)
      store_interleaved(packed, row < rows ? load_words(source[row] + d, dim - d) : vw{},
                        row + 1 < rows ? load_words(source[row + 1] + d, dim - d) : vw{});
}

// Attention forward in bf16: q, k and v as they are, scores in fp32, probabilities rounded to bf16 before
// they multiply v, as on a GPU; their sum is that of the unrounded ones.
template <>
struct Products<bf16, bf16> {
  typedef bf16 Element;
  static constexpr int kRows = 2 * kMatrixRows, kTiles = 4;
  static constexpr int64_t kStep = kMatrixDepth;
  static constexpr bool kScaled = false;
  typedef MatrixUnit Unit;

  static int64_t row_width(int64_t dim) { return round_up(dim, kMatrixDepth); }
  static int64_t key_width(int64_t dim) { return row_width(dim); }
  static FASTGPT_INLINE int64_t rows_computed(int64_t rows) {
    return rows > kMatrixRows ? kRows : kMatrixRows;
  }
  static float score_factor(const AttentionParams& p) { return p.softmax_scale * kLog2e; }
  static FASTGPT_INLINE bf16* probs_of(float*, Parts& parts) {
    return parts.take_as<bf16>(kRows * kKeyBlock);
  }
  static FASTGPT_INLINE void store_probs(bf16* target, const vf (&prob)[2]) {
    store_words(target, to_words(prob[0], prob[1]));
  }

  static void pack_queries(const Rows<const bf16>& q, int64_t rows, int64_t padded, int64_t dim, float,
                           bf16* packed, int64_t width) {
    copy_rows(q, rows, padded, dim, packed, width);
  }
  template <class Source>
  static void pack_keys(const Source& k, int64_t keys, int64_t dim, float, bf16* packed) {
    pack_columns(k, keys, dim, packed);
  }
  template <class Source>
  static void pack_values(const Source& v, int64_t keys, int64_t dim, float, bf16* packed, int64_t width) {
    pack_pairs(v, keys, dim, packed, width);
  }

  static FASTGPT_INLINE void scores(int64_t rows, int64_t dim, int64_t cols, const bf16* q, int64_t q_width,
                                    const bf16* k, float* c, int64_t ldc) {
    matrix_product<Update::overwrite>(rows, round_up(dim, kMatrixDepth), cols, q, q_width, k, 2 * kTileCols,
                                      c, ldc);
  }
  static FASTGPT_INLINE void add_values(int64_t rows, int64_t keys, int64_t width, const bf16* probs,
                                        int64_t ldp, const bf16* v, float* o, const float* rescale) {
    for (int64_t r = 0; r < rows; r++)
      if (rescale[r] != 1.0f)
        for (int64_t d = 0; d < width; d += kLanes)
          store(o + r * width + d, load(o + r * width + d) * rescale[r]);
    matrix_product<Update::add>(rows, round_up(keys, kMatrixDepth), width, probs, ldp, v, 2 * width, o,
                                width);
  }
};

// Attention backward in bf16: p and ds are rounded before they are multiplied. dk and dv are computed
// transposed, (dim, keys) in blocks of kGradBlock keys, from (dim, queries) in blocks of kGradBlock queries:
// p and ds are then the right operand, of which rows have to be interleaved, not transposed.
template <>
struct GradientProducts<bf16> : Products<bf16, bf16> {
  static constexpr int64_t kScoreRows = kRows;
  static constexpr int64_t kKeys = kTileCols;
  struct Block {
    bf16 *probs, *dscores;  // of the block: element (i, j) at (i / 2 * kGradBlock + j) * 2 + i % 2
    bf16* rows;             // of ds, of a register tile
  };

  static void lay_out(Block& block, float*, float*, Parts& parts) {
    block.probs = parts.take_as<bf16>(kGradBlock * kGradBlock);
    block.dscores = parts.take_as<bf16>(kGradBlock * kGradBlock);
    block.rows = parts.take_as<bf16>(kRows * kGradBlock);
  }
  static float key_gradient_factor(const AttentionParams& p) { return p.softmax_scale; }
  static bf16* columns_of(bf16*, Parts& parts, int64_t queries, int64_t width) {
    return parts.take_as<bf16>(round_up(queries, kGradBlock) * width);
  }
  static void pack_query_columns(const Rows<const bf16>& q, int64_t queries, int64_t dim, bf16* packed,
                                 int64_t width) {
    typename MakeLanes<32>::type lanes;
    for (int64_t first = 0; first < queries; first += kGradBlock, packed += kGradBlock * width)
      for (int64_t i = 0; i < kGradBlock; i += kMatrixDepth)
        for (int64_t d = 0; d < width; d += kMatrixDepth) {
          auto words = [&](int64_t row) { return row < queries ? load_words(q[row] + d, dim - d) : vw{}; };
          vf block[2][kLanes];  // pairs of rows, of the first 16 elements and of the others
          for (int n = 0; n < kLanes; n++) {
            vw even = words(first + i + 2 * n), odd = words(first + i + 2 * n + 1);
            block[0][n] = (vf)interleave_words(even, odd, 0, lanes);
            block[1][n] = (vf)interleave_words(even, odd, 1, lanes);
          }
          transpose(block[0]), transpose(block[1]);
          for (int n = 0; n < kMatrixDepth; n++)
            store_words(packed + (d + n) * kGradBlock + i, (vw)block[n / kLanes][n % kLanes]);
        }
  }
  static FASTGPT_INLINE void keep(const Block& block, int64_t row, const float* probs, const float* dscores) {
    typename MakeLanes<32>::type lanes;
    for (int64_t r = 0; r < kRows; r += 2)
      for (int64_t c = 0; c < kGradBlock; c += kLanes) {
        int64_t even = r * kGradBlock + c, odd = even + kGradBlock, pairs = (row + r) * kGradBlock + 2 * c;
        store_words(block.probs + pairs, to_pairs(load(probs + even), load(probs + odd), lanes));
        store_words(block.dscores + pairs, to_pairs(load(dscores + even), load(dscores + odd), lanes));
      }
    for (int64_t n = 0; n < kRows * kGradBlock; n += kMatrixDepth)
      store_words(block.rows + n, to_words(load(dscores + n), load(dscores + n + kLanes)));
  }

  static FASTGPT_INLINE void add_keys(const Block& block, const float*, int64_t first, int64_t keys,
                                      const bf16* k, int64_t width, float* dq) {
    matrix_product<Update::add>(kRows, round_up(keys, kMatrixDepth), width, block.rows + first, kGradBlock, k,
                                2 * width, dq, width);
  }
  static FASTGPT_INLINE void add_queries(const bf16* probs, int64_t query, int64_t begin, int64_t end,
                                         const bf16* columns, int64_t width, int64_t key, int64_t j,
                                         float* gradient) {
    begin = (begin - query) / kMatrixDepth * kMatrixDepth;
    end = round_up(end - query, kMatrixDepth);
    for (int64_t d = 0; d < width; d += kRows)
      matrix_product<Update::add>(kRows, end - begin, kKeys, columns + query * width + d * kGradBlock + begin,
                                  kGradBlock, probs + begin * kGradBlock + 2 * (j - key), 2 * kGradBlock,
                                  gradient + key * width + d * kGradBlock + j - key, kGradBlock);
  }
  static void write_keys(const Rows<bf16>& target, const float* gradient, int64_t width, int64_t keys,
                         int64_t n, float factor) {
    for (int64_t j = 0; j < keys; j += kLanes)
      for (int64_t d = 0; d < n; d += kLanes) {
        const float* source =
            gradient + j / kGradBlock * kGradBlock * width + d * kGradBlock + j % kGradBlock;
        vf block[kLanes];
        for (int i = 0; i < kLanes; i++) block[i] = load(source + i * kGradBlock) * factor;
        transpose(block);
        for (int i = 0; i < kLanes && j + i < keys; i++) store_upto(target[j + i] + d, block[i], n - d);
      }
  }
};
