// How attention forward packs its operands and multiplies them, for queries stored in T and keys and values
// in KV: widened to fp32, scores already in base 2. amx.h has another way for some types.

constexpr int64_t kKeyBlock = 4 * kTileCols;  // keys whose scores are held at a time

template <class T, class KV>
struct Products {
  typedef float Element;                    // of packed operands
  static constexpr int kRows = kTileRows;   // of a register tile
  static constexpr int kTiles = 8;          // of a unit of work
  static constexpr int64_t kStep = kLanes;  // columns of scores come in multiples of it
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
