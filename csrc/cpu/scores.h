// What turns q.k into a score, beyond the interval of Mask, and what dropout keeps of a probability: shared
// by attention forward, backward and decode. Scores are in base 2: times log2(e).
//
//   s = softcap(x) + bias - slope |i + sk - sq - j|,   softcap(x) = softcap tanh(x / softcap)
//
// for query i and key j of their sequence; a boolean bias gives -inf where it is false.

// One row of scores: query i of head h in sequence b.
struct ScoreRow {
  const AttentionParams& p;
  float softcap = p.softcap * kLog2e, inverse_softcap = p.softcap ? 1.0f / softcap : 0.0f;
  float slope = 0.0f;
  int64_t diagonal;  // the key at distance 0
  const char* bias = nullptr;

  FASTGPT_INLINE ScoreRow(const AttentionParams& params, int64_t b, int64_t h, int64_t i)
      : p(params), diagonal(i + params.keys(b) - params.queries(b)) {
    if (p.alibi_slopes) slope = p.alibi_slopes[b * p.alibi_batch_stride + h] * kLog2e;
    if (p.bias.data) {
      const Bias& t = p.bias;
      int64_t offset = b * t.batch_stride + h * t.head_stride + i * t.query_stride +
                       (p.leftpad_k ? p.leftpad_k[b] * t.key_stride : 0);
      bias = static_cast<const char*>(t.data) + offset * element_size(t.type);
    }
  }

  static FASTGPT_INLINE int64_t element_size(BiasType type) {
    return type == BiasType::boolean ? 1 : type == BiasType::f32 ? 4 : 2;
  }

  // The scores of keys [j, j + n), n <= kLanes, from x = softmax_scale log2(e) q.k; and d score / d x.
  FASTGPT_INLINE vf operator()(vf x, int64_t j, int64_t n, vf* derivative) const {
    vf s = x;
    if (softcap) {
      vf t = tanh(x * inverse_softcap);
      s = t * softcap;
      if (derivative) *derivative = 1.0f - t * t;
    }
    if (bias) {
      int64_t size = element_size(p.bias.type) * p.bias.key_stride;
      const char* source = bias + j * size;
      switch (p.bias.type) {
        case BiasType::f32:
          s += base_2(values(reinterpret_cast<const float*>(source), n));
          break;
        case BiasType::bf16:
          s += base_2(values(reinterpret_cast<const bf16*>(source), n));
          break;
        case BiasType::f16:
          s += base_2(values(reinterpret_cast<const f16*>(source), n));
          break;
        case BiasType::boolean:
          s = shown(source, n) ? s : splat(-kInf);
      }
    }
    if (slope) {
      vi distance = lane_index() + static_cast<int32_t>(j - diagonal);
      vf d = __builtin_convertvector(distance, vf);
      s -= slope * (d < 0 ? -d : d);
    }
    return s;
  }

  // Of the largest finite numbers, which some masks have where others have infinity, the product is infinite.
  // (Bounded, it gives a row of them alone an lse of ln(2) times the least number.)
  static FASTGPT_INLINE vf base_2(vf x) {
    constexpr float kLargest = __FLT_MAX__;
    vf product = x * kLog2e;
    vf bounded = product > kLargest ? splat(kLargest) : product < -kLargest ? splat(-kLargest) : product;
    return x == kInf || x == -kInf ? x : bounded;
  }
  template <class T>
  FASTGPT_INLINE vf values(const T* source, int64_t n) const {
    if (p.bias.key_stride) return load_upto(source, n);
    return splat(load_first(source, 1)[0]);
  }
  // Which lanes' keys a boolean bias shows.
  FASTGPT_INLINE vi shown(const char* source, int64_t n) const {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = i < n && source[i * p.bias.key_stride] ? -1 : 0;
    vi result;
    __builtin_memcpy(&result, lanes, sizeof(result));
    return result;
  }
};

// Whether scores are anything but softmax_scale q.k.
FASTGPT_INLINE bool has_score_terms(const AttentionParams& p) {
  return p.softcap != 0.0f || p.alibi_slopes || p.bias.data;
}

// Turns x = factor scores[r][c] into the scores of queries first_query + r and keys first_key + c, c in
// [begin, end), multiples of kLanes; with `derivatives`, also d score / d x, stored alike.
inline void add_score_terms(const AttentionParams& p, int64_t b, int64_t h, int64_t first_query, int64_t rows,
                            int64_t first_key, int64_t begin, int64_t end, float factor, float* scores,
                            int64_t stride, float* derivatives) {
  int64_t keys = p.keys(b);
  for (int64_t r = 0; r < rows; r++) {
    ScoreRow row(p, b, h, first_query + r);
    for (int64_t c = begin; c < end; c += kLanes) {
      vf derivative = splat(1.0f);
      float* s = scores + r * stride + c;
      int64_t j = first_key + c;
      store(s, row(load(s) * factor, j, max(min(kLanes, keys - j), 0), &derivative));
      if (derivatives) store(derivatives + r * stride + c, derivative);
    }
  }
}

// Whether a boolean bias hides keys [begin, end) from all of the queries.
inline bool hidden_by_bias(const AttentionParams& p, int64_t b, int64_t h, int64_t first_query, int64_t rows,
                           int64_t begin, int64_t end) {
  if (!p.bias.data || p.bias.type != BiasType::boolean) return false;
  for (int64_t r = 0; r < (p.bias.query_stride ? rows : 1); r++) {
    const char* shown = ScoreRow(p, b, h, first_query + r).bias;
    if (p.bias.key_stride == 0) end = min(end, begin + 1);
    char any = 0;
    for (int64_t j = begin; j < end; j++) any |= shown[j * p.bias.key_stride];
    if (any) return false;
  }
  return true;
}

// --- dropout ---

// keep[c] = 1 where dropout keeps the probability of query i and key first_key + c, else 0, for c < n.
// first_key is a multiple of 4; writes up to 4 kLanes - 1 floats past the end.
inline void dropout_row(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t first_key,
                        int64_t n, float* keep) {
  for (int64_t c = 0; c < n; c += 4 * kLanes) {
    vf kept[4];
    keep_elements(p, first_key + c, static_cast<uint32_t>(i), static_cast<uint32_t>(b * p.nheads + h), kept);
    for (int v = 0; v < 4; v++) store(keep + c + v * kLanes, kept[v]);
  }
}
