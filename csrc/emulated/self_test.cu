// Kernels by which tests/test_emulator.py holds the emulator to what it promises.
#include "self_test.h"

#include <algorithm>
#include <stdexcept>

#include "async_copy.h"
#include "launch.h"

namespace fastgpt {
namespace {

struct Params {
  float* out;
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

}  // namespace

void self_test(const std::string& name, float* out) {
  struct Test {
    const char* name;
    void (*kernel)(Params);
    int threads, shared_bytes;
  };
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
                                {"too_much_shared", shuffles, 32, 228 * 1024}};
  auto test =
      std::find_if(std::begin(kTests), std::end(kTests), [&](const Test& t) { return t.name == name; });
  if (test == std::end(kTests)) throw std::invalid_argument(name);
  Launch how{test->name, dim3(1), dim3(static_cast<unsigned>(test->threads)), test->shared_bytes};
  launch(test->kernel, how, {0, nullptr}, Params{out});
}

}  // namespace fastgpt
