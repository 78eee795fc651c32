// Attention forward: out = softmax(scale q k^T + mask) v and lse = log sum exp of each row.
//
// q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) in fp32, bf16 or fp16, any strides whose last is 1;
// arithmetic, m, l and the accumulator in fp32. Storage is rounded once, at the end.
//
// First K of every kv head is packed into panels of kTileCols keys (element-major) and V is widened to
// fp32 rows; both once per call, and used by all query tiles and all query heads of the group. Then one
// unit of work = one tile of kQueryTile queries of one head, walked over key blocks with the online
// softmax (Milakov and Gimelshein 2018; Dao et al. 2022), in base 2: scores carry scale * log2(e).
// Key blocks end where the last row of a register tile ends, so causal masking costs half, and only
// register tiles that cross an edge are masked. Units are taken largest first within a head; each
// writes its own rows, so the bits do not depend on the number of threads.
//
// A row that sees no key: out = 0, lse = -inf. Error bound: tests/test_attention.py::test_forward_parity.

constexpr int64_t kQueryTile = 8 * kTileRows;
constexpr int64_t kKeyBlock = 4 * kTileCols;

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
    float lanes[kLanes];
    store(lanes, top);
    float m = state.m[r];
    for (int i = 0; i < kLanes; i++) m = lanes[i] > m ? lanes[i] : m;
    state.rescale[r] = state.m[r];
    state.m[r] = m;
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

template <class T>
struct AttentionForward {
  const AttentionParams& p;
  int64_t v_width = round_up(p.headdim_v, kLanes);
  int64_t k_size = round_up(p.seqlen_k, kTileCols) * p.headdim;  // packed K of one head
  int64_t v_size = p.seqlen_k * v_width;
  int64_t q_tile_size = kQueryTile * p.headdim + kLanes;
  int64_t o_tile_size = kQueryTile * v_width;
  int64_t thread_size = round_up(q_tile_size + kTileRows * kKeyBlock + o_tile_size, 16);

  void run() {
    int64_t kv_heads = p.batch * p.nheads_k, group = p.nheads / p.nheads_k;
    int64_t query_tiles = (p.seqlen_q + kQueryTile - 1) / kQueryTile;
    int64_t key_chunk = 8 * kTileCols, key_chunks = (p.seqlen_k + key_chunk - 1) / key_chunk;
    float* packed_k = scratch(kv_heads * (k_size + v_size) + kLanes + p.num_threads * thread_size);
    float* packed_v = packed_k + kv_heads * k_size + kLanes;
    float* workspaces = packed_v + kv_heads * v_size;
    int64_t pack_counter = 0, unit_counter = 0, thread_counter = 0;

#pragma omp parallel num_threads(p.num_threads)
    {
      for (int64_t u; (u = next_unit(&pack_counter)) < kv_heads * key_chunks;) {
        int64_t head = u / key_chunks, first = u % key_chunks * key_chunk;
        int64_t b = head / p.nheads_k, h = head % p.nheads_k, keys = min(key_chunk, p.keys(b) - first);
        if (keys <= 0) continue;
        Rows<const T> k = rows_of<const T>(p.k, b, h), v = rows_of<const T>(p.v, b, h);
        pack_panels<kTileCols>(k[first], k.stride, keys, p.headdim, 1.0f,
                               packed_k + head * k_size + first * p.headdim);
        pack_rows(v[first], v.stride, keys, p.headdim_v, 1.0f, packed_v + head * v_size + first * v_width,
                  v_width);
      }
#pragma omp barrier
      float* workspace = workspaces + next_unit(&thread_counter) * thread_size;
      for (int64_t u; (u = next_unit(&unit_counter)) < p.batch * p.nheads * query_tiles;) {
        int64_t bh = u / query_tiles, tile = query_tiles - 1 - u % query_tiles;
        int64_t b = bh / p.nheads, h = bh % p.nheads, kv_head = b * p.nheads_k + h / group;
        query_tile(b, h, tile * kQueryTile, packed_k + kv_head * k_size, packed_v + kv_head * v_size,
                   workspace);
      }
    }
  }

  void query_tile(int64_t b, int64_t h, int64_t first_query, const float* k, const float* v,
                  float* workspace) {
    Mask mask(p.seqlen_q, p.keys(b), p.window_left, p.window_right);
    int64_t rows = min(kQueryTile, p.seqlen_q - first_query);
    int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    float *q = workspace, *scores = q + q_tile_size, *o = scores + kTileRows * kKeyBlock;
    RowState state[kQueryTile / kTileRows];
    for (int64_t t = 0; t < tiles; t++)
      for (int r = 0; r < kTileRows; r++) {
        state[t].m[r] = -kInf;
        store(state[t].l[r], vf{});
      }
    for (int64_t i = 0; i < tiles * kTileRows * v_width; i += kLanes) store(o + i, vf{});
    Rows<const T> source = rows_of<const T>(p.q, b, h);
    pack_panels<kTileRows>(source[first_query], source.stride, rows, p.headdim, p.softmax_scale * kLog2e, q);

    int64_t last_key = mask.end(first_query + rows - 1);
    for (int64_t block = mask.begin(first_query) / kKeyBlock * kKeyBlock; block < last_key;
         block += kKeyBlock)
      for (int64_t t = 0; t < tiles; t++) {
        int64_t i = first_query + t * kTileRows, n = min(kTileRows, rows - t * kTileRows);
        int64_t begin = max(mask.begin(i), block), end = min(mask.end(i + n - 1), block + kKeyBlock);
        if (begin >= end) continue;
        begin = begin / kTileCols * kTileCols - block;  // from here on, columns of the block
        end -= block;
        for (int64_t c = begin; c < end; c += kTileCols)
          tile_columns<Update::overwrite, 1, kTileRows, kTileVectors>(
              p.headdim, q + t * kTileRows * p.headdim, k + (block + c) * p.headdim, kTileCols, scores + c,
              kKeyBlock, nullptr);
        int64_t end_vector = round_up(end, kLanes);
        if (mask.begin(i + n - 1) > block + begin || mask.end(i) < block + end_vector)
          mask_tile(mask, i, n, block, begin, end_vector, scores, kKeyBlock);
        online_softmax(state[t], scores, begin, end_vector);
        tile_product<Update::rescale, kKeyBlock, 1>(end - begin, v_width, scores + begin,
                                                    v + (block + begin) * v_width, v_width,
                                                    o + t * kTileRows * v_width, v_width, state[t].rescale);
      }

    Rows<T> out = rows_of<T>(p.out, b, h);
    float* lse = p.lse + (b * p.nheads + h) * p.seqlen_q + first_query;
    for (int64_t r = 0; r < rows; r++) {
      const RowState& s = state[r / kTileRows];
      float m = s.m[r % kTileRows], l = horizontal_sum(load(s.l[r % kTileRows]));
      float inverse = l == 0.0f ? 0.0f : 1.0f / l;
      for (int64_t d = 0; d < p.headdim_v; d += kLanes)
        store_upto(out[first_query + r] + d, load(o + r * v_width + d) * inverse, p.headdim_v - d);
      lse[r] = l == 0.0f ? -kInf : (m + __builtin_log2f(l)) * kLn2;
    }
  }
};
