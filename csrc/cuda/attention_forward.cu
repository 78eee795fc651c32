// Attention forward on Hopper (FlashAttention-3: Shah et al. 2024, arXiv:2407.08608; the online softmax is
// that of Milakov & Gimelshein 2018).
//
//   s = softmax_scale · Q Kᵀ over the keys that the mask lets a query see, out = softmax(s) V, lse = log Σ
//   exp(s)
//
// q, out (batch, seqlen_q, nheads, D), k, v (batch, seqlen_k, nheads_k, D) or packed, fp16 or bf16, any
// strides of which 16 bytes are a divisor; lse (batch, nheads, seqlen_q) or (nheads, total), fp32. Products
// and the softmax's state are fp32; its probabilities are rounded to the tensors' type, as factors of the
// second product.
//
// A block stays on its multiprocessor and takes tiles of kQueries queries of one head, one after another. One
// warp brings them, and blocks of kKeys keys and values, by the copy engine, into kStages buffers each. Two
// warpgroups compute 64 queries each: the product with the keys of one block runs beside that with the values
// of the block before, and one warpgroup's softmax beside the other's products. Blocks of keys are walked
// from the last one, where causal masks have their edge; only those at edges are masked. Each tile is one
// thread block's, so two runs give the same bits, whatever else is in the batch. Rows of a tile beyond the
// last query are computed and not stored.
//
// Held by tests/test_attention_cuda.py in the emulator; not yet run on a GPU.

#include "attention.h"

#include <climits>
#include <cmath>

#include "attention_tiles.h"
#include "launch.h"

namespace fastgpt {
namespace {

constexpr int kQueries = 128, kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
// Registers of a thread when the warpgroups have shared out what the block was given.
constexpr int kCopying = 40, kComputing = 232;
static_assert(kCopying + kWarpgroups * kComputing <= kLaunchedRegisters * (1 + kWarpgroups));
// Named barriers: whose turn it is to issue products, and of a warpgroup's own threads.
constexpr int kTurn = 1, kOwn = kTurn + kWarpgroups;

template <int D>
constexpr int kKeys = D == 256 ? 64 : 128;

template <class T, int D>
struct Shared {
  // Tiles of 64 columns: the engine's and wgmma's.
  struct Queries {
    T tiles[D / kTileColumns][kQueries][kTileColumns];
  } q;  // and then out, each warpgroup's rows when it has read them for the last time
  struct Keys {
    T tiles[D / kTileColumns][kKeys<D>][kTileColumns];
  } k[kStages], v[kStages];
  Mbarrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages], v_landed;
};

struct Params : AttentionParams {
  TensorMap q_map, k_map, v_map, out_map;
  int tiles, blocks;    // of all heads, of one head
  int slices, section;  // heads of all sequences, and how many of them share the cache at a time
  bool packed;          // out's rows beyond the last query are another sequence's
  bool ends_inside;     // keys end before their tensor's rows do, or their sequence's

  std::string describe() const { return fastgpt::describe(*this); }
};

// A tile of queries, and the blocks of keys that they see: [first, end), of which all see [full, full_end)
// whole.
struct Work {
  int b, h, h_k, query;  // heads of q and k; the first query
  int queries, keys;
  int first, full, full_end, end;
};

// Tiles with the most to do first, where masks are causal: the last of each head. A section of heads is done
// with before the next begins, as its keys and values stay in the cache.
template <int D>
__device__ __forceinline__ Work work(const Params& p, int tile) {
  int section = tile / (p.section * p.blocks), within = tile % (p.section * p.blocks);
  int heads = min(p.section, p.slices - section * p.section);
  int slice = section * p.section + within % heads, block = p.blocks - 1 - within / heads;
  Work w{};
  w.h = slice % static_cast<int>(p.nheads);
  w.h_k = w.h / static_cast<int>(p.nheads / p.nheads_k);
  w.b = slice / static_cast<int>(p.nheads);
  if (p.packed) block = of_sequence(p.cu_seqlens_q, p.batch, kQueries, block, w.b);
  w.query = block * kQueries;
  w.queries = static_cast<int>(p.queries(w.b));
  w.keys = static_cast<int>(p.keys(w.b));
  if (w.query >= w.queries) return w;
  Mask mask(w.queries, w.keys, p.window_left, p.window_right);
  int last = min(w.query + kQueries, w.queries) - 1;
  int begin = static_cast<int>(mask.begin(w.query)), end = static_cast<int>(mask.end(last));
  if (begin >= end) return w;
  w.first = begin / kKeys<D>;
  w.end = (end + kKeys<D> - 1) / kKeys<D>;
  w.full = (static_cast<int>(mask.begin(last)) + kKeys<D> - 1) / kKeys<D>;
  w.full_end = static_cast<int>(mask.end(w.query)) / kKeys<D>;
  return w;
}

// The place in a ring of kStages buffers.
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Brings all that the block's tiles read: one warp, of which one lane issues the copies.
template <class T, int D>
struct Loader {
  const Params& p;
  Shared<T, D>& s;
  bool leads;
  Ring k, v;
  int landed = 0;  // the parity of v_landed

  static constexpr int kRowBytes = D * sizeof(T);

  __device__ __forceinline__ Loader(const Params& params, Shared<T, D>& shared, bool leader)
      : p(params), s(shared), leads(leader) {}

  __device__ __forceinline__ void load_queries(const Work& w) {
    if (!leads) return;
    mbarrier_arrive_expect(&s.q_full, kQueries * kRowBytes);
    int row = static_cast<int>(p.first_query_row(w.b)) + w.query, b = p.packed ? 0 : w.b;
#pragma unroll 1  // a loader has few registers
    for (int t = 0; t < D / kTileColumns; t++)
      tma_load(s.q.tiles[t], &p.q_map, &s.q_full, t * kTileColumns, row, w.h, b);
  }

  __device__ __forceinline__ void copy_rows(typename Shared<T, D>::Keys& to, const TensorMap* map,
                                            Mbarrier* barrier, const Work& w, int n) {
    int row = static_cast<int>(p.first_key_row(w.b)) + n * kKeys<D>, b = p.cu_seqlens_k ? 0 : w.b;
#pragma unroll 1  // a loader has few registers
    for (int t = 0; t < D / kTileColumns; t++)
      tma_load(to.tiles[t], map, barrier, t * kTileColumns, row, w.h_k, b);
  }

  __device__ __forceinline__ void load_keys(const Work& w, int n) {
    if (leads) {
      mbarrier_wait(&s.k_empty[k.stage], k.parity ^ 1);
      mbarrier_arrive_expect(&s.k_full[k.stage], kKeys<D> * kRowBytes);
      copy_rows(s.k[k.stage], &p.k_map, &s.k_full[k.stage], w, n);
    }
    k.next();
  }

  // Rows beyond the last key have probability 0, which what stands there, NaN say, must not meet.
  __device__ __forceinline__ void load_values(const Work& w, int n) {
    int valid = w.keys - n * kKeys<D>;
    bool cleared = p.ends_inside && valid < kKeys<D>;
    Mbarrier* full = &s.v_full[v.stage];
    if (leads) {
      mbarrier_wait(&s.v_empty[v.stage], v.parity ^ 1);
      mbarrier_arrive_expect(cleared ? &s.v_landed : full, kKeys<D> * kRowBytes);
      copy_rows(s.v[v.stage], &p.v_map, cleared ? &s.v_landed : full, w, n);
    }
    if (cleared) {
      __syncwarp();  // the copy is under way
      mbarrier_wait(&s.v_landed, landed);
      landed ^= 1;
      clear_rows(s.v[v.stage].tiles, valid, static_cast<int>(threadIdx.x));
      fence_proxy_async();
      __syncwarp();
      if (leads) mbarrier_arrive(full);
    }
    v.next();
  }

  __device__ __forceinline__ void run() {
    int q_parity = 1;
    for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles; tile += static_cast<int>(gridDim.x)) {
      Work w = work<D>(p, tile);
      bool any = w.first < w.end;
      if (any) load_keys(w, w.end - 1);
      if (leads) mbarrier_wait(&s.q_empty, q_parity);
      q_parity ^= 1;
      if (!any) {
        if (leads)
          mbarrier_arrive(&s.q_full);  // else those who compute could be two tiles on, and not be noticed
        continue;
      }
      load_queries(w);
      for (int n = w.end - 2; n >= w.first; n--) {
        load_keys(w, n);
        load_values(w, n + 1);
      }
      load_values(w, w.first);
    }
  }
};

// The greatest, or the sum, of the four threads that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// A warpgroup's 64 queries, of which a thread has two: rows row and row + 8 (hopper.h, products).
template <class T, int D>
struct Computer {
  static constexpr int N = kKeys<D>;

  const Params& p;
  Shared<T, D>& s;
  int group;  // which of the computing warpgroups; read from one lane, it is the same for a warp to the
              // compiler
  int warp, lane;
  Ring k, v;
  int q_parity = 0;

  __device__ __forceinline__ Computer(const Params& params, Shared<T, D>& shared, int thread)
      : p(params),
        s(shared),
        group(__shfl_sync(kAllLanes, thread / 128, 0)),
        warp(thread % 128 / 32),
        lane(thread % 32) {}

  float o[D / 2];
  float m[2], l[2];  // the rows' maxima of scores, and this thread's part of the sums
  uint32_t probabilities[N / 16][4];

  __device__ __forceinline__ int row() const { return 64 * group + 16 * warp + lane / 4; }

  __device__ __forceinline__ void issue_scores(float (&scores)[N / 2]) {
    uint64_t of_q = descriptor(operand_address(s.q.tiles[0][64 * group]));
    uint64_t of_k = descriptor(operand_address(s.k[k.stage].tiles[0]));
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
      int t = c / 4, bytes = c % 4 * 32;
      wgmma_shared<T, N>(scores, advanced(of_q, t * kQueries * kTileRowBytes + bytes),
                         advanced(of_k, t * N * kTileRowBytes + bytes), c > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out() {
    uint64_t of_v = descriptor(operand_address(s.v[v.stage].tiles[0]), N * kTileRowBytes);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < N / 16; c++)
      wgmma_registers<T, D>(o, probabilities[c], advanced(of_v, 16 * c * kTileRowBytes), true);
    wgmma_commit();
  }

  // Of the warpgroup's warps, each says once that it has read a buffer.
  __device__ __forceinline__ void release(Mbarrier* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // At edges alone: what it takes is computed anew there, and not kept in registers between.
  __device__ __forceinline__ void mask(const Work& w, float (&scores)[N / 2], int n) {
    Mask of(w.queries, w.keys, p.window_left, p.window_right);
    int begin[2], end[2];  // the keys that the rows see
#pragma unroll
    for (int r = 0; r < 2; r++) {
      begin[r] = static_cast<int>(of.begin(w.query + row() + 8 * r));
      end[r] = static_cast<int>(of.end(w.query + row() + 8 * r));
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      int key = n * N + i / 4 * 8 + lane % 4 * 2 + i % 2, r = i % 4 / 2;
      if (key < begin[r] || key >= end[r]) scores[i] = -INFINITY;
    }
  }

  // Scores become probabilities 2^(s · factor − m · factor); what o and l are to be multiplied by goes to
  // `alpha`.
  __device__ __forceinline__ void softmax(float (&scores)[N / 2], float factor, float (&alpha)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float most = m[r];
#pragma unroll
      for (int i = 0; i < N / 8; i++)
        most = fmaxf(most, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      most = quad_max(most);
      float shift =
          most == -INFINITY ? 0.0f : most * factor;  // a row that has seen no key yet has no maximum
      alpha[r] = exp2_approximate(m[r] * factor - shift);
      m[r] = most;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < N / 8; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = scores[4 * i + 2 * r + e];
          x = exp2_approximate(fmaf(x, factor, -shift));
          sum += x;
        }
      l[r] = l[r] * alpha[r] + sum;
    }
  }

  // A scale that is not positive cannot follow the maximum: the scores are multiplied before.
  __device__ __forceinline__ float scale(float (&scores)[N / 2]) {
    if (p.softmax_scale > 1e-37f) return p.softmax_scale * kLog2E;
#pragma unroll
    for (int i = 0; i < N / 2; i++) scores[i] *= p.softmax_scale * kLog2E;
    return 1.0f;
  }

  __device__ __forceinline__ void attend(const Work& w) {
    float scores[N / 2], alpha[2], factor;
    mbarrier_wait(&s.k_full[k.stage], k.parity);
    issue_scores(scores);
    wgmma_wait<0>();
    wgmma_done(scores);
    release(&s.k_empty[k.stage]);
    k.next();
    factor = scale(scores);
    int n = w.end - 1;
    if (n >= w.full_end || n < w.full) mask(w, scores, n);
    softmax(scores, factor, alpha);
    round_factors<T, N>(probabilities, scores);

    for (n--; n >= w.first; n--) {
      mbarrier_wait(&s.k_full[k.stage], k.parity);
      named_barrier_sync(kTurn + group, 256);
      issue_scores(scores);
      mbarrier_wait(&s.v_full[v.stage], v.parity);
      issue_out();
      named_barrier_arrive(kTurn + (group + 1) % kWarpgroups, 256);
      wgmma_wait<1>();
      wgmma_done(scores);
      release(&s.k_empty[k.stage]);
      k.next();
      factor = scale(scores);
      if (n >= w.full_end || n < w.full) mask(w, scores, n);
      softmax(scores, factor, alpha);
      wgmma_wait<0>();
      wgmma_done(o);
      release(&s.v_empty[v.stage]);
      v.next();
#pragma unroll
      for (int i = 0; i < D / 2; i++) o[i] *= alpha[i % 4 / 2];
      round_factors<T, N>(probabilities, scores);
    }
    mbarrier_wait(&s.v_full[v.stage], v.parity);
    issue_out();
    wgmma_wait<0>();
    wgmma_done(o);
    release(&s.v_empty[v.stage]);
    v.next();
  }

  __device__ __forceinline__ void store(const Work& w) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = quad_sum(l[r]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      if (sum != sum) inverse = sum;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        o[4 * i + 2 * r] *= inverse;
        o[4 * i + 2 * r + 1] *= inverse;
      }
      // m is of scores before the scale, where that is positive.
      float top = p.softmax_scale > 1e-37f ? m[r] * p.softmax_scale : m[r] * kLn2;
      int query = w.query + row() + 8 * r;
      if (lane % 4 == 0 && query < w.queries)
        p.lse[p.lse_row(w.b, w.h) + query] = sum == 0.0f ? -INFINITY : top + logf(sum);
    }

    named_barrier_sync(kOwn + group, 128);                        // all have read their queries
    int rows = p.packed ? w.queries - w.query - 64 * group : 64;  // those after them are another sequence's
    store_rows<T, D>(s.q.tiles, o, group, warp, lane, kOwn + group, &p.out_map, p.out,
                     p.first_query_row(w.b) + w.query + 64 * group, rows, w.h, p.packed ? 0 : w.b);
    if (warp == 0 && lane == 0) mbarrier_arrive(&s.q_empty);
  }

  __device__ __forceinline__ void run() {
    if (group == kWarpgroups - 1) named_barrier_arrive(kTurn, 256);  // the first turn is the first one's
    for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles; tile += static_cast<int>(gridDim.x)) {
      Work w = work<D>(p, tile);
#pragma unroll
      for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        m[r] = -INFINITY;
        l[r] = 0.0f;
      }
      mbarrier_wait(&s.q_full, q_parity);
      q_parity ^= 1;
      if (w.first < w.end) attend(w);
      store(w);
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_kernel(const __grid_constant__ Params p) {
  auto& s = *shared_memory<Shared<T, D>>();
  int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (const TensorMap* map : {&p.q_map, &p.out_map}) prefetch(map);
    if (p.seqlen_k > 0)
      for (const TensorMap* map : {&p.k_map, &p.v_map}) prefetch(map);
    mbarrier_init(&s.q_full, 1);
    mbarrier_init(&s.q_empty, kWarpgroups);
    mbarrier_init(&s.v_landed, 1);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&s.k_full[i], 1);
      mbarrier_init(&s.v_full[i], 1);
      mbarrier_init(&s.k_empty[i], 4 * kWarpgroups);
      mbarrier_init(&s.v_empty[i], 4 * kWarpgroups);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread < 128) {
    setmaxnreg_dec<kCopying>();
    if (thread < 32) Loader<T, D>(p, s, thread == 0).run();
  } else {
    setmaxnreg_inc<kComputing>();
    Computer<T, D>(p, s, thread - 128).run();
  }
}

constexpr int kCacheBytes = 32 << 20;  // of keys and values that are read at a time: most of an H100's L2

template <class T, int D>
void run(Params& p, int multiprocessors, const Queue& queue) {
  static_assert(sizeof(Shared<T, D>) <= 227 * 1024);
  int64_t rows_q = p.seqlen_q, rows_k = p.seqlen_k;
  int64_t sequences_q = p.cu_seqlens_q ? 1 : p.batch, sequences_k = p.cu_seqlens_k ? 1 : p.batch;
  p.q_map = make_tensor_map(p.q, p.dtype, D, rows_q, p.nheads, sequences_q, kQueries);
  p.out_map = make_tensor_map(p.out, p.dtype, D, rows_q, p.nheads, sequences_q, 64);
  if (rows_k > 0) {
    p.k_map = make_tensor_map(p.k, p.dtype, D, rows_k, p.nheads_k, sequences_k, kKeys<D>);
    p.v_map = make_tensor_map(p.v, p.dtype, D, rows_k, p.nheads_k, sequences_k, kKeys<D>);
  }
  p.packed = p.cu_seqlens_q != nullptr;
  p.ends_inside = p.cu_seqlens_k || p.seqused_k || p.leftpad_k;
  int64_t slices = p.nheads * (p.packed ? 1 : p.batch);
  int64_t blocks = p.packed ? rows_q / kQueries + p.batch : (rows_q + kQueries - 1) / kQueries;
  int64_t kept = kCacheBytes / (2 * int64_t{sizeof(T)} * D * (rows_k > 0 ? rows_k : 1));  // heads of k
  int64_t section = (kept > 1 ? kept : 1) * (p.nheads / p.nheads_k);
  if (slices * blocks > INT_MAX)
    throw std::runtime_error("attention_forward(" + p.describe() + "): more tiles than fit in 32 bits");
  p.slices = static_cast<int>(slices);
  p.section = static_cast<int>(section < slices ? section : slices);
  p.blocks = static_cast<int>(blocks);
  p.tiles = static_cast<int>(slices * blocks);
  launch(attention_forward_kernel<T, D>,
         {"attention_forward", dim3(p.tiles < multiprocessors ? p.tiles : multiprocessors), dim3(kThreads),
          int{sizeof(Shared<T, D>)}},
         queue, p);
}

template <class T>
void run(Params& p, int multiprocessors, const Queue& queue) {
  switch (p.headdim) {
    case 64:
      return run<T, 64>(p, multiprocessors, queue);
    case 128:
      return run<T, 128>(p, multiprocessors, queue);
    case 256:
      return run<T, 256>(p, multiprocessors, queue);
    default:
      throw std::runtime_error("attention_forward(" + p.describe() + "): no kernel has this headdim");
  }
}

}  // namespace

void attention_forward(const AttentionParams& call, int multiprocessors, const Queue& queue) {
  if (call.batch == 0 || call.seqlen_q == 0) return;
  Params p{};
  static_cast<AttentionParams&>(p) = call;
  p.dtype == DType::bf16 ? run<bf16>(p, multiprocessors, queue) : run<f16>(p, multiprocessors, queue);
}

}  // namespace fastgpt
