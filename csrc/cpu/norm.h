// Layer norm and RMS norm, forward and backward, one row of `hidden` elements at a time.
//
//   z = dropout(x) + residual, rounded to their type; dropout(x) = x keep / (1 - dropout_p)
//   layer norm: mean = sum(z) / hidden, rstd = 1 / sqrt(sum((z - mean)^2) / hidden + eps)
//   RMS norm:   mean = 0,               rstd = 1 / sqrt(sum(z^2) / hidden + eps)
//   xhat = (z - mean) rstd,  out = xhat weight + bias
//
// Ba et al. 2016 (arXiv:1607.06450); Zhang and Sennrich 2019 (arXiv:1910.07467).
//
// x, residual, dout, dresidual (rows, hidden) in fp32, bf16 or fp16, any row stride; out, residual_out, dx,
// dsum the same, contiguous; weight, bias, dweight, dbias (hidden) in fp32, bf16 or fp16, independent of x's
// type; mean, rstd (rows) fp32. All arithmetic is fp32, and `out` is rounded once. The norm is that of the
// rounded sum, which is what backward finds stored: where the variance is small, statistics of the unrounded
// one would not be those of its rows. One pass finds mean and variance of z - pivot, the pivot being the mean
// of the first elements: var(z) = mean((z - pivot)^2) - mean(z - pivot)^2. Where the two moments are larger
// than twice their difference, a second pass finds those of z - mean, so never is a variance a difference of
// large moments.
//
// One unit of work owns a block of rows that depends on the shape alone, so the bits depend neither on
// the number of threads nor, row by row, on the batch. The last vector of a row is loaded and stored in
// part. Which elements dropout keeps is counted by row and column (dropout.h), and counted again in backward.
// Error bounds: tests/test_norm.py::test_forward_parity and ::test_backward_parity.

// (hidden) weights as fp32: `source` itself if it is fp32, else `buffer`, filled with `missing` if null.
inline const float* as_fp32(const void* source, DType dtype, int64_t hidden, float missing, float* buffer) {
  int64_t width = round_up(hidden, kLanes);
  if (!source)
    for (int64_t i = 0; i < width; i += kLanes) store(buffer + i, splat(missing));
  else if (dtype == DType::f32)
    return static_cast<const float*>(source);
  else if (dtype == DType::bf16)
    pack_rows(Rows<const bf16>{static_cast<const bf16*>(source), 0}, 1, hidden, 1.0f, buffer, width);
  else
    pack_rows(Rows<const f16>{static_cast<const f16*>(source), 0}, 1, hidden, 1.0f, buffer, width);
  return buffer;
}

// Calls body(i, n, factor) for every vector of row r: its n elements from i on, and what dropout multiplies
// them by.
template <class Body>
FASTGPT_INLINE void for_each_dropped(const Dropout& p, int64_t r, int64_t hidden, const Body& body) {
  for (int64_t first = 0; first < hidden; first += 4 * kLanes) {
    vf keep[4];
    keep_elements(p, first, static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), keep);
    for (int v = 0; v < 4; v++) {
      int64_t i = first + v * kLanes;
      if (i < hidden) body(i, min(kLanes, hidden - i), keep[v] * p.dropout_scale);
    }
  }
}

constexpr int64_t kSummed = 4096;  // elements of a row: longer sums, made of these, are rounded less often

template <class T>
struct NormForward {
  const NormForwardParams& p;
  int64_t width = round_up(p.hidden, 16);
  float scale = 1.0f / static_cast<float>(p.hidden);

  void run() {
    int64_t unit_rows = max(1, kUnitElements / p.hidden);
    int64_t units = (p.rows + unit_rows - 1) / unit_rows, workers = min(units, p.num_threads);
    Rows<float> buffers = scratch_rows(2 + 2 * max(workers, 1), width);
    const float* weight = as_fp32(p.weight, p.weight_dtype, p.hidden, 1.0f, buffers[0]);
    if (p.weight_offset != 0.0f) {
      for (int64_t i = 0; i < p.hidden; i++) buffers[0][i] = weight[i] + p.weight_offset;
      weight = buffers[0];
    }
    const float* bias = as_fp32(p.bias, p.weight_dtype, p.hidden, 0.0f, buffers[1]);
    parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
      int64_t end = min(p.rows, (unit + 1) * unit_rows);
      for (int64_t r = unit * unit_rows; r < end; r++)
        normalise(r, weight, bias, buffers[2 + 2 * worker], buffers[3 + 2 * worker]);
    });
  }

  // Row r of z, in residual_out, in `buffer` or x's own.
  FASTGPT_INLINE const T* add_row(int64_t r, float* buffer) {
    const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
    if (!p.residual && !p.dropout_threshold) return x;
    const T* residual = static_cast<const T*>(p.residual);
    if (residual) residual += r * p.residual_stride;
    T* z = p.residual_out ? static_cast<T*>(p.residual_out) + r * p.hidden : reinterpret_cast<T*>(buffer);
    if (p.dropout_threshold) {
      for_each_dropped(p, r, p.hidden, [&](int64_t i, int64_t n, vf factor) {
        vf dropped = load_upto(x + i, n) * factor;
        store_upto(z + i, residual ? dropped + load_upto(residual + i, n) : dropped, n);
      });
      return z;
    }
    for_each_vector(p.hidden, [&](int64_t i, int64_t n, int) {
      store_upto(z + i, load_upto(x + i, n) + load_upto(residual + i, n), n);
    });
    return z;
  }

  // The mean of a row's first elements.
  FASTGPT_INLINE float pivot(const T* row) {
    int64_t count = min(p.hidden, kSums * kLanes);
    vf sums[kSums] = {};
    for_each_vector(count, [&](int64_t i, int64_t n, int s) { sums[s] += load_upto(row + i, n); });
    return total(sums) / static_cast<float>(count);
  }

  struct Moments {
    float mean, variance;
  };

  // Those of row - center, or, not kCentered, the mean square and no mean; with `copy` also row as fp32 to
  // there.
  template <bool kCentered, class Row>
  FASTGPT_INLINE Moments statistics(const Row* row, float center, float* copy) {
    float sum = 0.0f, square = 0.0f;
    for (int64_t first = 0; first < p.hidden; first += kSummed) {
      vf sums[kSums] = {}, squares[kSums] = {};
      for_each_vector(min(kSummed, p.hidden - first), [&](int64_t i, int64_t n, int s) {
        vf x = load_upto(row + first + i, n);
        if (copy) store(copy + first + i, x);
        if (kCentered) x = n == kLanes || lane_index() < static_cast<int32_t>(n) ? x - center : vf{};
        if (kCentered) sums[s] += x;
        squares[s] += x * x;
      });
      sum += total(sums);
      square += total(squares);
    }
    float mean = sum * scale;
    return {mean, square * scale - mean * mean};
  }

  FASTGPT_INLINE void normalise(int64_t r, const float* weight, const float* bias, float* widened,
                                float* added) {
    const T* row = add_row(r, added);
    constexpr bool kNarrow = sizeof(T) < sizeof(float);
    const float* z = kNarrow ? widened : reinterpret_cast<const float*>(row);
    float* copy = kNarrow ? widened : nullptr;
    float mean = p.mean ? pivot(row) : 0.0f;
    Moments of_z = p.mean ? statistics<true>(row, mean, copy) : statistics<false>(row, mean, copy);
    if (p.mean && !(of_z.variance >= of_z.mean * of_z.mean &&
                    of_z.variance < kInf)) {  // too far from the mean for a difference of moments
      mean += of_z.mean;
      of_z = statistics<true>(z, mean, nullptr);
    }
    float rstd = 1.0f / __builtin_sqrtf((of_z.variance < 0 ? 0.0f : of_z.variance) + p.eps);
    if (p.mean) p.mean[r] = mean + of_z.mean;
    p.rstd[r] = rstd;
    T* out = static_cast<T*>(p.out) + r * p.hidden;
    float offset = -of_z.mean * rstd;
    for_each_vector(p.hidden, [&](int64_t i, int64_t n, int) {
      vf xhat = (load_upto(z + i, n) - mean) * rstd + offset;
      store_upto(out + i, xhat * load_upto(weight + i, n) + load_upto(bias + i, n), n);
    });
  }
};

// With g = dout weight, of out = xhat weight + bias and xhat = (z - mean) rstd:
//   dsum = rstd (g - sum(g) / hidden - xhat sum(g xhat) / hidden) + dresidual   (RMS norm: no sum(g))
//   dx = dsum keep / (1 - dropout_p), of z = dropout(x) + residual; without dropout dsum is dx
//   dweight = sum over rows of dout xhat,  dbias = sum over rows of dout
// x is the sum z. A unit owns the rows of one chunk, adds their dweight and dbias to
// fp32 sums of its own, and these are added in the order of the chunks.
template <class T>
struct NormBackward {
  const NormBackwardParams& p;
  int64_t width = round_up(p.hidden, 16);
  float scale = 1.0f / static_cast<float>(p.hidden);

  void run() {
    constexpr int64_t kMaxChunks = 64, kMinChunkRows = 8;  // bound the memory and the traffic of the sums
    int64_t chunk_rows =
        max(max(kMinChunkRows, kUnitElements / p.hidden), (p.rows + kMaxChunks - 1) / kMaxChunks);
    int64_t chunks = (p.rows + chunk_rows - 1) / chunk_rows;
    int64_t workers = min(chunks, p.num_threads);
    Rows<float> buffers = scratch_rows(1 + workers + 2 * max(chunks, 1), width);
    Rows<float> partial = buffers.from(1 + workers);  // rows 2 c and 2 c + 1: dweight and dbias of chunk c
    const float* weight = as_fp32(p.weight, p.weight_dtype, p.hidden, 1.0f, buffers[0]);
    parallel_units(chunks, workers, [&](int64_t chunk, int64_t worker) {
      float *dweight = partial[2 * chunk], *dbias = partial[2 * chunk + 1];
      fill_zero(dweight, width);
      fill_zero(dbias, width);
      int64_t end = min(p.rows, (chunk + 1) * chunk_rows);
      for (int64_t r = chunk * chunk_rows; r < end; r++)
        differentiate(r, weight, buffers[1 + worker], dweight, dbias);
    });
    reduce(partial, chunks, p.dweight);
    reduce(partial.from(1), chunks, p.dbias);
  }

  FASTGPT_INLINE void differentiate(int64_t r, const float* weight, float* g_row, float* dweight,
                                    float* dbias) {
    const T* dout = static_cast<const T*>(p.dout) + r * p.dout_stride;
    const T* z = static_cast<const T*>(p.x) + r * p.x_stride;
    const T* dresidual = static_cast<const T*>(p.dresidual);
    if (dresidual) dresidual += r * p.dresidual_stride;
    T* dx = static_cast<T*>(p.dx) + r * p.hidden;
    float mean = p.mean ? p.mean[r] : 0.0f, rstd = p.rstd[r];
    vf sums[kSums] = {}, products[kSums] = {};
    for_each_vector(p.hidden, [&](int64_t i, int64_t n, int s) {
      vf g = load_upto(dout + i, n) * load_upto(weight + i, n);
      store(g_row + i, g);
      sums[s] += g;
      products[s] += g * ((load_upto(z + i, n) - mean) * rstd);
    });
    float mean_g = p.mean ? total(sums) * scale : 0.0f, mean_gx = total(products) * scale;
    auto differentiate_sum = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      vf dy = load_upto(dout + i, n), xhat = (load_upto(z + i, n) - mean) * rstd;
      // From memory: multiplied again, g would be fused with the difference, and not rounded as in mean_g.
      vf d = rstd * (load(g_row + i) - mean_g - xhat * mean_gx);
      if (dresidual) d += load_upto(dresidual + i, n);
      store(dweight + i, load(dweight + i) + dy * xhat);
      store(dbias + i, load(dbias + i) + dy);
      return d;
    };
    if (!p.dropout_threshold) {
      for_each_vector(p.hidden,
                      [&](int64_t i, int64_t n, int) { store_upto(dx + i, differentiate_sum(i, n), n); });
      return;
    }
    T* dsum = static_cast<T*>(p.dsum);
    if (dsum) dsum += r * p.hidden;
    for_each_dropped(p, r, p.hidden, [&](int64_t i, int64_t n, vf factor) {
      vf d = differentiate_sum(i, n);
      if (dsum) store_upto(dsum + i, d, n);
      store_upto(dx + i, d * factor, n);
    });
  }

  // Adds the chunks' sums, every other row, in order into the first, and stores them in the weights' type.
  void reduce(Rows<float> partial, int64_t chunks, void* gradient) {
    if (!gradient) return;
    float* sums = partial[0];
    if (chunks == 0) fill_zero(sums, width);
    int64_t unit_columns = 1024, units = (p.hidden + unit_columns - 1) / unit_columns;
    parallel_units(units, chunks * p.hidden < 2 * kUnitElements ? 1 : min(units, p.num_threads),
                   [&](int64_t unit, int64_t) {
                     int64_t end = min(p.hidden, (unit + 1) * unit_columns);
                     for (int64_t c = 1; c < chunks; c++)
                       for (int64_t i = unit * unit_columns; i < end; i += kLanes)
                         store(sums + i, load(sums + i) + load(partial[2 * c] + i));
                     for (int64_t i = unit * unit_columns; i < end; i += kLanes) {
                       vf sum = load(sums + i);
                       if (p.weight_dtype == DType::f32)
                         store_upto(static_cast<float*>(gradient) + i, sum, p.hidden - i);
                       else if (p.weight_dtype == DType::bf16)
                         store_upto(static_cast<bf16*>(gradient) + i, sum, p.hidden - i);
                       else
                         store_upto(static_cast<f16*>(gradient) + i, sum, p.hidden - i);
                     }
                   });
  }
};
