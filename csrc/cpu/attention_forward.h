// Attention forward: out = dropout(softmax(s)) v and lse = log sum exp of each row of scores s, with the
// terms of scores.h and the mask; a sink is one more score of each row, without a value.
//
// q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), or packed sequences, in fp32, bf16 or fp16, any
// strides whose last is 1; arithmetic, m, l and the accumulator in fp32. Storage is rounded once, at the end.
//
// One unit of work = one tile of kQueryTile queries of one head, walked over key blocks with the online
// softmax (Milakov and Gimelshein 2018; Dao et al. 2022), in base 2: scores carry scale * log2(e).
// Key blocks end where the last row of a register tile ends, so causal masking costs half, and only
// register tiles that cross an edge are masked. Units are taken largest first within a head; each
// writes its own rows, so the bits do not depend on the number of threads. Register tiles that a boolean bias
// hides whole are skipped.
//
// All tiles and query heads of a kv head use its K packed into panels of kTileCols keys (element-major) and
// its V widened to fp32 rows. The threads that come to a head first pack it, in chunks. Heads take turns in a
// few slots, which stay in the cache; a head waits for the one that had its slot. Units are handed out in
// order of heads, so nobody waits for a unit that nobody has.
//
// A row that sees no key: out = 0, lse = -inf (the sink). Error bound: tests/test_attention.py::test_parity.

constexpr int64_t kQueryTile = 8 * kTileRows;
constexpr int64_t kKeyBlock = 4 * kTileCols;
constexpr int64_t kChunkKeys = 2 * kTileCols;  // packed as one unit

// Running state of the online softmax for one register tile of rows: maximum m (base 2) and, per lane, the
// sum l of 2^(s - m). `rescale` is what the accumulator is multiplied by when the block is added.
struct RowState {
  float m[kTileRows];
  float rescale[kTileRows];
  float l[kTileRows][kLanes];
};

// Turns scores[r][c] into 2^(scores - m') for c in [begin, end), multiples of kLanes, and updates the state.
FASTGPT_INLINE void online_softmax(RowState& state, float* scores, int64_t begin, int64_t end) {
  for (int r = 0; r < kTileRows; r++) {
    float* s = scores + r * kKeyBlock;
    vf top = splat(-kInf);
    for (int64_t c = begin; c < end; c += kLanes) top = max(top, load(s + c));
    float m = horizontal_max(top);
    state.rescale[r] = state.m[r];
    state.m[r] = state.m[r] > m ? state.m[r] : m;
  }
  for (int r = 0; r < kTileRows; r += kLanes) {
    int n = kTileRows - r;
    vf m = load_upto(state.m + r, n), old = load_upto(state.rescale + r, n);
    store_upto(state.rescale + r, exp2(old - (m == -kInf ? vf{} : m)), n);
  }
  for (int r = 0; r < kTileRows; r++) {
    float* s = scores + r * kKeyBlock;
    vf m = splat(state.m[r] == -kInf ? 0.0f : state.m[r]);
    vf sum = load(state.l[r]) * state.rescale[r];
    for (int64_t c = begin; c < end; c += kLanes) {
      vf p = exp2(load(s + c) - m);
      sum += p;
      store(s + c, p);
    }
    store(state.l[r], sum);
  }
}

template <class T, class Keys = DenseKeys<T>>
struct AttentionForward {
  const AttentionParams& p;
  Keys keys_of{p};
  int64_t group = p.nheads / p.nheads_k;
  int64_t q_width = round_up(p.headdim, kLanes), v_width = round_up(p.headdim_v, kLanes);
  bool terms = has_score_terms(p);

  // Keys of the longest sequence and of all kv heads, in whole panels; products to compute if nothing is
  // masked.
  struct Size {
    int64_t longest = 0, keys = 0;
    double products = 0;
  };
  Size size = measure();
  int64_t threads = threads_for(size.products, p.num_threads);
  int64_t slots = max(1, min(2 * threads, size.keys / max(1, size.longest)));

  Size measure() const {
    Size result;
    for (int64_t b = 0; b < p.batch; b++) {
      int64_t keys = round_up(p.keys(b), kTileCols);
      result.longest = max(result.longest, keys);
      result.keys += keys * p.nheads_k;
      result.products += static_cast<double>(keys) * p.queries(b) * p.nheads * (p.headdim + p.headdim_v);
    }
    return result;
  }

  // One kv head of one sequence: chunks handed out, chunks yet to be packed, query tiles yet to be computed.
  struct Head {
    int64_t next_chunk, unpacked, unfinished;
  };
  // What all threads share: the memory of Units, every head, the slots, and the threads' workspaces.
  struct Shared {
    int64_t* units;
    Head* heads;
    float *packed_k, *packed_v, *workspaces;
  };
  struct Workspace {
    float *q, *scores, *o, *keep;
  };

  int64_t lay_out(Shared& shared, float* memory) const {
    Parts parts{memory};
    shared.units = reinterpret_cast<int64_t*>(parts.take(2 * (p.batch + 1)));
    shared.heads = reinterpret_cast<Head*>(parts.take(p.batch * p.nheads_k * sizeof(Head) / sizeof(float)));
    shared.packed_k = parts.take(slots * size.longest * p.headdim);
    shared.packed_v = parts.take(slots * size.longest * v_width);
    Workspace unused;
    shared.workspaces = parts.take(threads * lay_out(unused, nullptr));
    return parts.size;
  }
  int64_t lay_out(Workspace& w, float* memory) const {
    Parts parts{memory};
    w.q = parts.take(kQueryTile * q_width);
    w.scores = parts.take(kTileRows * kKeyBlock);
    w.o = parts.take(kQueryTile * v_width);
    w.keep = parts.take(p.dropout_threshold ? kKeyBlock + 4 * kLanes : 0);
    return parts.size;
  }
  int64_t scratch_size() const {
    Shared unused;
    return lay_out(unused, nullptr);
  }

  void run() {
    Shared shared;
    lay_out(shared, scratch(scratch_size()));
    // At least one tile a head, if an empty one: heads are finished in order.
    Units tiles(p.batch, shared.units, [&](int64_t b) {
      int64_t of_head = max(1, (p.queries(b) + kQueryTile - 1) / kQueryTile);
      for (int64_t h = 0; h < p.nheads_k; h++)
        shared.heads[b * p.nheads_k + h] = {0, (p.keys(b) + kChunkKeys - 1) / kChunkKeys, of_head * group};
      return of_head * p.nheads;
    });
    int64_t unit_counter = 0, thread_counter = 0;

#pragma omp parallel num_threads(threads)
    {
      Workspace w;
      lay_out(w, shared.workspaces + next_unit(&thread_counter) * lay_out(w, nullptr));
      for (int64_t u; (u = next_unit(&unit_counter)) < tiles.total();) {
        int64_t b = tiles.sequence_of(u), in_b = u - tiles.starts[b];
        int64_t of_head = (tiles.starts[b + 1] - tiles.starts[b]) / p.nheads;
        int64_t h = in_b / of_head, tile = of_head - 1 - in_b % of_head;
        int64_t index = b * p.nheads_k + h / group, first = index % slots * size.longest;
        float *k = shared.packed_k + first * p.headdim, *v = shared.packed_v + first * v_width;
        if (index >= slots) wait_for_zero(&shared.heads[index - slots].unfinished);
        pack(b, h / group, shared.heads[index], k, v);
        query_tile(b, h, tile * kQueryTile, k, v, w);
        count_down(&shared.heads[index].unfinished);
      }
    }
  }

  // Packs what no other thread has begun to pack, and waits for the others.
  void pack(int64_t b, int64_t h, Head& head, float* packed_k, float* packed_v) {
    for (int64_t first; (first = next_unit(&head.next_chunk) * kChunkKeys) < p.keys(b);) {
      int64_t n = min(kChunkKeys, p.keys(b) - first);
      pack_panels(keys_of.k(b, h).from(first), n, p.headdim, keys_of.k_factor(b, h),
                  packed_k + first * p.headdim);
      pack_rows(keys_of.v(b, h).from(first), n, p.headdim_v, keys_of.v_factor(b, h),
                packed_v + first * v_width, v_width);
      count_down(&head.unpacked);
    }
    wait_for_zero(&head.unpacked);
  }

  void query_tile(int64_t b, int64_t h, int64_t first_query, const float* k, const float* v,
                  const Workspace& w) {
    Mask mask(p.queries(b), p.keys(b), p.window_left, p.window_right);
    int64_t rows = min(kQueryTile, p.queries(b) - first_query);
    int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    float *q = w.q, *scores = w.scores, *o = w.o, *keep = w.keep;
    RowState state[kQueryTile / kTileRows];
    float sink = p.sink ? p.sink[h] * kLog2e : -kInf;
    for (int64_t t = 0; t < tiles; t++)
      for (int r = 0; r < kTileRows; r++) {
        state[t].m[r] = sink;
        store(state[t].l[r], vf{});
        state[t].l[r][0] = sink == -kInf ? 0.0f : 1.0f;
      }
    for (int64_t i = 0; i < tiles * kTileRows * v_width; i += kLanes) store(o + i, vf{});
    Rows<const T> source = rows_of<const T>(p.q, b, h, p.first_query_row(b) + first_query);
    pack_rows(source, rows, p.headdim, p.softmax_scale * kLog2e, q, q_width);
    fill_zero(q + rows * q_width, (tiles * kTileRows - rows) * q_width);

    int64_t last_key = mask.end(first_query + rows - 1);
    for (int64_t block = mask.begin(first_query) / kKeyBlock * kKeyBlock; block < last_key;
         block += kKeyBlock)
      for (int64_t t = 0; t < tiles; t++) {
        int64_t i = first_query + t * kTileRows, n = min(kTileRows, rows - t * kTileRows);
        int64_t begin = max(mask.begin(i), block), end = min(mask.end(i + n - 1), block + kKeyBlock);
        if (begin >= end || hidden_by_bias(p, b, h, i, n, begin, end)) continue;
        begin = begin / kTileCols * kTileCols - block;  // from here on, columns of the block
        end -= block;
        int64_t end_vector = round_up(end, kLanes);
        for (int64_t c = begin; c < end_vector; c += kTileCols)
          tile_product<Update::overwrite>(p.headdim, min(kTileCols, end_vector - c),
                                          q + t * kTileRows * q_width, q_width, k + (block + c) * p.headdim,
                                          kTileCols, scores + c, kKeyBlock);
        if (terms) add_score_terms(p, b, h, i, n, block, begin, end_vector, scores, kKeyBlock, nullptr);
        if (mask.begin(i + n - 1) > block + begin || mask.end(i) < block + end_vector)
          mask_tile(mask, i, n, block, begin, end_vector, scores, kKeyBlock);
        online_softmax(state[t], scores, begin, end_vector);
        for (int64_t r = 0; p.dropout_threshold && r < n; r++) {
          dropout_row(p, b, h, i + r, block + begin, end_vector - begin, keep);
          for (int64_t c = begin; c < end_vector; c += kLanes) {
            float* s = scores + r * kKeyBlock + c;
            store(s, load(s) * load(keep + c - begin));
          }
        }
        tile_product<Update::rescale>(end - begin, v_width, scores + begin, kKeyBlock,
                                      v + (block + begin) * v_width, v_width, o + t * kTileRows * v_width,
                                      v_width, state[t].rescale);
      }

    Rows<T> out = rows_of<T>(p.out, b, h, p.first_query_row(b) + first_query);
    float* lse = p.lse + p.lse_row(b, h) + first_query;
    for (int64_t r = 0; r < rows; r++) {
      const RowState& s = state[r / kTileRows];
      float m = s.m[r % kTileRows], l = horizontal_sum(load(s.l[r % kTileRows]));
      float inverse = l == 0.0f ? 0.0f : p.dropout_scale / l;
      for (int64_t d = 0; d < p.headdim_v; d += kLanes)
        store_upto(out[r] + d, load(o + r * v_width + d) * inverse, p.headdim_v - d);
      lse[r] = l == 0.0f ? -kInf : (m + __builtin_log2f(l)) * kLn2;
    }
  }
};
