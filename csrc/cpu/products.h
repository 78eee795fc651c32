// How attention forward and backward pack their operands and multiply them: widened to fp32. amx.h has
// another way for bf16.

constexpr int64_t kKeyBlock = 4 * kTileCols;  // keys whose scores forward holds at a time
constexpr int64_t kGradBlock = 96;            // queries and keys of a block of backward

// Forward's, for queries stored in T and keys and values in KV: scores are in base 2 already.
template <class T, class KV>
struct Products {
  typedef float Element;                    // of packed operands
  static constexpr int kRows = kTileRows;   // of a register tile
  static constexpr int kTiles = 8;          // of a unit of work
  static constexpr int64_t kStep = kLanes;  // columns of scores come in multiples of it
  static constexpr bool kScaled = true;     // products are scores: packed queries carry the factor
  struct Unit {};                           // what a thread needs while it multiplies

  static int64_t row_width(int64_t dim) { return round_up(dim, kLanes); }  // of a packed row of q and v
  static int64_t key_width(int64_t dim) { return dim; }                    // of k
  static FASTGPT_INLINE int64_t rows_computed(int64_t) { return kRows; }
  static float score_factor(const AttentionParams&) { return 1.0f; }
  static FASTGPT_INLINE float* probs_of(float* scores, Parts&) { return scores; }
  static FASTGPT_INLINE void store_probs(float* target, const vf (&prob)[1]) { store(target, prob[0]); }

  static void pack_queries(const Rows<const T>& q, int64_t rows, int64_t padded, int64_t dim, float factor,
                           float* packed, int64_t width) {
    pack_rows(q, rows, dim, factor, packed, width);
    fill_zero(packed + rows * width, (padded - rows) * width);
  }
  template <class Source>
  static void pack_keys(const Source& k, int64_t keys, int64_t dim, float factor, float* packed) {
    pack_panels(k, keys, dim, factor, packed);
  }
  template <class Source>
  static void pack_values(const Source& v, int64_t keys, int64_t dim, float factor, float* packed,
                          int64_t width) {
    pack_rows(v, keys, dim, factor, packed, width);
  }

  // scores (rows, cols) of packed queries and a panel of keys.
  static FASTGPT_INLINE void scores(int64_t, int64_t dim, int64_t cols, const float* q, int64_t q_width,
                                    const float* k, float* c, int64_t ldc) {
    tile_product<Update::overwrite>(dim, cols, q, q_width, k, kTileCols, c, ldc);
  }
  // o = diag(rescale) o + probs v, over `keys` keys.
  static FASTGPT_INLINE void add_values(int64_t, int64_t keys, int64_t width, const float* probs, int64_t ldp,
                                        const float* v, float* o, const float* rescale) {
    tile_product<Update::rescale>(keys, width, probs, ldp, v, width, o, width, rescale);
  }
};

// What backward multiplies beyond scores. A block of p and ds is kept whole in fp32, by rows.
template <class T>
struct GradientProducts : Products<T, T> {
  static constexpr int64_t kScoreRows = kGradBlock;  // of p and ds that are held in fp32
  static constexpr int64_t kKeys = kTileRows;        // whose gradients are added to at a time
  struct Block {
    float *probs, *dscores;
  };

  static void lay_out(Block& block, float* probs, float* dscores, Parts&) { block = {probs, dscores}; }
  // What dk is multiplied by: packed queries are times softmax_scale log2(e).
  static float key_gradient_factor(const AttentionParams&) { return kLn2; }
  // Queries as the operand of products over them: here their rows.
  static float* columns_of(float* rows, Parts&, int64_t, int64_t) { return rows; }
  static void pack_query_columns(const Rows<const T>&, int64_t, int64_t, float*, int64_t) {}
  // Takes over p and ds of a register tile, whose first row is `row` of the block.
  static FASTGPT_INLINE void keep(const Block&, int64_t, const float*, const float*) {}

  // dq += ds k for a register tile of ds and `keys` keys from `first` of the block on, k and dq where they
  // begin.
  static FASTGPT_INLINE void add_keys(const Block&, const float* dscores, int64_t first, int64_t keys,
                                      const float* k, int64_t width, float* dq) {
    tile_product<Update::add>(keys, width, dscores + first, kGradBlock, k, width, dq, width);
  }
  // gradient += probs^T columns, for keys j and following, and queries [begin, end), of the block (query,
  // key).
  static FASTGPT_INLINE void add_queries(const float* probs, int64_t query, int64_t begin, int64_t end,
                                         const float* columns, int64_t width, int64_t key, int64_t j,
                                         float* gradient) {
    tile_product<Update::add, true>(end - begin, width, probs + (begin - query) * kGradBlock + j - key,
                                    kGradBlock, columns + begin * width, width, gradient + j * width, width);
  }
  static void write_keys(const Rows<T>& target, const float* gradient, int64_t width, int64_t keys, int64_t n,
                         float factor) {
    for (int64_t j = 0; j < keys; j++)
      for (int64_t d = 0; d < n; d += kLanes)
        store_upto(target[j] + d, load(gradient + j * width + d) * factor, n - d);
  }
};
