// The two halves of a transformer's block for a few rows, a token's at every step of generation: the products
// of linear.h with what lies between them, so that nothing but memory's rate is left to wait for.
//
//   MLP:        out = down(activation(up(x))), or down(activation(gate(x)) up(x))   (Shazeer 2020, SwiGLU)
//   attention:  q, k, v = projections of x; heads of q and k normed and rotated; k, v appended to the caches;
//               out = to_out(attention of q over the caches)
//   in a block, out = x + after(the same of before(x)), with one or both of these norms
//
// Each step rounds to storage what it would if it were called by itself, and calls the same kernels: the bits
// are those of a sequence of calls. Tests: tests/test_block.py.

// activation(x) = x sigmoid(z), z = x: silu; z = 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu, of which
// 0.5 (1 + tanh(z / 2)) is sigmoid(z).
template <Activation kActivation>
FASTGPT_INLINE vf activated(vf x) {
  vf z = x;
  if (kActivation == Activation::gelu_tanh) z = x * (1.59576912160573071f + 0.0713548162726009f * x * x);
  vf size = (vf)((vu)z & 0x7fffffffu);
  vf e = exp2(size * -kLog2e);  // of -|z|: never above 1
  return x * (z < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// Norms of `rows` rows, without threads; out, which is contiguous, may be x. statistics: 2 rows floats.
template <class T>
void normalise(const FewRowsNorm& of, DType dtype, const T* x, int64_t x_stride, int64_t rows, int64_t hidden,
               T* out, float* statistics) {
  NormForwardParams norm{};
  norm.dtype = norm.weight_dtype = dtype;
  norm.rows = rows;
  norm.hidden = hidden;
  norm.x = x;
  norm.x_stride = x_stride;
  norm.weight = of.weight;
  norm.bias = of.bias;
  norm.eps = of.eps;
  norm.weight_offset = of.weight_offset;
  norm.out = out;
  norm.rstd = statistics;
  norm.mean = of.rms ? nullptr : statistics + rows;
  norm.num_threads = 1;
  NormForward<T>{norm}.run();
}

// What stands around both halves.
template <class T>
struct HalfBlock {
  const HalfBlockParams& p;
  T* normed = nullptr;
  float* statistics = nullptr;

  void lay_out(Parts& parts) {
    normed = parts.template take_as<T>(p.before.exists ? p.rows * p.in_features : 0);
    statistics = parts.take(2 * p.rows);
  }
  // The first projections, of x or of its norm, to there.
  LinearParams begin(T* out) {
    LinearParams linear = p;
    if (p.before.exists) {
      normalise(p.before, p.dtype, static_cast<const T*>(p.x), p.x_stride, p.rows, p.in_features, normed,
                statistics);
      linear.x = normed;
      linear.x_stride = p.in_features;
    }
    linear.out = out;
    Linear<T>{linear}.run();
    return linear;
  }
  // The last projection, of x (rows, in_features), to out, its norm, and the addition.
  void end(LinearParams linear, const Projection& projection, const T* x, int64_t in_features,
           int64_t x_stride) {
    linear.x = x;
    linear.in_features = in_features;
    linear.x_stride = x_stride;
    linear.projections[0] = projection;
    linear.count = 1;
    linear.out = p.out;
    Linear<T>{linear}.run();
    T* result = static_cast<T*>(p.out);
    int64_t width = projection.out_features;
    if (p.after.exists) normalise<T>(p.after, p.dtype, result, width, p.rows, width, result, statistics);
    if (!p.residual) return;
    for (int64_t r = 0; r < p.rows; r++) {
      const T* residual = static_cast<const T*>(p.x) + r * p.x_stride;
      T* out = result + r * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        int64_t n = min(kLanes, width - i);
        store_upto(out + i, load_upto(residual + i, n) + load_upto(out + i, n), n);
      }
    }
  }
};

template <class T>
struct Mlp {
  const MlpParams& p;

  void run() {
    int64_t rows = p.rows, stride = p.out_stride(), width = p.gated ? stride / 2 : stride;
    HalfBlock<T> half{p};
    T* hidden;
    auto lay_out = [&](float* floats) {
      Parts parts{floats};
      half.lay_out(parts);
      hidden = parts.template take_as<T>(rows * stride);
      return parts.size;
    };
    lay_out(outer_scratch(lay_out(nullptr)));
    LinearParams linear = half.begin(hidden);
    for (int64_t r = 0; r < rows; r++) {
      T* row = hidden + r * stride;
      if (p.activation == Activation::silu)
        activate<Activation::silu>(row, width);
      else
        activate<Activation::gelu_tanh>(row, width);
    }
    half.end(linear, p.down, hidden, width, stride);
  }

  // In place; the other factors lie behind the row.
  template <Activation kActivation>
  void activate(T* row, int64_t width) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      int64_t n = min(kLanes, width - i);
      store_upto(row + i, activated<kActivation>(load_upto(row + i, n)), n);
      if (p.gated) store_upto(row + i, load_upto(row + i, n) * load_upto(row + width + i, n), n);
    }
  }
};

template <class T>
struct AttentionBlock {
  const AttentionBlockParams& p;

  void run() {
    DecodeParams attention = p.attention;
    int64_t rows = p.rows, stride = p.out_stride(), headdim = attention.headdim;
    int64_t batch = attention.batch, seqlen = attention.seqlen_q;
    int64_t nheads = attention.nheads, nheads_k = attention.nheads_k;

    HalfBlock<T> half{p};
    struct {
      T *qkv, *attended;
      float *lse, *statistics;
      int32_t* seqused_k;
    } memory;
    auto lay_out = [&](float* floats) {
      Parts parts{floats};
      half.lay_out(parts);
      memory.qkv = parts.template take_as<T>(rows * stride);
      memory.attended = parts.template take_as<T>(rows * nheads * headdim);
      memory.lse = parts.take(rows * nheads);
      memory.statistics = parts.take(2 * nheads);
      memory.seqused_k = parts.template take_as<int32_t>(batch);
      return parts.size;
    };
    lay_out(outer_scratch(lay_out(nullptr)));

    LinearParams linear = half.begin(memory.qkv);
    for (int64_t r = 0; r < rows; r++) {
      T *q = memory.qkv + r * stride, *k = q + nheads * headdim;
      norm_heads(p.q_norm, q, nheads, memory.statistics);
      norm_heads(p.k_norm, k, nheads_k, memory.statistics);
      if (p.cos && p.rotary_dtype == p.dtype) rotate<T>(q, nheads + nheads_k, r / seqlen, r % seqlen);
      if (p.cos && p.rotary_dtype != p.dtype) rotate<float>(q, nheads + nheads_k, r / seqlen, r % seqlen);
    }

    attention.q = {memory.qkv, seqlen * stride, stride, headdim};
    attention.k_new = attention.v_new = attention.q;
    attention.k_new.data = memory.qkv + nheads * headdim;
    attention.v_new.data = memory.qkv + (nheads + nheads_k) * headdim;
    attention.seqlen_new = seqlen;
    attention.out = {memory.attended, seqlen * nheads * headdim, nheads * headdim, headdim};
    attention.lse = memory.lse;
    attention.seqlen_k = 0;
    for (int64_t b = 0; b < batch; b++) {
      int64_t length = p.cache_seqlens[b] + seqlen;
      memory.seqused_k[b] = static_cast<int32_t>(length);
      attention.seqlen_k = max(attention.seqlen_k, length);
    }
    attention.seqused_k = memory.seqused_k;
    Decode<T>{attention}.run();

    half.end(linear, p.to_out, memory.attended, nheads * headdim, nheads * headdim);
  }

  void norm_heads(const FewRowsNorm& norm, T* heads, int64_t count, float* statistics) const {
    if (!norm.exists) return;
    int64_t hidden = p.attention.headdim;
    if (p.heads_together) hidden *= count, count = 1;
    normalise<T>(norm, p.dtype, heads, hidden, count, hidden, heads, statistics);
  }

  // Rotary embedding of the heads of a token, in place: (x1, x2), a head's halves, become
  // (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2).
  template <class Table>
  void rotate(T* heads, int64_t count, int64_t b, int64_t t) const {
    const Table* cos = static_cast<const Table*>(p.cos) + b * p.cos_strides[0] + t * p.cos_strides[1];
    const Table* sin = static_cast<const Table*>(p.sin) + b * p.sin_strides[0] + t * p.sin_strides[1];
    int64_t half = p.attention.headdim / 2;
    for (int64_t h = 0; h < count; h++, heads += p.attention.headdim)
      for (int64_t i = 0; i < half; i += kLanes) {
        int64_t n = min(kLanes, half - i);
        vf x1 = load_upto(heads + i, n), x2 = load_upto(heads + half + i, n);
        store_upto(heads + i, x1 * load_upto(cos + i, n) - x2 * load_upto(sin + i, n), n);
        store_upto(heads + half + i,
                   x2 * load_upto(cos + p.second + i, n) + x1 * load_upto(sin + p.second + i, n), n);
      }
  }
};
