// Attention backward: dq, dk, dv from dout and the saved out and lse (FlashAttention, Dao et al. 2022,
// algorithm 4). With x = scale q k^T, s = the scores of scores.h, p = exp(s - lse), Z = what dropout
// multiplies p by and out = (Z p) v (attention_forward.h):
//   dv = (Z p)^T dout                  dp = Z (dout v^T)
//   ds = p (dp - delta)                delta_i = sum_d dout_id out_id - dlse_i
//   dx = ds softcap'(x)                dbias = ds
//   dq = scale dx k                    dk = scale dx^T q
//   dsink = -sum_i exp(sink - lse_i) delta_i
//
// Shapes, dtypes and strides as in forward; gradients have their tensor's shape, storage rounded once
// from fp32 accumulators. One unit of work = one kv head (with dbias: all that share a part of it): its
// thread, the owner, walks over all query heads of the group, key blocks and query blocks. p is recomputed
// from lse, in base 2.
//
// Threads that find no unit left take key blocks of those under way. dk and dv of a key block are its
// thread's; to dq, key blocks add in order: each follows its predecessor over the query blocks. So nothing is
// added atomically and the bits do not depend on the number of threads.
//
// Rows that see no key (lse = -inf) give 0. Error bound: tests/test_attention.py::test_parity.

template <class T>
struct AttentionBackward {
  typedef GradientProducts<T> M;
  typedef typename M::Element Element;
  static_assert(kGradBlock % M::kRows == 0 && kGradBlock % kTileCols == 0, "a block is whole register tiles");
  const AttentionBackwardParams& p;
  int64_t dim = p.headdim, dim_v = p.headdim_v;
  int64_t width = M::row_width(dim), width_v = M::row_width(dim_v);
  float factor = M::score_factor(p);  // here and below as in forward
  bool terms = has_score_terms(p) || factor <= 0.0f;

  // What an owner shares with those that help it: a sequence, a kv head of it, one of its query heads, and of
  // its key blocks those to hand out, those to compute, and how many queries each has passed. "panels" are
  // the operand of products over the head dim, "rows" of products over keys, "columns" over queries.
  struct Head {
    int64_t b, h, sq, sk;
    Mask mask{0, 0, 0, 0};
    Element *k_panels, *k_rows, *v_panels, *q_rows, *dout_rows, *q_columns, *dout_columns;
    float *dk, *dv, *dq, *lse, *delta;
    int64_t blocks, unclaimed = 0, unfinished, *passed;
  };
  // What every thread has of its own: the block at hand.
  struct Tiles {
    float *probs, *dscores, *derivatives, *keep;
    typename M::Block block;
  };

  // Lays a head out, of a sequence of up to sq queries and sk keys; returns its size.
  int64_t lay_out(Head& w, float* memory, int64_t sq, int64_t sk) const {
    int64_t sq_padded = round_up(sq, M::kRows), sk_padded = round_up(sk, kTileCols);
    int64_t key_blocks = round_up(sk, kGradBlock);
    Parts parts{memory};
    w.k_panels = parts.take_as<Element>(sk_padded * M::key_width(dim));
    w.k_rows = parts.take_as<Element>(sk_padded * width);
    w.v_panels = parts.take_as<Element>(sk_padded * M::key_width(dim_v));
    w.dk = parts.take(key_blocks * width);
    w.dv = parts.take(key_blocks * width_v);
    w.q_rows = parts.take_as<Element>(sq_padded * width);
    w.dout_rows = parts.take_as<Element>(sq_padded * width_v);
    w.q_columns = M::columns_of(w.q_rows, parts, sq, width);
    w.dout_columns = M::columns_of(w.dout_rows, parts, sq, width_v);
    w.dq = parts.take(sq_padded * width);
    w.lse = parts.take(sq_padded + kLanes);
    w.delta = parts.take(sq_padded + kLanes);
    w.passed = reinterpret_cast<int64_t*>(parts.take(2 * count_blocks(sk)));
    return parts.size;
  }
  int64_t lay_out(Tiles& tiles, float* memory) const {
    Parts parts{memory};
    tiles.probs = parts.take(M::kScoreRows * kGradBlock);
    tiles.dscores = parts.take(M::kScoreRows * kGradBlock);
    tiles.derivatives = parts.take(p.softcap ? M::kScoreRows * kGradBlock : 0);
    tiles.keep = parts.take(p.dropout_threshold ? kGradBlock + 4 * kLanes : 0);
    M::lay_out(tiles.block, tiles.probs, tiles.dscores, parts);
    return parts.size;
  }
  static int64_t count_blocks(int64_t sk) { return (sk + kGradBlock - 1) / kGradBlock; }

  void run() {
    // Along an axis that dbias is broadcast over, one unit does everything.
    bool shares_batch = p.dbias.data && p.dbias.batch_stride == 0;
    bool shares_heads = p.dbias.data && p.dbias.head_stride == 0;
    int64_t units_b = shares_batch ? min(p.batch, 1) : p.batch, units_h = shares_heads ? 1 : p.nheads_k;
    int64_t sq = 0, sk = 0;
    double products = 0;
    for (int64_t b = 0; b < p.batch; b++) {
      sq = max(sq, p.queries(b)), sk = max(sk, p.keys(b));
      products += static_cast<double>(p.queries(b)) * p.keys(b) * p.nheads * (dim + dim_v);
    }
    int64_t threads = threads_for(products, p.num_threads);
    int64_t owners = max(1, min(threads, units_b * units_h));
    // Not where all key blocks add to one number.
    bool may_help = !p.dbias.data || p.dbias.query_stride || p.dbias.key_stride;
    Head unused_head;
    Tiles unused_tiles;
    int64_t head_size = lay_out(unused_head, nullptr, sq, sk), tiles_size = lay_out(unused_tiles, nullptr);
    int64_t heads_size = round_up(owners * sizeof(Head) / sizeof(float), 16);
    float* memory = scratch(heads_size + owners * head_size + threads * tiles_size);
    Head* heads = reinterpret_cast<Head*>(memory);
    float *head_memory = memory + heads_size, *tiles_memory = head_memory + owners * head_size;
    for (int64_t i = 0; i < owners; i++) lay_out(heads[i] = {}, head_memory + i * head_size, sq, sk);
    int64_t unit_counter = 0, thread_counter = 0, unfinished = units_b * units_h;
#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] typename M::Unit unit;
      int64_t thread = next_unit(&thread_counter);
      Tiles tiles;
      lay_out(tiles, tiles_memory + thread * tiles_size);
      if (thread < owners) {
        for (int64_t u; (u = next_unit(&unit_counter)) < units_b * units_h;) {
          int64_t b = u / units_h, h = u % units_h;
          for (int64_t i = b; i < (shares_batch ? p.batch : b + 1); i++)
            for (int64_t j = h; j < (shares_heads ? p.nheads_k : h + 1); j++)
              kv_head(i, j, heads[thread], tiles);
          count_down(&unfinished);
        }
      }
      while (may_help && __atomic_load_n(&unfinished, __ATOMIC_ACQUIRE) != 0) {
        for (int64_t i = 0; i < owners; i++) key_blocks(heads[i], tiles);
        sched_yield();
      }
    }
  }

  void kv_head(int64_t b, int64_t h_k, Head& w, const Tiles& tiles) {
    w.b = b;
    w.sq = p.queries(b);
    w.sk = p.keys(b);
    w.mask = Mask(w.sq, w.sk, p.window_left, p.window_right);
    int64_t key_blocks = round_up(w.sk, kGradBlock);
    Rows<const T> k = rows_of<const T>(p.k, b, h_k, p.first_key_row(b));
    Rows<const T> v = rows_of<const T>(p.v, b, h_k, p.first_key_row(b));
    M::pack_keys(k, w.sk, dim, 1.0f, w.k_panels);
    M::pack_keys(v, w.sk, dim_v, 1.0f, w.v_panels);
    M::pack_values(k, w.sk, dim, 1.0f, w.k_rows, width);
    fill_zero(w.dk, key_blocks * width);
    fill_zero(w.dv, key_blocks * width_v);
    int64_t group = p.nheads / p.nheads_k;
    for (int64_t h = h_k * group; h < (h_k + 1) * group; h++) query_head(h, w, tiles);
    write_keys(p.dk, b, h_k, w.dk, width, w.sk, dim, M::key_gradient_factor(p));
    write_keys(p.dv, b, h_k, w.dv, width_v, w.sk, dim_v, p.dropout_scale);
  }

  void query_head(int64_t h, Head& w, const Tiles& tiles) {
    int64_t sq = w.sq, sq_padded = round_up(sq, M::kRows), first_row = p.first_query_row(w.b);
    w.h = h;
    Rows<const T> q = rows_of<const T>(p.q, w.b, h, first_row);
    Rows<const T> dout = rows_of<const T>(p.dout, w.b, h, first_row);
    Rows<const T> out = rows_of<const T>(p.out, w.b, h, first_row);
    // As in forward, so that the scores are those whose lse was saved, to the last bit.
    M::pack_queries(q, sq, sq_padded, dim, p.softmax_scale * kLog2e, w.q_rows, width);
    M::pack_queries(dout, sq, sq_padded, dim_v, 1.0f, w.dout_rows, width_v);
    M::pack_query_columns(q, sq, dim, w.q_columns, width);
    M::pack_query_columns(dout, sq, dim_v, w.dout_columns, width_v);
    fill_zero(w.dq, sq_padded * width);
    const float* lse = p.lse + p.lse_row(w.b, h);
    const float* dlse = p.dlse ? p.dlse + p.lse_row(w.b, h) : nullptr;
    for (int64_t i = 0; i < round_up(sq_padded, kLanes); i++) {
      // +inf makes p = 0: in rows that see no key and in the padding of the last register tile.
      w.lse[i] = i < sq && lse[i] != -kInf ? lse[i] * kLog2e : kInf;
      vf sum = vf{};
      for (int64_t d = 0; i < sq && d < dim_v; d += kLanes)
        sum += load(w.dout_rows + i * width_v + d) * load_upto(out[i] + d, dim_v - d);
      w.delta[i] = i < sq ? horizontal_sum(sum) - (dlse ? dlse[i] : 0.0f) : 0.0f;
    }
    if (p.dsink) {
      vf sum = vf{}, sink = splat(p.sink[h] * kLog2e);
      for (int64_t i = 0; i < sq; i += kLanes) sum += exp2(sink - load(w.lse + i)) * load(w.delta + i);
      p.dsink[w.b * p.nheads + h] = -horizontal_sum(sum);
    }
    w.blocks = w.unfinished = count_blocks(w.sk);
    for (int64_t i = 0; i < w.blocks; i++) w.passed[i] = 0;
    __atomic_store_n(&w.unclaimed, w.blocks, __ATOMIC_RELEASE);
    key_blocks(w, tiles);
    wait_for_zero(&w.unfinished);
    Rows<T> target = rows_of<T>(p.dq, w.b, h, first_row);
    for (int64_t i = 0; i < sq; i++)
      for (int64_t d = 0; d < dim; d += kLanes)
        store_upto(target[i] + d, load(w.dq + i * width + d) * p.softmax_scale, dim - d);
  }

  // Computes key blocks of a head while there are some to hand out.
  void key_blocks(Head& w, const Tiles& tiles) {
    int64_t left;
    while (__atomic_load_n(&w.unclaimed, __ATOMIC_RELAXED) > 0 &&
           (left = __atomic_fetch_sub(&w.unclaimed, 1, __ATOMIC_ACQUIRE)) > 0) {
      int64_t index = w.blocks - left, key = index * kGradBlock, key_end = min(key + kGradBlock, w.sk);
      int64_t begin = w.mask.first_query(key) / kGradBlock * kGradBlock;
      int64_t end = w.mask.last_query(key_end - 1, w.sq);
      for (int64_t query = begin; query < end; query += kGradBlock) {
        while (index > 0 && __atomic_load_n(&w.passed[index - 1], __ATOMIC_ACQUIRE) <= query) sched_yield();
        block(query, key, key_end, w, tiles);
        __atomic_store_n(&w.passed[index], query + kGradBlock, __ATOMIC_RELEASE);
      }
      __atomic_store_n(&w.passed[index], w.sq, __ATOMIC_RELEASE);
      count_down(&w.unfinished);
    }
  }

  // Adds one (queries, keys) block's share to dq, dk and dv.
  void block(int64_t query, int64_t key, int64_t key_end, const Head& w, const Tiles& tiles) {
    int64_t query_end = min(query + kGradBlock, w.sq);
    if (hidden_by_bias(p, w.b, w.h, query, query_end - query, key, key_end)) return;
    for (int64_t i = query; i < query_end; i += M::kRows) {
      int64_t last = min(i + M::kRows, query_end) - 1;
      int64_t tile = (i - query) % M::kScoreRows * kGradBlock;
      float *probs = tiles.probs + tile, *dscores = tiles.dscores + tile, *derivatives = nullptr;
      int64_t begin = max(w.mask.begin(i), key), end = min(w.mask.end(last), key_end);
      if (begin >= end) begin = end = key;
      begin = (begin - key) / kTileCols * kTileCols;  // from here on, columns of the block
      end -= key;
      int64_t end_step = round_up(end, M::kStep);
      for (int64_t c = begin; c < end_step; c += kTileCols) {
        int64_t cols = min(kTileCols, end_step - c);
        M::scores(M::kRows, dim, cols, w.q_rows + i * width, width,
                  w.k_panels + (key + c) * M::key_width(dim), probs + c, kGradBlock);
        M::scores(M::kRows, dim_v, cols, w.dout_rows + i * width_v, width_v,
                  w.v_panels + (key + c) * M::key_width(dim_v), dscores + c, kGradBlock);
      }
      if (p.softcap) derivatives = tiles.derivatives + tile;
      if (terms)
        add_score_terms(p, w.b, w.h, i, last - i + 1, key, begin, end_step, factor, probs, kGradBlock,
                        derivatives);
      if (w.mask.begin(last) > key + begin || w.mask.end(i) < key + end_step)
        mask_tile(w.mask, i, last - i + 1, key, begin, end_step, probs, kGradBlock);
      float factor_left = terms ? 1.0f : factor;
      for (int64_t r = 0; r < M::kRows; r++) {
        float *p_row = probs + r * kGradBlock, *ds_row = dscores + r * kGradBlock;
        if (i + r > last) {  // behind the queries, where 0 times an infinite k would be NaN
          fill_zero(p_row, kGradBlock);
          fill_zero(ds_row, kGradBlock);
          continue;
        }
        vf lse = splat(w.lse[i + r]), delta = splat(w.delta[i + r]);
        if (p.dropout_threshold)
          dropout_row(p, w.b, w.h, i + r, key + begin, end_step - begin, tiles.keep + begin);
        fill_zero(p_row, begin);  // the products below read whole blocks of keys
        fill_zero(ds_row, begin);
        for (int64_t c = begin; c < end_step; c += kLanes) {
          vf exponent = load(p_row + c) * factor_left - lse;
          // Of scores like -1e9 lse has too few digits for p; it is at most 1 all the same.
          exponent = exponent > 0.0f ? vf{} : exponent;
          vf prob = exp2(exponent), dprob = load(ds_row + c), kept = prob;
          if (p.dropout_threshold) {
            vf keep = load(tiles.keep + c);
            dprob *= keep * p.dropout_scale;
            kept *= keep;
          }
          store(p_row + c, kept);
          store(ds_row + c, prob * (dprob - delta));
        }
        fill_zero(p_row + end_step, kGradBlock - end_step);
        fill_zero(ds_row + end_step, kGradBlock - end_step);
        if (p.dbias.data) add_to_bias(i + r, key, begin, end, ds_row, w);
        for (int64_t c = begin; derivatives && c < end_step; c += kLanes)
          store(ds_row + c, load(ds_row + c) * load(derivatives + r * kGradBlock + c));
      }
      M::keep(tiles.block, i - query, probs, dscores);
      M::add_keys(tiles.block, dscores, begin, end - begin, w.k_rows + (key + begin) * width, width,
                  w.dq + i * width);
    }
    for (int64_t j = key; j < key_end; j += M::kKeys) {
      int64_t begin = max(w.mask.first_query(j), query);
      int64_t end = min(w.mask.last_query(min(j + M::kKeys, key_end) - 1, w.sq), query_end);
      if (begin >= end) continue;
      M::add_queries(tiles.block.probs, query, begin, end, w.dout_columns, width_v, key, j, w.dv);
      M::add_queries(tiles.block.dscores, query, begin, end, w.q_columns, width, key, j, w.dk);
    }
  }

  // dbias += ds for query i and the block's columns [begin, end).
  void add_to_bias(int64_t i, int64_t key, int64_t begin, int64_t end, const float* ds, const Head& w) {
    const BiasTensor<float>& t = p.dbias;
    float* row = t.data + w.b * t.batch_stride + w.h * t.head_stride + i * t.query_stride;
    if (t.key_stride == 0) {
      vf sum = vf{};
      for (int64_t c = begin; c < end; c += kLanes) sum += load(ds + c);
      *row += horizontal_sum(sum);
      return;
    }
    row += key + (p.leftpad_k ? p.leftpad_k[w.b] : 0);
    for (int64_t c = begin; c < end; c += kLanes)
      store_upto(row + c, load_upto(row + c, end - c) + load(ds + c), end - c);
  }

  // The gradients of the keys that sequence b uses; 0 for its other rows.
  void write_keys(const Tensor& gradient, int64_t b, int64_t h_k, const float* source, int64_t source_width,
                  int64_t keys, int64_t n, float factor) {
    int64_t before = p.leftpad_k ? p.leftpad_k[b] : 0, rows = p.key_rows(b);
    Rows<T> target = rows_of<T>(gradient, b, h_k, p.first_key_row(b) - before);
    M::write_keys(target.from(before), source, source_width, keys, n, factor);
    for (int64_t i = 0; i < rows; i++)
      if (i < before || i >= before + keys) __builtin_memset(target[i], 0, n * sizeof(T));
  }
};
