// Attention backward: dq, dk, dv from dout and the saved out and lse (FlashAttention, Dao et al. 2022,
// algorithm 4). With s = scale q k^T, p = exp(s - lse) and out = p v (attention_forward.h):
//   dv = p^T dout                      dp = dout v^T
//   ds = p (dp - delta)                delta_i = sum_d dout_id out_id - dlse_i
//   dq = scale ds k                    dk = scale ds^T q
//
// Shapes, dtypes and strides as in forward; gradients have their tensor's shape, storage rounded once
// from fp32 accumulators. One unit of work = one kv head: its thread walks over all query heads of the
// group, key blocks and query blocks in a fixed order, so nothing is added atomically and the bits do not
// depend on the number of threads. p is recomputed from lse, in base 2.
//
// Rows that see no key (lse = -inf) give 0. Error bound: tests/test_attention.py::test_backward_parity.

constexpr int64_t kGradBlock = 96;  // queries and keys of a block: whole register tiles in both directions
static_assert(kGradBlock % kTileRows == 0 && kGradBlock % kTileCols == 0, "a block is whole register tiles");

template <class T>
struct AttentionBackward {
  const AttentionBackwardParams& p;
  int64_t sq = p.seqlen_q, sk = p.seqlen_k, dim = p.headdim, dim_v = p.headdim_v;
  int64_t width = round_up(dim, kLanes), width_v = round_up(dim_v, kLanes);
  int64_t sq_padded = round_up(sq, kTileRows), sk_padded = round_up(sk, kTileCols* kTileRows);
  Mask mask{sq, sk, p.window_left, p.window_right};

  // What one thread holds: a kv head, then one of its query heads, then the block at hand.
  // "panels" are the operand of products over the head dim, "rows" of products over keys or queries.
  struct Workspace {
    float *k_panels, *k_rows, *v_panels, *dk, *dv;
    float *q_panels, *q_rows, *dout_panels, *dout_rows, *dq, *lse, *delta;
    float *probs, *dscores;
  };

  // Lays the workspace out from `base`; returns its size.
  int64_t lay_out(Workspace& w, float* base) const {
    int64_t size = 0;
    auto take = [&](float*& field, int64_t floats) {
      field = base + size;
      size += round_up(floats, 16) + 16;  // packing writes up to a vector past the end
    };
    take(w.k_panels, sk_padded * dim);
    take(w.k_rows, sk * width);
    take(w.v_panels, sk_padded * dim_v);
    take(w.dk, sk_padded * width);
    take(w.dv, sk_padded * width_v);
    take(w.q_panels, sq_padded * dim);
    take(w.q_rows, sq * width);
    take(w.dout_panels, sq_padded * dim_v);
    take(w.dout_rows, sq * width_v);
    take(w.dq, sq_padded * width);
    take(w.lse, sq_padded);
    take(w.delta, sq_padded);
    take(w.probs, kGradBlock * kGradBlock);
    take(w.dscores, kGradBlock * kGradBlock);
    return size;
  }

  void run() {
    int64_t kv_heads = p.batch * p.nheads_k;
    int threads = static_cast<int>(max(1, min(p.num_threads, kv_heads)));
    Workspace unused;
    int64_t thread_size = lay_out(unused, nullptr);
    float* workspaces = scratch(threads * thread_size);
    int64_t unit_counter = 0, thread_counter = 0;
#pragma omp parallel num_threads(threads)
    {
      Workspace w;
      lay_out(w, workspaces + next_unit(&thread_counter) * thread_size);
      for (int64_t u; (u = next_unit(&unit_counter)) < kv_heads;) kv_head(u / p.nheads_k, u % p.nheads_k, w);
    }
  }

  void kv_head(int64_t b, int64_t h_k, const Workspace& w) {
    Rows<const T> k = rows_of<const T>(p.k, b, h_k), v = rows_of<const T>(p.v, b, h_k);
    pack_panels<kTileCols>(k.data, k.stride, sk, dim, 1.0f, w.k_panels);
    pack_panels<kTileCols>(v.data, v.stride, sk, dim_v, 1.0f, w.v_panels);
    pack_rows(k.data, k.stride, sk, dim, 1.0f, w.k_rows, width);
    fill_zero(w.dk, sk_padded * width);
    fill_zero(w.dv, sk_padded * width_v);
    int64_t group = p.nheads / p.nheads_k;
    for (int64_t h = h_k * group; h < (h_k + 1) * group; h++) query_head(b, h, w);
    write_rows(rows_of<T>(p.dk, b, h_k), w.dk, width, sk, dim, 1.0f);
    write_rows(rows_of<T>(p.dv, b, h_k), w.dv, width_v, sk, dim_v, 1.0f);
  }

  void query_head(int64_t b, int64_t h, const Workspace& w) {
    Rows<const T> q = rows_of<const T>(p.q, b, h), dout = rows_of<const T>(p.dout, b, h);
    Rows<const T> out = rows_of<const T>(p.out, b, h);
    pack_panels<kTileRows>(q.data, q.stride, sq, dim, p.softmax_scale * kLog2e, w.q_panels);
    pack_rows(q.data, q.stride, sq, dim, p.softmax_scale, w.q_rows, width);
    pack_panels<kTileRows>(dout.data, dout.stride, sq, dim_v, 1.0f, w.dout_panels);
    pack_rows(dout.data, dout.stride, sq, dim_v, 1.0f, w.dout_rows, width_v);
    fill_zero(w.dq, sq_padded * width);
    const float* lse = p.lse + (b * p.nheads + h) * sq;
    const float* dlse = p.dlse ? p.dlse + (b * p.nheads + h) * sq : nullptr;
    for (int64_t i = 0; i < sq_padded; i++) {
      // +inf makes p = 0: in rows that see no key and in the padding of the last register tile.
      w.lse[i] = i < sq && lse[i] != -kInf ? lse[i] * kLog2e : kInf;
      vf sum = vf{};
      for (int64_t d = 0; i < sq && d < dim_v; d += kLanes)
        sum += load(w.dout_rows + i * width_v + d) * load_upto(out[i] + d, dim_v - d);
      w.delta[i] = i < sq ? horizontal_sum(sum) - (dlse ? dlse[i] : 0.0f) : 0.0f;
    }
    for (int64_t key = 0; key < sk; key += kGradBlock) {
      int64_t key_end = min(key + kGradBlock, sk);
      int64_t begin = mask.first_query(key) / kGradBlock * kGradBlock, end = mask.last_query(key_end - 1, sq);
      for (int64_t query = begin; query < end; query += kGradBlock) block(query, key, key_end, w);
    }
    write_rows(rows_of<T>(p.dq, b, h), w.dq, width, sq, dim, p.softmax_scale);
  }

  // Adds one (queries, keys) block's share to dq, dk and dv.
  void block(int64_t query, int64_t key, int64_t key_end, const Workspace& w) {
    int64_t query_end = min(query + kGradBlock, sq);
    for (int64_t i = query; i < query_end; i += kTileRows) {
      int64_t last = min(i + kTileRows, query_end) - 1;
      float *probs = w.probs + (i - query) * kGradBlock, *dscores = w.dscores + (i - query) * kGradBlock;
      int64_t begin = max(mask.begin(i), key), end = min(mask.end(last), key_end);
      if (begin >= end) begin = end = key;
      begin = (begin - key) / kTileCols * kTileCols;  // from here on, columns of the block
      end -= key;
      int64_t end_vector = round_up(end, kLanes);
      for (int64_t c = begin; c < end; c += kTileCols) {
        tile_columns<Update::overwrite, 1, kTileRows, kTileVectors>(dim, w.q_panels + i * dim,
                                                                    w.k_panels + (key + c) * dim, kTileCols,
                                                                    probs + c, kGradBlock, nullptr);
        tile_columns<Update::overwrite, 1, kTileRows, kTileVectors>(dim_v, w.dout_panels + i * dim_v,
                                                                    w.v_panels + (key + c) * dim_v, kTileCols,
                                                                    dscores + c, kGradBlock, nullptr);
      }
      if (mask.begin(last) > key + begin || mask.end(i) < key + end_vector)
        mask_tile(mask, i, last - i + 1, key, begin, end_vector, probs, kGradBlock);
      for (int64_t r = 0; r < kTileRows; r++) {
        float *p_row = probs + r * kGradBlock, *ds_row = dscores + r * kGradBlock;
        vf lse = splat(w.lse[i + r]), delta = splat(w.delta[i + r]);
        fill_zero(p_row, begin);  // the products below read whole blocks of keys
        fill_zero(ds_row, begin);
        for (int64_t c = begin; c < end_vector; c += kLanes) {
          vf prob = exp2(load(p_row + c) - lse);
          store(p_row + c, prob);
          store(ds_row + c, prob * (load(ds_row + c) - delta));
        }
        fill_zero(p_row + end_vector, kGradBlock - end_vector);
        fill_zero(ds_row + end_vector, kGradBlock - end_vector);
      }
      tile_product<Update::add, kGradBlock, 1>(end - begin, width, dscores + begin,
                                               w.k_rows + (key + begin) * width, width, w.dq + i * width,
                                               width, nullptr);
    }
    for (int64_t j = key; j < key_end; j += kTileRows) {
      int64_t begin = max(mask.first_query(j), query);
      int64_t end = min(mask.last_query(min(j + kTileRows, key_end) - 1, sq), query_end);
      if (begin >= end) continue;
      int64_t corner = (begin - query) * kGradBlock + j - key;
      tile_product<Update::add, 1, kGradBlock>(end - begin, width_v, w.probs + corner,
                                               w.dout_rows + begin * width_v, width_v, w.dv + j * width_v,
                                               width_v, nullptr);
      tile_product<Update::add, 1, kGradBlock>(end - begin, width, w.dscores + corner,
                                               w.q_rows + begin * width, width, w.dk + j * width, width,
                                               nullptr);
    }
  }

  static void write_rows(Rows<T> target, const float* source, int64_t source_width, int64_t rows, int64_t n,
                         float factor) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t d = 0; d < n; d += kLanes)
        store_upto(target[i] + d, load(source + i * source_width + d) * factor, n - d);
  }
};
