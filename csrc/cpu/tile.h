// The register tile that every matrix product of the attention kernels is made of, and the packing
// of its operands.

// kTileRows x kTileCols accumulators fill the register file: 12 x 2 vectors of 32 registers (AVX-512), 6 x 2
// of 16 (AVX2).
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__aarch64__)
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileCols = kTileVectors * kLanes;

FASTGPT_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
FASTGPT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGPT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

enum class Update { overwrite, add, rescale };

// One tile of C = A B (overwrite), C + A B (add) or diag(scale) C + A B (rescale), all fp32:
//   A(m, k) = a[m * lda + k], or a[k * lda + m] if transposed, m < kTileRows, k < depth
//   B(k, n) = b[k * ldb + n],  C(m, n) = c[m * ldc + n], n < Vectors * kLanes
template <Update kUpdate, bool kTransposed, int kVectors>
FASTGPT_INLINE void tile_columns(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                                 float* c, int64_t ldc, const float* scale) {
  vf acc[kTileRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) acc[m][v] = vf{};
  for (int64_t k = 0; k < depth; k++) {
    vf bk[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) bk[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; m++) {
      float am = kTransposed ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) acc[m][v] += bk[v] * am;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) {
      // C is added at the end: a long sum, made of many tiles, is rounded to its own size once a tile.
      float* target = c + m * ldc + v * kLanes;
      if (kUpdate == Update::add) acc[m][v] += load(target);
      if (kUpdate == Update::rescale) acc[m][v] += load(target) * scale[m];
      store(target, acc[m][v]);
    }
}

// The same for `cols` columns, a multiple of kLanes.
template <Update kUpdate, bool kTransposed = false>
__attribute__((noinline)) void tile_product(int64_t depth, int64_t cols, const float* a, int64_t lda,
                                            const float* b, int64_t ldb, float* c, int64_t ldc,
                                            const float* scale = nullptr) {
  int64_t n = 0;
  for (; n + kTileCols <= cols; n += kTileCols)
    tile_columns<kUpdate, kTransposed, kTileVectors>(depth, a, lda, b + n, ldb, c + n, ldc, scale);
  for (; n < cols; n += kLanes)
    tile_columns<kUpdate, kTransposed, 1>(depth, a, lda, b + n, ldb, c + n, ldc, scale);
}

// Packs rows [0, rows) of `source`, of `dim` elements each, times `factor`, into panels of
// kTileCols rows with the row index fastest: panel p holds element (p * kTileCols + r, d) at
// packed[(p * dim + d) * kTileCols + r]. Missing rows of the last panel are zero.
template <class Source>
void pack_panels(const Source& source, int64_t rows, int64_t dim, float factor, float* packed) {
  for (int64_t panel = 0; panel < rows; panel += kTileCols, packed += dim * kTileCols)
    for (int64_t r = 0; r < kTileCols; r += kLanes)
      for (int64_t d = 0; d < dim; d += kLanes) {
        vf block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
          int64_t row = panel + r + i;
          block[i] = row < rows ? load_upto(source[row] + d, dim - d) * factor : vf{};
        }
        transpose(block);
        int64_t valid = min(kLanes, dim - d);
        for (int64_t i = 0; i < valid; i++) store(packed + (d + i) * kTileCols + r, block[i]);
      }
}

// Widens rows [0, rows) of `source`, of `dim` elements each, times `factor`, to fp32 rows of
// `width` >= dim floats, zero-filled.
template <class Source>
void pack_rows(const Source& source, int64_t rows, int64_t dim, float factor, float* packed, int64_t width) {
  for (int64_t row = 0; row < rows; row++, packed += width)
    for (int64_t d = 0; d < width; d += kLanes)
      store(packed + d, d < dim ? load_upto(source[row] + d, dim - d) * factor : vf{});
}
