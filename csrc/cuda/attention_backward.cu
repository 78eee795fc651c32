// Attention backward on Hopper (FlashAttention-3: Shah et al. 2024, arXiv:2407.08608), of the forward in
// attention_forward.cu:
//
//   p = exp(softmax_scale q kᵀ - lse),  delta = Σ_d dout out - dlse,  ds = p (dout vᵀ - delta)
//   dv = pᵀ dout,  dk = softmax_scale dsᵀ q,  dq = softmax_scale ds k
//
// Tensors are as in forward, headdim 64 or 128; dq, dk, dv are contiguous. Products and sums are fp32; p and
// ds are rounded to the tensors' type, as factors of the last three products.
//
// Three kernels: delta of each query, the products, and dq from its sums. In the second one a block has kKeys
// keys of one head of k, whose two warpgroups have 64 keys each, and walks the heads of q that share them,
// and of each the blocks of kQueries queries that see them, brought by a third one's copies into kStages
// buffers. The scores are transposed, (keys, queries), so that pᵀ and dsᵀ are factors in registers as they
// are, and dk and dv stay in registers to the end. Only dq wants all keys of ds: it is the one thing that
// goes through shared memory. While the matrix units compute one product, the warpgroups do what the product
// before it was for.
//
// dq is a sum over blocks of keys, in fp32, in global memory. They add to it in turn, from the last keys to
// the first ones, so that two runs give the same bits: before it adds, a block waits until the flag of these
// queries counts all blocks before it; the first of them writes. A block takes its keys by the next ticket,
// from the last to the first as well, so it waits only for blocks that have begun. With causal masks it
// begins with the queries at the diagonal: at any time each block is at other queries, and the one before it
// has been there. Without one all begin at the same queries, and each waits once, until it is that far
// behind.
//
// Held by tests/test_attention_cuda.py in the emulator; not yet run on a GPU.

#include <cmath>

#include "attention_tiles.h"
#include "launch.h"

namespace fastgpt {
namespace {

constexpr int kKeys = 128, kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
// Registers of a thread when the warpgroups have shared out what the block was given.
constexpr int kCopying = 24, kComputing = 240;
static_assert(kCopying + kWarpgroups * kComputing <= kLaunchedRegisters * (1 + kWarpgroups));
// Named barriers: of those who compute, and of a warpgroup's own threads.
constexpr int kAll = 1, kOwn = 2;
constexpr int kRowThreads = 256;  // of a block of the kernels before and after

template <int D>
constexpr int kQueries = D == 64 ? 128 : 64;

// The keys of a block, and the blocks of queries of a head, [first, end), that see some of them.
struct KeysAt {
  int b, h, key, keys;  // h: of k
  int queries, first, end;
  int group, steps;  // heads of q to one of k; blocks of queries of all of them
};

// Of a block of queries: the first one, the part of dq that a warpgroup has (the other has the next one), and
// how many blocks of keys add to it before this one.
struct alignas(16) Step {
  int64_t part;
  int query, turn;
};
constexpr int kSteps = 4;  // that are kept, of which three are read or written: added, computed, brought

template <class T, int D>
struct Shared {
  // Tiles of 64 columns: the engine's and wgmma's.
  struct Keys {
    T tiles[D / kTileColumns][kKeys][kTileColumns];
  } k, v;  // and then dk and dv
  struct Queries {
    T tiles[D / kTileColumns][kQueries<D>][kTileColumns];
  } q[kStages], dout[kStages];
  // Of every other block: a warpgroup may be at the next one while the other reads this one.
  struct Scores {
    T tiles[kQueries<D> / kTileColumns][kKeys][kTileColumns];
  } ds[2];
  float lse[kStages][kQueries<D>], delta[kStages][kQueries<D>];  // lse in base 2
  Step steps[kSteps];
  Mbarrier keys_full, full[kStages], empty[kStages], landed;
  KeysAt at;
};

// What the kernels leave for each other. A head of q has `blocks` blocks of kQueries rows.
struct Workspace {
  float *lse, *delta;   // (heads, blocks, kQueries); of no query: infinity and 0
  float* dq;            // (heads, blocks) tiles, as the threads that compute them have them
  int *flags, *ticket;  // (heads, blocks, kWarpgroups): how many have added to the part of dq; one number
};

struct Params : AttentionBackwardParams {
  TensorMap q_map, dout_map, k_map, v_map, dk_map, dv_map;
  Workspace work;
  int64_t rows;          // of all heads' blocks
  int blocks, blocks_k;  // of a head
  bool packed;           // rows beyond a sequence's last one are another sequence's
  bool ends_inside;      // keys end before their tensor's rows do, or their sequence's

  std::string describe() const { return fastgpt::describe(*this); }
};

// A block of queries of one head, and the blocks of keys [first, end) that they see; none where first >= end.
struct Queries {
  int b, h, query, queries;  // the first one, and how many the sequence has
  int first, end;
};

template <int D>
__device__ __forceinline__ void see_keys(const Params& p, Queries& at) {
  at.first = at.end = 0;
  if (at.query >= at.queries) return;
  Mask mask(at.queries, p.keys(at.b), p.window_left, p.window_right);
  int64_t begin = mask.begin(at.query), end = mask.end(min(at.query + kQueries<D>, at.queries) - 1);
  if (begin >= end) return;
  at.first = static_cast<int>(begin / kKeys);
  at.end = static_cast<int>((end + kKeys - 1) / kKeys);
}

template <int D>
__device__ __forceinline__ Queries queries_of(const Params& p, int64_t block) {
  Queries at{};
  int head = static_cast<int>(block / p.blocks), within = static_cast<int>(block % p.blocks);
  at.h = head % static_cast<int>(p.nheads);
  at.b = head / static_cast<int>(p.nheads);
  if (p.packed) within = of_sequence(p.cu_seqlens_q, p.batch, kQueries<D>, within, at.b);
  at.query = within * kQueries<D>;
  at.queries = static_cast<int>(p.queries(at.b));
  see_keys<D>(p, at);
  return at;
}

// Before the products: lse and delta of each query, and flags and ticket at 0. D / 8 threads have a row.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads)
    attention_backward_rows_kernel(const __grid_constant__ Params p) {
  constexpr int kLanes = D / 8;
  int64_t thread = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  int64_t row = thread / kLanes, block = row / kQueries<D>;
  int lane = static_cast<int>(thread % kLanes), within = static_cast<int>(row % kQueries<D>);
  Queries at = queries_of<D>(p, block);
  int query = at.query + within;
  bool is_query = query < at.queries;
  float sum = 0.0f;
  if (is_query) {
    int64_t of_tensor = p.first_query_row(at.b) + query;
    Pack<T, 8> packs[2];
    float dout[8], out[8];
    for (int i = 0; i < 2; i++) {
      const Tensor& t = i ? p.out : p.dout;
      packs[i].load(static_cast<const T*>(t.data) + (p.packed ? 0 : at.b * t.batch_stride) +
                    of_tensor * t.seq_stride + at.h * t.head_stride + 8 * lane);
    }
    packs[0].unpack(dout);
    packs[1].unpack(out);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += dout[i] * out[i];
  }
  sum = warp_sum(sum, kLanes);
  if (lane == 0) {
    float lse = INFINITY;
    if (is_query) {
      int64_t of_lse = p.lse_row(at.b, at.h) + query;
      if (p.lse[of_lse] != -INFINITY) lse = p.lse[of_lse] * kLog2E;  // else p is 0
      if (p.dlse) sum -= p.dlse[of_lse];
    }
    p.work.lse[row] = lse;
    p.work.delta[row] = sum;
    if (within < kWarpgroups) p.work.flags[block * kWarpgroups + within] = 0;
    if (row == 0) *p.work.ticket = 0;
  }
}

template <int D>
__device__ __forceinline__ KeysAt keys_of(const Params& p, int ticket) {
  KeysAt at{};
  int head = ticket / p.blocks_k, within = p.blocks_k - 1 - ticket % p.blocks_k;
  at.h = head % static_cast<int>(p.nheads_k);
  at.b = head / static_cast<int>(p.nheads_k);
  at.group = static_cast<int>(p.nheads / p.nheads_k);
  if (p.packed) within = of_sequence(p.cu_seqlens_k, p.batch, kKeys, within, at.b);
  at.key = within * kKeys;
  at.keys = static_cast<int>(p.keys(at.b));
  at.queries = static_cast<int>(p.queries(at.b));
  if (at.key >= at.keys) return at;
  Mask mask(at.queries, at.keys, p.window_left, p.window_right);
  int64_t first = mask.first_query(at.key);
  int64_t end = mask.last_query(min(at.key + kKeys, at.keys) - 1, at.queries);
  if (first >= end) return at;
  at.first = static_cast<int>(first / kQueries<D>);
  at.end = static_cast<int>((end + kQueries<D> - 1) / kQueries<D>);
  at.steps = at.group * (at.end - at.first);
  return at;
}

// Of all heads' blocks of queries, that of head h of q and of number m of its sequence.
template <int D>
__device__ __forceinline__ int64_t block_of(const Params& p, const KeysAt& at, int h, int m) {
  if (p.packed) return int64_t{h} * p.blocks + first_block(p.cu_seqlens_q, kQueries<D>, at.b) + m;
  return (int64_t{at.b} * p.nheads + h) * p.blocks + m;
}

// Brings all that the block reads: one warp, of which one lane issues the copies.
template <class T, int D>
struct Loader {
  const Params& p;
  Shared<T, D>& s;
  const KeysAt& at;
  int lane;
  int landed = 0;  // the parity of s.landed
  int stage = 0;

  static constexpr int kRowBytes = D * sizeof(T);

  __device__ __forceinline__ Loader(const Params& params, Shared<T, D>& shared, int thread)
      : p(params), s(shared), at(shared.at), lane(thread) {}

  // Two operands of the same rows; those from `valid` on become 0, as what stands there may be NaN.
  template <class Operand>
  __device__ __forceinline__ void load(Operand& a, const TensorMap* a_map, Operand& b, const TensorMap* b_map,
                                       int64_t row, int head, int sequence, int valid, Mbarrier* full,
                                       int64_t block) {
    constexpr int kRows = sizeof(Operand) / kRowBytes;
    bool clear = valid < kRows;
    Mbarrier* barrier = clear ? &s.landed : full;
    if (lane == 0) {
      bool with_rows = full != &s.keys_full;
      mbarrier_arrive_expect(barrier, 2 * kRows * kRowBytes + (with_rows ? 2 * kRows * 4 : 0));
#pragma unroll 1  // a loader has few registers
      for (int t = 0; t < D / kTileColumns; t++) {
        tma_load(a.tiles[t], a_map, barrier, t * kTileColumns, static_cast<int>(row), head, sequence);
        tma_load(b.tiles[t], b_map, barrier, t * kTileColumns, static_cast<int>(row), head, sequence);
      }
      if (with_rows) {
        bulk_load(s.lse[stage], p.work.lse + block * kRows, kRows * 4, barrier);
        bulk_load(s.delta[stage], p.work.delta + block * kRows, kRows * 4, barrier);
      }
    }
    if (!clear) return;
    __syncwarp();  // the copies are under way
    mbarrier_wait(&s.landed, landed);
    landed ^= 1;
    clear_rows(a.tiles, valid, lane);
    clear_rows(b.tiles, valid, lane);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(full);
  }

  __device__ __forceinline__ void run() {
    int sequence = p.packed ? 0 : at.b, step = 0;
    load(s.k, &p.k_map, s.v, &p.v_map, p.first_key_row(at.b) + at.key, at.h, sequence,
         p.ends_inside ? at.keys - at.key : kKeys, &s.keys_full, 0);
    for (int h = at.h * at.group; h < (at.h + 1) * at.group; h++)
      for (int m = at.first; m < at.end; m++, step++) {
        Queries of{at.b, h, m * kQueries<D>, at.queries, 0, 0};
        see_keys<D>(p, of);
        int64_t block = block_of<D>(p, at, h, m);
        stage = step % kStages;
        if (lane == 0) {
          mbarrier_wait(&s.empty[stage], step / kStages % 2 ^ 1);
          s.steps[step % kSteps] = {block * kWarpgroups, of.query, of.end - 1 - at.key / kKeys};
        }
        load(s.q[stage], &p.q_map, s.dout[stage], &p.dout_map, p.first_query_row(at.b) + of.query, h,
             sequence, p.packed ? at.queries - of.query : kQueries<D>, &s.full[stage], block);
      }
  }
};

// A warpgroup's 64 keys, of which a thread has two: rows row() and row() + 8 of transposed scores.
template <class T, int D>
struct Computer {
  static constexpr int M = kQueries<D>;

  const Params& p;
  Shared<T, D>& s;
  const KeysAt& at;
  int group, warp, lane;
  int stage = 0;

  float dk[D / 2], dv[D / 2];

  __device__ __forceinline__ Computer(const Params& params, Shared<T, D>& shared, int thread)
      : p(params),
        s(shared),
        at(shared.at),
        group(__shfl_sync(kAllLanes, thread / 128, 0)),
        warp(thread % 128 / 32),
        lane(thread % 32) {}

  __device__ __forceinline__ int row() const { return 64 * group + 16 * warp + lane / 4; }

  // (keys, queries) = a bᵀ
  __device__ __forceinline__ void issue_scores(float (&d)[M / 2], typename Shared<T, D>::Keys& a,
                                               typename Shared<T, D>::Queries& b) {
    uint64_t of_a = descriptor(operand_address(a.tiles[0][64 * group])),
             of_b = descriptor(operand_address(b.tiles[0]));
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
      int t = c / 4, bytes = c % 4 * 32;
      wgmma_shared<T, M>(d, advanced(of_a, t * kKeys * kTileRowBytes + bytes),
                         advanced(of_b, t * M * kTileRowBytes + bytes), c > 0);
    }
    wgmma_commit();
  }

  // (keys, D) += (keys, queries) b
  __device__ __forceinline__ void issue_sum(float (&sum)[D / 2], const uint32_t (&factors)[M / 16][4],
                                            typename Shared<T, D>::Queries& b) {
    uint64_t of_b = descriptor(operand_address(b.tiles[0]), M * kTileRowBytes);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < M / 16; c++)
      wgmma_registers<T, D>(sum, factors[c], advanced(of_b, 16 * c * kTileRowBytes), true);
    wgmma_commit();
  }

  // Its part of dq, 64 queries by 64 columns: half of the queries or half of the columns.
  __device__ __forceinline__ void issue_dq(float (&dq)[32], typename Shared<T, D>::Scores& ds) {
    int queries = M == 128 ? group : 0, columns = D == 128 ? group : 0;
    uint64_t of_ds = descriptor(operand_address(ds.tiles[queries]));
    uint64_t of_k = descriptor(operand_address(s.k.tiles[columns]));
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kKeys / 16; c++)
      wgmma_transposed<T, 64>(dq, advanced(of_ds, 16 * c * kTileRowBytes),
                              advanced(of_k, 16 * c * kTileRowBytes), c > 0);
    wgmma_commit();
  }

  // The scores become p = 2^(score · scale − lse), 0 where the query does not see the key.
  __device__ __forceinline__ void probabilities(float (&scores)[M / 2], int query) {
    float factor = p.softmax_scale * kLog2E;
    const float* lse = s.lse[stage] + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < M / 8; i++) {
      float2 of = *reinterpret_cast<const float2*>(lse + 8 * i);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float* x = &scores[4 * i + 2 * r];
        x[0] = exp2_approximate(fmaf(x[0], factor, -of.x));
        x[1] = exp2_approximate(fmaf(x[1], factor, -of.y));
      }
    }
    Mask mask(at.queries, at.keys, p.window_left, p.window_right);
    int last = min(query + M, at.queries) - 1;
    if (mask.begin(last) <= at.key && mask.end(query) >= at.key + kKeys) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int key = at.key + row() + 8 * r;
      int first = static_cast<int>(mask.first_query(key)) - query - lane % 4 * 2;
      int end = static_cast<int>(mask.last_query(key, at.queries)) - query - lane % 4 * 2;
      if (key >= at.keys) end = first;
#pragma unroll
      for (int i = 0; i < M / 8; i++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * i + e < first || 8 * i + e >= end) scores[4 * i + 2 * r + e] = 0.0f;
    }
  }

  // p becomes ds.
  __device__ __forceinline__ void differentiate(float (&scores)[M / 2], const float (&dp)[M / 2]) {
    const float* delta = s.delta[stage] + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < M / 8; i++) {
      float2 of = *reinterpret_cast<const float2*>(delta + 8 * i);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        scores[4 * i + 2 * r] *= dp[4 * i + 2 * r] - of.x;
        scores[4 * i + 2 * r + 1] *= dp[4 * i + 2 * r + 1] - of.y;
      }
    }
  }

  // When it is this block's turn: after a barrier with the thread that has waited for it.
  __device__ __forceinline__ void add(const float (&dq)[32], int step) {
    Step of = s.steps[step % kSteps];
    named_barrier_sync(kOwn + group, 128);
    float* to = p.work.dq + (of.part + group) * (64 * 64) + 4 * (32 * warp + lane);
    auto four = [&](int i) { return float4{dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]}; };
    if (of.turn == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) *reinterpret_cast<float4*>(to + 512 * i) = four(i);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) red_add(to + 512 * i, four(i));
    }
  }
  __device__ __forceinline__ void await_turn(int step) {
    if (warp > 0 || lane > 0) return;
    Step of = s.steps[step % kSteps];
    if (of.turn > 0) flag_wait(p.work.flags + of.part + group, of.turn);
  }
  // After a barrier that those who have added have come to.
  __device__ __forceinline__ void pass_turn(int step) {
    if (warp > 0 || lane > 0) return;
    Step of = s.steps[step % kSteps];
    flag_set(p.work.flags + of.part + group, of.turn + 1);
  }

  __device__ __forceinline__ void compute() {
    float scores[M / 2], dp[M / 2], dq[32];
    uint32_t factors[M / 16][4];

    mbarrier_wait(&s.keys_full, 0);
    mbarrier_wait(&s.full[0], 0);
    issue_scores(scores, s.k, s.q[0]);
    int step = 0;
    while (true) {
      auto &q = s.q[stage], &dout = s.dout[stage];
      auto& ds = s.ds[step % 2];
      issue_scores(dp, s.v, dout);
      wgmma_wait<1>();
      wgmma_done(scores);
      probabilities(scores, s.steps[step % kSteps].query);
      round_factors<T, M>(factors, scores);
      issue_sum(dv, factors, dout);
      wgmma_wait<1>();
      wgmma_done(dp);
      differentiate(scores, dp);
      uint32_t ds_factors[M / 16][4];
      round_factors<T, M>(ds_factors, scores);
      write_tiles<T, M>(ds.tiles, 64 * group + 16 * warp, lane, ds_factors);
      fence_proxy_async();
      issue_sum(dk, ds_factors, q);
      named_barrier_sync(kAll, 128 * kWarpgroups);
      issue_dq(dq, ds);
      if (step > 0) pass_turn(step - 1);  // what was added then is there by now
      await_turn(step);
      wgmma_wait<0>();
      wgmma_done(dv);
      wgmma_done(dk);
      wgmma_done(dq);
      if (lane == 0) mbarrier_arrive(&s.empty[stage]);
      if (++step == at.steps) break;
      stage = step % kStages;
      mbarrier_wait(&s.full[stage], step / kStages % 2);
      issue_scores(scores, s.k, s.q[stage]);
      add(dq, step - 1);
    }
    add(dq, step - 1);
    named_barrier_sync(kOwn + group, 128);
    pass_turn(step - 1);
    named_barrier_sync(kAll, 128 * kWarpgroups);  // both have read k and v
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.0f;
    if (at.first < at.end) compute();
    if (at.key >= at.keys) return;
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] *= p.softmax_scale;
    int rows = p.ends_inside ? at.keys - at.key - 64 * group : 64, sequence = p.packed ? 0 : at.b;
    int64_t first = p.first_key_row(at.b) + at.key + 64 * group;
    store_rows<T, D>(s.k.tiles, dk, group, warp, lane, kOwn + group, &p.dk_map, p.dk, first, rows, at.h,
                     sequence);
    store_rows<T, D>(s.v.tiles, dv, group, warp, lane, kOwn + group, &p.dv_map, p.dv, first, rows, at.h,
                     sequence);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_backward_kernel(const __grid_constant__ Params p) {
  auto& s = *shared_memory<Shared<T, D>>();
  int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (const TensorMap* map : {&p.q_map, &p.dout_map, &p.k_map, &p.v_map, &p.dk_map, &p.dv_map})
      prefetch(map);
    mbarrier_init(&s.keys_full, 1);
    mbarrier_init(&s.landed, 1);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 4 * kWarpgroups);
    }
    fence_mbarrier_init();
    s.at = keys_of<D>(p, atomicAdd(p.work.ticket, 1));
  }
  __syncthreads();
  if (thread < 128) {
    setmaxnreg_dec<kCopying>();
    if (thread < 32 && s.at.first < s.at.end) Loader<T, D>(p, s, thread).run();
  } else {
    setmaxnreg_inc<kComputing>();
    Computer<T, D>(p, s, thread - 128).run();
  }
}

// After the products: dq from its sums, eight columns of a row a thread. Neighbouring threads have what
// neighbouring threads of the products had.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads)
    attention_backward_dq_kernel(const __grid_constant__ Params p) {
  int64_t thread = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  int within = static_cast<int>(thread % (64 * 8));
  int64_t part = thread / (64 * 8);
  int half = within >> 1 & 1, quad = within >> 2 & 7, warp = within >> 5 & 3;
  int chunk = within >> 7 << 1 | (within & 1), group = static_cast<int>(part % kWarpgroups);
  Queries at = queries_of<D>(p, part / kWarpgroups);
  int query = at.query + 16 * warp + 8 * half + quad + (D == 64 ? 64 * group : 0);
  if (query >= at.queries) return;
  float dq[8] = {};
  if (at.first < at.end) {
    const float* from = p.work.dq + part * (64 * 64) + 512 * chunk + 4 * (32 * warp + 4 * quad) + 2 * half;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 two = *reinterpret_cast<const float2*>(from + 4 * i);
      dq[2 * i] = two.x * p.softmax_scale;
      dq[2 * i + 1] = two.y * p.softmax_scale;
    }
  }
  Pack<T, 8> pack;
  pack.pack(dq);
  pack.store(static_cast<T*>(p.dq.data) + (p.packed ? 0 : at.b * p.dq.batch_stride) +
             (p.first_query_row(at.b) + query) * p.dq.seq_stride + at.h * p.dq.head_stride +
             (D == 128 ? 64 * group : 0) + 8 * chunk);
}

// Of the workspace, 16 bytes for the ticket and its room.
int64_t bytes_of(int64_t rows, int D) {
  return rows * (2 + D) * 4 + rows / (D == 64 ? 128 : 64) * kWarpgroups * 4 + 16;
}

template <class T, int D>
void run(Params& p, unsigned char* workspace, const Queue& queue) {
  static_assert(sizeof(Shared<T, D>) <= 227 * 1024);
  int64_t sequences = p.packed ? 1 : p.batch;
  p.work.lse = reinterpret_cast<float*>(workspace);
  p.work.delta = p.work.lse + p.rows;
  p.work.dq = p.work.delta + p.rows;
  p.work.flags = reinterpret_cast<int*>(p.work.dq + p.rows * D);
  p.work.ticket = p.work.flags + p.rows / kQueries<D> * kWarpgroups;
  int64_t tiles = p.nheads_k * sequences * p.blocks_k;
  int64_t row_blocks = p.rows * (D / 8) / kRowThreads;
  auto grid = [](int64_t blocks) { return dim3(grid_size(blocks)); };
  if (p.rows > 0)
    launch(attention_backward_rows_kernel<T, D>,
           {"attention_backward_rows", grid(row_blocks), dim3(kRowThreads)}, queue, p);
  if (tiles > 0 && p.seqlen_q > 0 && p.seqlen_k > 0) {
    p.q_map = make_tensor_map(p.q, p.dtype, D, p.seqlen_q, p.nheads, sequences, kQueries<D>);
    p.dout_map = make_tensor_map(p.dout, p.dtype, D, p.seqlen_q, p.nheads, sequences, kQueries<D>);
    p.k_map = make_tensor_map(p.k, p.dtype, D, p.seqlen_k, p.nheads_k, sequences, kKeys);
    p.v_map = make_tensor_map(p.v, p.dtype, D, p.seqlen_k, p.nheads_k, sequences, kKeys);
    p.dk_map = make_tensor_map(p.dk, p.dtype, D, p.seqlen_k, p.nheads_k, sequences, 64);
    p.dv_map = make_tensor_map(p.dv, p.dtype, D, p.seqlen_k, p.nheads_k, sequences, 64);
    launch(attention_backward_kernel<T, D>,
           {"attention_backward", grid(tiles), dim3(kThreads), int{sizeof(Shared<T, D>)}}, queue, p);
  }
  if (p.rows > 0)
    launch(attention_backward_dq_kernel<T, D>, {"attention_backward_dq", grid(row_blocks), dim3(kRowThreads)},
           queue, p);
}

// The rows of q's blocks of all heads.
void count(Params& p) {
  int size = p.headdim == 64 ? kQueries<64> : kQueries<128>;
  p.packed = p.cu_seqlens_q != nullptr;
  p.ends_inside = p.cu_seqlens_k || p.seqused_k || p.leftpad_k;
  int64_t heads = p.nheads * (p.packed ? 1 : p.batch);
  p.blocks = static_cast<int>(p.packed ? p.seqlen_q / size + p.batch : (p.seqlen_q + size - 1) / size);
  p.blocks_k = static_cast<int>(p.packed ? p.seqlen_k / kKeys + p.batch : (p.seqlen_k + kKeys - 1) / kKeys);
  p.rows = heads * p.blocks * size;
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& call) {
  Params p{};
  static_cast<AttentionBackwardParams&>(p) = call;
  count(p);
  return bytes_of(p.rows, static_cast<int>(p.headdim));
}

void attention_backward(const AttentionBackwardParams& call, void* workspace, const Queue& queue) {
  Params p{};
  static_cast<AttentionBackwardParams&>(p) = call;
  count(p);
  auto* memory = static_cast<unsigned char*>(workspace);
  bool wide = p.headdim == 128;
  if (!wide && p.headdim != 64)
    throw std::runtime_error("attention_backward(" + p.describe() + "): no kernel has this headdim");
  if (p.dtype == DType::bf16)
    wide ? run<bf16, 128>(p, memory, queue) : run<bf16, 64>(p, memory, queue);
  else
    wide ? run<f16, 128>(p, memory, queue) : run<f16, 64>(p, memory, queue);
}

}  // namespace fastgpt
