// Kernels by which tests/test_emulator.py holds the emulator to what it promises.
#include "self_test.h"

#include <algorithm>
#include <stdexcept>

#include "async_copy.h"
#include "hopper.h"
#include "launch.h"
#include "mma.h"

namespace fastgpt {
namespace {

struct Params {
  float* out;
  void* in;
  TensorMap map;  // of `in`, where there is one
  std::string describe() const { return "self-test"; }
};

__global__ void shuffles(const __grid_constant__ Params p) {
  int lane = static_cast<int>(threadIdx.x);
  float x = static_cast<float>(lane);
  p.out[lane] = __shfl_xor_sync(kAllLanes, x, 5);
  p.out[32 + lane] = __shfl_down_sync(kAllLanes, x, 3, 8);
  p.out[64 + lane] = __shfl_up_sync(kAllLanes, x, 3, 8);
  p.out[96 + lane] = __shfl_sync(kAllLanes, x, 9, 8);
  p.out[128 + lane] = static_cast<float>(__ballot_sync(kAllLanes, lane % 3 == 0) >> 16);
  if (lane < 4) p.out[160 + lane] = __shfl_xor_sync(0xfu, x, lane == 0 ? 8 : 1);  // lane 8 takes no part
  p.out[164] = warp_sum(x, 32);
}

__global__ void barriers(const __grid_constant__ Params p) {
  float* shared = shared_memory<float>();
  int thread = static_cast<int>(threadIdx.x);
  p.out[thread] = shared[thread];  // nobody has written it
  __syncthreads();
  if (thread < 32) {
    shared[thread] = static_cast<float>(thread);
    named_barrier_arrive(1, 64);
  } else if (thread < 64) {
    named_barrier_sync(1, 64);
    p.out[64 + thread] = shared[thread - 32];
  }
  if (thread >= 64) return;  // who has returned is not waited for
  __syncthreads();
  p.out[thread + 128] = shared[63 - thread];
}

// Each thread reads what the one before or the one after it writes.
__global__ void missing_barrier(const __grid_constant__ Params p) {
  float* shared = shared_memory<float>();
  int thread = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
  shared[thread] = 1.0f;
  p.out[thread] = shared[thread < last ? thread + 1 : last];
  __syncthreads();
  shared[32 + thread] = 1.0f;
  p.out[32 + thread] = shared[32 + (thread > 0 ? thread - 1 : 0)];
}

__global__ void copies(const __grid_constant__ Params p) {
  int lane = static_cast<int>(threadIdx.x);
  float* own = shared_memory<float>() + 4 * lane;
  for (int i = 0; i < 4; i++) own[i] = 1.0f;
  copy_async(own, p.out + 128, lane % 2 == 0);
  commit_copies();
  wait_for_copies<1>();
  p.out[lane] = own[0];  // nobody has waited for it
  wait_for_copies<0>();
  p.out[32 + lane] = own[3];
}

__global__ void divergent_barrier(const __grid_constant__ Params) {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void divergent_shuffle(const __grid_constant__ Params p) {
  if (threadIdx.x < 7)
    p.out[0] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
  else
    p.out[1] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

__global__ void missing_lane(const __grid_constant__ Params) {
  if (threadIdx.x != 5) __syncwarp();
}

__global__ void foreign_mask(const __grid_constant__ Params) { __syncwarp(0xff); }

__global__ void missing_threads(const __grid_constant__ Params) {
  if (threadIdx.x < 32) named_barrier_sync(2, 64);
}

__global__ void beyond_shared(const __grid_constant__ Params) {
  shared_memory<float>()[64 + threadIdx.x] = 1.0f;
}

// Threads 0 to 31 hand numbers to threads 32 to 63 by a ring of two buffers. Out: what has come.
__global__ void ring(const __grid_constant__ Params p) {
  struct Shared {
    float numbers[2][32];
    Mbarrier full[2], empty[2];
  };
  auto& s = *shared_memory<Shared>();
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread == 0)
    for (int i = 0; i < 2; i++) {
      mbarrier_init(&s.full[i], 32);
      mbarrier_init(&s.empty[i], 32);
    }
  __syncthreads();
  for (int step = 0; step < 8; step++) {
    int stage = step % 2, parity = step / 2 % 2;
    if (thread < 32) {
      mbarrier_wait(&s.empty[stage], parity ^ 1);
      s.numbers[stage][lane] = static_cast<float>(32 * step + lane);
      mbarrier_arrive(&s.full[stage]);
    } else {
      mbarrier_wait(&s.full[stage], parity);
      p.out[32 * step + lane] = s.numbers[stage][lane];
      mbarrier_arrive(&s.empty[stage]);
    }
  }
}

// A phase ends twice before the last thread, which nobody waits for, has seen it once.
__global__ void lapped(const __grid_constant__ Params) {
  auto* barrier = shared_memory<Mbarrier>();
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive(barrier);
    mbarrier_arrive(barrier);
  }
  __syncthreads();
  if (threadIdx.x == 31) mbarrier_wait(barrier, 0);
}

__global__ void uninitialized_barrier(const __grid_constant__ Params) {
  mbarrier_arrive(shared_memory<Mbarrier>());
}

// What copies and products are tested with: `in` is (192, 64) here, and (2 sequences, 12 rows, 3 heads, 128
// columns) where copies are. Two barriers, of which a phase ends when bytes have come.
struct Tiles {
  f16 in[192][kTileColumns], result[192][kTileColumns];
  Mbarrier landed[2];
};
constexpr int kTileRows = 64;  // of the map

__device__ Tiles& begin_tiles() {
  auto& s = *shared_memory<Tiles>();
  if (threadIdx.x == 0)
    for (Mbarrier& barrier : s.landed) mbarrier_init(&barrier, 1);
  fence_mbarrier_init();
  __syncthreads();
  return s;
}
__device__ float number(const void* tile, int row, int column) {
  auto* bytes = static_cast<const unsigned char*>(tile) + tile_offset(row, column / 8);
  return to_float(reinterpret_cast<const f16*>(bytes)[column % 8]);
}

// Out: the tile, and what is read in place of it before it is there; then it is stored at its place + (1
// column, 1 row, 1 head, -1 sequence).
__global__ void tiles(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_arrive_expect(&s.landed[0], kTileRows * kTileRowBytes);
    tma_load(s.in, &p.map, &s.landed[0], 64, 5, 1, 1);
  }
  __syncthreads();
  p.out[kTileRows * kTileColumns + thread] = number(s.in, 0, thread);
  __syncthreads();
  mbarrier_wait(&s.landed[0], 0);
  for (int row = 0; row < kTileRows; row++) p.out[row * kTileColumns + thread] = number(s.in, row, thread);
  __syncthreads();
  if (thread == 0) {
    tma_store(&p.map, s.in, 65, 6, 2, 0);
    tma_commit();
    tma_wait_read();
  }
}

__global__ void bulk(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_arrive_expect(&s.landed[0], 2 * 64);
    bulk_load(s.in[0], p.in, 64, &s.landed[0]);
    bulk_load(s.in[1], static_cast<f16*>(p.in) + 64, 64, &s.landed[0]);
  }
  mbarrier_wait(&s.landed[0], 0);
  p.out[thread] = to_float(s.in[thread / 32][thread % 32]);
}

// Who stores a tile and does not wait until it has been read may store what is written there next.
__global__ void reused_tile(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  for (int row = 0; row < kTileRows; row++) s.in[row][threadIdx.x] = from_float<f16>(1.0f);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&p.map, s.in, 0, 0, 0, 0);
    tma_commit();
    s.in[0][0] = from_float<f16>(2.0f);
    tma_wait_read();
  }
}

__global__ void unread_store(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  if (threadIdx.x == 0) tma_store(&p.map, s.in, 0, 0, 0, 0);
  if (threadIdx.x == 0) tma_wait_read();  // it is not committed
}

__global__ void unseen_load(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  if (threadIdx.x != 0) return;
  mbarrier_arrive_expect(&s.landed[0], kTileRows * kTileRowBytes);
  tma_load(s.in, &p.map, &s.landed[0], 0, 0, 0, 0);
}

__global__ void unaligned_tile(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  if (threadIdx.x == 0) tma_load(&s.in[0][32], &p.map, &s.landed[0], 0, 0, 0, 0);
}

__global__ void unfenced_store(const __grid_constant__ Params p) {
  auto& s = begin_tiles();
  uint32_t words[4] = {};
  if (threadIdx.x < 32) store_matrices(s.in[threadIdx.x], words);
  if (threadIdx.x == 0) fence_proxy_async();  // of its own words
  __syncthreads();
  if (threadIdx.x == 0) tma_store(&p.map, s.in, 0, 0, 0, 0);
}

// Brings `in`, 192 rows, by a warpgroup's first thread.
__device__ Tiles& load_factors(const Params& p) {
  auto& s = begin_tiles();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&s.landed[0], sizeof s.in);
    for (int row = 0; row < 192; row += kTileRows) tma_load(s.in[row], &p.map, &s.landed[0], 0, row, 0, 0);
  }
  mbarrier_wait(&s.landed[0], 0);
  return s;
}
template <int N>
__device__ void store_sums(const Params& p, const float (&d)[N / 2]) {
  int thread = static_cast<int>(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4;
  for (int i = 0; i < N / 2; i++)
    p.out[(row + 8 * (i % 4 / 2)) * N + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
}

// With A the first 64 rows of `in`, B the others: A Bᵀ.
__global__ void product_shared(const __grid_constant__ Params p) {
  auto& s = load_factors(p);
  float d[64];
  wgmma_fence();
  for (int c = 0; c < 4; c++)
    wgmma_shared<f16, 128>(d, descriptor(operand_address(s.in[0]) + 32 * c),
                           descriptor(operand_address(s.in[64]) + 32 * c), c > 0);
  wgmma_commit();
  p.out[64 * 128 + threadIdx.x] = d[0];  // nobody has waited for it
  wgmma_wait<0>();
  wgmma_done(d);
  store_sums<128>(p, d);
}

// A (B₀ B₁), B₀ and B₁ of 64 rows.
__global__ void product_registers(const __grid_constant__ Params p) {
  auto& s = load_factors(p);
  int thread = static_cast<int>(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4;
  uint32_t a[4][4];
  for (int c = 0; c < 4; c++)
    for (int i = 0; i < 4; i++) {
      int at = row + i % 2 * 8, column = 16 * c + i / 2 * 8 + thread % 4 * 2;
      a[c][i] = pack_pair<f16>(number(s.in, at, column), number(s.in, at, column + 1));
    }
  float d[64] = {};
  wgmma_fence();
  for (int c = 0; c < 4; c++)
    wgmma_registers<f16, 128>(d, a[c], descriptor(operand_address(s.in[64 + 16 * c]), 64 * kTileRowBytes),
                              true);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_done(d);
  store_sums<128>(p, d);
}

// Aᵀ B₀.
__global__ void product_transposed(const __grid_constant__ Params p) {
  auto& s = load_factors(p);
  float d[32];
  wgmma_fence();
  for (int c = 0; c < 4; c++)
    wgmma_transposed<f16, 64>(d, descriptor(operand_address(s.in[16 * c])),
                              descriptor(operand_address(s.in[64 + 16 * c])), c > 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_done(d);
  store_sums<64>(p, d);
}

// A product reads what a warp has just written by stmatrix, after a barrier; whether it has fenced it is
// kFence.
template <bool kFence>
__global__ void written_factor(const __grid_constant__ Params p) {
  auto& s = load_factors(p);
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int c = 0; c < 4; c++) {
    uint32_t words[4];
    int row = 16 * warp + lane % 16, chunk = 2 * c + lane / 16;
    load_matrices(words, reinterpret_cast<unsigned char*>(s.in) + tile_offset(row, chunk));
    store_matrices(reinterpret_cast<unsigned char*>(s.result) + tile_offset(row, chunk), words);
  }
  if (kFence) fence_proxy_async();
  __syncthreads();
  float d[64];
  for (int c = 0; c < 4; c++)
    wgmma_shared<f16, 128>(d, descriptor(operand_address(s.result[0]) + 32 * c),
                           descriptor(operand_address(s.in[64]) + 32 * c), c > 0);
  wgmma_commit();
  wgmma_wait<0>();
  store_sums<128>(p, d);
}

__global__ void unseen_product(const __grid_constant__ Params p) {
  auto& s = load_factors(p);
  float d[32];
  wgmma_transposed<f16, 64>(d, descriptor(operand_address(s.in[0])), descriptor(operand_address(s.in[64])),
                            false);
  wgmma_commit();
}

// Which turn each of three warps was in when it came to its first instruction.
__global__ void turns(const __grid_constant__ Params p) {
  int* turn = shared_memory<int>();
  if (threadIdx.x == 0) *turn = 0;
  __syncthreads();
  for (int i = 0; i < 8; i++) {
    if (threadIdx.x % 32 == 0) p.out[threadIdx.x / 32 * 8 + i] = static_cast<float>(atomicAdd(turn, 1));
    __syncwarp();
  }
}

}  // namespace

void self_test(const std::string& name, void* in, float* out) {
  struct Test {
    const char* name;
    void (*kernel)(Params);
    int threads, shared_bytes;
  };
  constexpr int kTiles = sizeof(Tiles);
  static const Test kTests[] = {{"shuffles", shuffles, 32, 0},
                                {"barriers", barriers, 96, 96 * 4},
                                {"missing_barrier", missing_barrier, 32, 64 * 4},
                                {"copies", copies, 32, 32 * 16},
                                {"divergent_barrier", divergent_barrier, 32, 0},
                                {"divergent_shuffle", divergent_shuffle, 32, 0},
                                {"missing_lane", missing_lane, 32, 0},
                                {"foreign_mask", foreign_mask, 32, 0},
                                {"missing_threads", missing_threads, 64, 0},
                                {"beyond_shared", beyond_shared, 32, 64 * 4},
                                {"too_many_threads", shuffles, 1025, 0},
                                {"too_much_shared", shuffles, 32, 228 * 1024},
                                {"turns", turns, 96, 4},
                                {"ring", ring, 64, 512},
                                {"lapped", lapped, 32, 8},
                                {"uninitialized_barrier", uninitialized_barrier, 1, 8},
                                {"tiles", tiles, 64, kTiles},
                                {"bulk", bulk, 64, kTiles},
                                {"reused_tile", reused_tile, 64, kTiles},
                                {"unread_store", unread_store, 32, kTiles},
                                {"unseen_load", unseen_load, 32, kTiles},
                                {"unaligned_tile", unaligned_tile, 32, kTiles},
                                {"unfenced_store", unfenced_store, 32, kTiles},
                                {"product_shared", product_shared, 128, kTiles},
                                {"product_registers", product_registers, 128, kTiles},
                                {"product_transposed", product_transposed, 128, kTiles},
                                {"written_factor", written_factor<true>, 128, kTiles},
                                {"unfenced_factor", written_factor<false>, 128, kTiles},
                                {"unseen_product", unseen_product, 128, kTiles}};
  auto test =
      std::find_if(std::begin(kTests), std::end(kTests), [&](const Test& t) { return t.name == name; });
  if (test == std::end(kTests)) throw std::invalid_argument(name);
  Params p{out, in, {}};
  bool copied = name == "tiles";  // (sequences, rows, heads, columns)
  if (in)
    p.map = copied ? make_tensor_map({in, 12 * 3 * 128, 3 * 128, 128}, DType::f16, 128, 12, 3, 2, kTileRows)
                   : make_tensor_map({in, 0, 64, 0}, DType::f16, 64, 192, 1, 1, kTileRows);
  Launch how{test->name, dim3(1), dim3(static_cast<unsigned>(test->threads)), test->shared_bytes};
  launch(test->kernel, how, {0, nullptr}, p);
}

}  // namespace fastgpt
