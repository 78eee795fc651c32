// Attention forward: out = dropout(softmax(s)) v and lse = log sum exp of each row of scores s, with the
// terms of scores.h and the mask; a sink is one more score of each row, without a value.
//
// q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), or packed sequences, in fp32, bf16 or fp16, any
// strides whose last is 1; arithmetic, m, l and the accumulator in fp32. Storage is rounded once, at the end
// (probabilities, too, where amx.h multiplies them).
//
// One unit of work = one tile of kQueryTile queries of one head, walked over key blocks with the online
// softmax (Milakov and Gimelshein 2018; Dao et al. 2022), in base 2: scores carry scale * log2(e).
// Key blocks end where the last row of a register tile ends, so causal masking costs half, and only
// register tiles that cross an edge are masked. Units are taken largest first within a head; each
// writes its own rows, so the bits do not depend on the number of threads. Register tiles that a boolean bias
// hides whole are skipped.
//
// How operands are packed and multiplied is said by Products (products.h, amx.h). All tiles and query heads
// of a kv head use its K and V packed. The threads that come to a head first pack it, in chunks. Heads take
// turns in a few slots, which stay in the cache; a head waits for the one that had its slot. Units are handed
// out in order of heads, so nobody waits for a unit that nobody has.
//
// A row that sees no key: out = 0, lse = -inf (the sink). Error bound: tests/test_attention.py::test_parity.

constexpr int64_t kChunkKeys = 2 * kTileCols;  // packed as one unit

// Running state of the online softmax for one register tile of rows: maximum m and, per lane, the sum l of
// 2^(factor (s - m)). `rescale` is what the accumulator is multiplied by when the block is added.
template <int kRows>
struct RowState {
  float m[kRows];
  float rescale[kRows];
  float l[kRows][kLanes];
};

// For s = scores[r][c], factor > 0, and c in [begin, end), multiples of M::kStep: updates the state, and
// probs[r][c] = keep_of(r)[c] 2^(factor (s - m')), or without keep where keep_of gives null.
template <class M, class KeepOf>
FASTGPT_INLINE void online_softmax(RowState<M::kRows>& state, int64_t rows, float factor, const float* scores,
                                   int64_t begin, int64_t end, typename M::Element* probs,
                                   const KeepOf& keep_of) {
  for (int64_t r = 0; r < rows; r++) {
    const float* s = scores + r * kKeyBlock;
    vf top = splat(-kInf);
    for (int64_t c = begin; c < end; c += kLanes) top = max(top, load(s + c));
    float m = horizontal_max(top);
    state.rescale[r] = state.m[r];
    state.m[r] = state.m[r] > m ? state.m[r] : m;
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    int64_t n = rows - r;
    vf m = load_upto(state.m + r, n), old = load_upto(state.rescale + r, n);
    store_upto(state.rescale + r, exp2((old - (m == -kInf ? vf{} : m)) * factor), n);
  }
  for (int64_t r = 0; r < rows; r++) {
    const float *s = scores + r * kKeyBlock, *keep = keep_of(r);
    vf m = splat(state.m[r] == -kInf ? 0.0f : state.m[r]);
    vf sum = load(state.l[r]) * state.rescale[r];
    for (int64_t c = begin; c < end; c += M::kStep) {
      vf prob[M::kStep / kLanes];
#pragma GCC unroll 2
      for (int i = 0; i < M::kStep / kLanes; i++) {
        vf distance = load(s + c + i * kLanes) - m;  // 0 at the maximum, however large that is
        prob[i] = exp2(M::kScaled ? distance : distance * factor);
        sum += prob[i];
        if (keep) prob[i] *= load(keep + c + i * kLanes);
      }
      M::store_probs(probs + r * kKeyBlock + c, prob);
    }
    store(state.l[r], sum);
  }
}

template <class T, class KV = T, class Keys = DenseKeys<T>>
struct AttentionForward {
  typedef Products<T, KV> M;
  typedef typename M::Element Element;
  static constexpr int64_t kQueryTile = M::kTiles * M::kRows;
  const AttentionParams& p;
  Keys keys_of{p};
  int64_t group = p.nheads / p.nheads_k;
  int64_t q_width = M::row_width(p.headdim), k_width = M::key_width(p.headdim),
          v_width = M::row_width(p.headdim_v);
  // What products of the packed operands are multiplied by to be scores, and whether that is done with their
  // other terms; else it is a part of the softmax, which takes no other sign.
  float factor = M::score_factor(p);
  bool terms = has_score_terms(p) || factor <= 0.0f;
  float factor_left = terms ? 1.0f : factor;  // for the softmax

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
    Element *packed_k, *packed_v;
    float* workspaces;
  };
  struct Workspace {
    Element *q, *probs;
    float *scores, *o, *keep;
  };

  int64_t lay_out(Shared& shared, float* memory) const {
    Parts parts{memory};
    shared.units = reinterpret_cast<int64_t*>(parts.take(2 * (p.batch + 1)));
    shared.heads = reinterpret_cast<Head*>(parts.take(p.batch * p.nheads_k * sizeof(Head) / sizeof(float)));
    shared.packed_k = parts.template take_as<Element>(slots * size.longest * k_width);
    shared.packed_v = parts.template take_as<Element>(slots * size.longest * v_width);
    Workspace unused;
    shared.workspaces = parts.take(threads * lay_out(unused, nullptr));
    return parts.size;
  }
  int64_t lay_out(Workspace& w, float* memory) const {
    Parts parts{memory};
    w.q = parts.template take_as<Element>(kQueryTile * q_width);
    w.scores = parts.take(M::kRows * kKeyBlock);
    w.probs = M::probs_of(w.scores, parts);
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
      [[maybe_unused]] typename M::Unit unit;
      Workspace w;
      lay_out(w, shared.workspaces + next_unit(&thread_counter) * lay_out(w, nullptr));
      for (int64_t u; (u = next_unit(&unit_counter)) < tiles.total();) {
        int64_t b = tiles.sequence_of(u), in_b = u - tiles.starts[b];
        int64_t of_head = (tiles.starts[b + 1] - tiles.starts[b]) / p.nheads;
        int64_t h = in_b / of_head, tile = of_head - 1 - in_b % of_head;
        int64_t index = b * p.nheads_k + h / group, first = index % slots * size.longest;
        Element *k = shared.packed_k + first * k_width, *v = shared.packed_v + first * v_width;
        if (index >= slots) wait_for_zero(&shared.heads[index - slots].unfinished);
        pack(b, h / group, shared.heads[index], k, v);
        query_tile(b, h, tile * kQueryTile, k, v, w);
        count_down(&shared.heads[index].unfinished);
      }
    }
  }

  // Packs what no other thread has begun to pack, and waits for the others.
  void pack(int64_t b, int64_t h, Head& head, Element* packed_k, Element* packed_v) {
    for (int64_t first; (first = next_unit(&head.next_chunk) * kChunkKeys) < p.keys(b);) {
      int64_t n = min(kChunkKeys, p.keys(b) - first);
      M::pack_keys(keys_of.k(b, h).from(first), n, p.headdim, keys_of.k_factor(b, h),
                   packed_k + first * k_width);
      M::pack_values(keys_of.v(b, h).from(first), n, p.headdim_v, keys_of.v_factor(b, h),
                     packed_v + first * v_width, v_width);
      count_down(&head.unpacked);
    }
    wait_for_zero(&head.unpacked);
  }

  void query_tile(int64_t b, int64_t h, int64_t first_query, const Element* k, const Element* v,
                  const Workspace& w) {
    Mask mask(p.queries(b), p.keys(b), p.window_left, p.window_right);
    int64_t rows = min(kQueryTile, p.queries(b) - first_query);
    int64_t tiles = (rows + M::kRows - 1) / M::kRows;
    float *scores = w.scores, *o = w.o;
    RowState<M::kRows> state[M::kTiles];
    float sink = p.sink ? p.sink[h] * kLog2e : -kInf;
    for (int64_t t = 0; t < tiles; t++)
      for (int r = 0; r < M::kRows; r++) {
        state[t].m[r] = sink / factor_left;
        store(state[t].l[r], vf{});
        state[t].l[r][0] = sink == -kInf ? 0.0f : 1.0f;
      }
    for (int64_t i = 0; i < tiles * M::kRows * v_width; i += kLanes) store(o + i, vf{});
    Rows<const T> source = rows_of<const T>(p.q, b, h, p.first_query_row(b) + first_query);
    M::pack_queries(source, rows, tiles * M::kRows, p.headdim, p.softmax_scale * kLog2e, w.q, q_width);

    int64_t last_key = mask.end(first_query + rows - 1);
    for (int64_t block = mask.begin(first_query) / kKeyBlock * kKeyBlock; block < last_key;
         block += kKeyBlock)
      for (int64_t t = 0; t < tiles; t++) {
        int64_t i = first_query + t * M::kRows, n = min(M::kRows, rows - t * M::kRows);
        int64_t begin = max(mask.begin(i), block), end = min(mask.end(i + n - 1), block + kKeyBlock);
        if (begin >= end || hidden_by_bias(p, b, h, i, n, begin, end)) continue;
        begin = begin / kTileCols * kTileCols - block;  // from here on, columns of the block
        end -= block;
        int64_t end_step = round_up(end, M::kStep), computed = M::rows_computed(n);
        for (int64_t c = begin; c < end_step; c += kTileCols)
          M::scores(computed, p.headdim, min(kTileCols, end_step - c), w.q + t * M::kRows * q_width, q_width,
                    k + (block + c) * k_width, scores + c, kKeyBlock);
        if (terms) add_score_terms(p, b, h, i, n, block, begin, end_step, factor, scores, kKeyBlock, nullptr);
        if (mask.begin(i + n - 1) > block + begin || mask.end(i) < block + end_step)
          mask_tile(mask, i, n, block, begin, end_step, scores, kKeyBlock);
        auto keep_of = [&](int64_t r) -> const float* {
          if (!p.dropout_threshold || r >= n) return nullptr;
          dropout_row(p, b, h, i + r, block + begin, end_step - begin, w.keep + begin);
          return w.keep;
        };
        online_softmax<M>(state[t], computed, factor_left, scores, begin, end_step, w.probs, keep_of);
        M::add_values(computed, end - begin, v_width, w.probs + begin, kKeyBlock,
                      v + (block + begin) * v_width, o + t * M::kRows * v_width, state[t].rescale);
      }

    Rows<T> out = rows_of<T>(p.out, b, h, p.first_query_row(b) + first_query);
    float* lse = p.lse + p.lse_row(b, h) + first_query;
    for (int64_t r = 0; r < rows; r++) {
      const RowState<M::kRows>& s = state[r / M::kRows];
      float m = s.m[r % M::kRows], l = horizontal_sum(load(s.l[r % M::kRows]));
      float inverse = l == 0.0f ? 0.0f : p.dropout_scale / l;
      for (int64_t d = 0; d < p.headdim_v; d += kLanes)
        store_upto(out[r] + d, load(o + r * v_width + d) * inverse, p.headdim_v - d);
      lse[r] = l == 0.0f ? -kInf : (m * factor_left + __builtin_log2f(l)) * kLn2;
    }
  }
};
