// How kernels are launched: on the queue that the caller names, whose device is the current one (OnDevice),
// without waiting for anything, so that launches can be captured in a CUDA graph. Errors are exceptions with
// kernel, shape and CUDA's own words.
#pragma once

#include <climits>
#include <stdexcept>
#include <string>

#include "device.h"
#include "queue.h"

namespace fastgpt {

struct Launch {
  const char* kernel;
  dim3 grid, block;
  int shared_bytes = 0;
};

// So many blocks of a grid, in x; throws where it cannot have them.
inline unsigned grid_size(int64_t blocks) {
  if (blocks < 1 || blocks > INT_MAX)
    throw std::runtime_error("a grid cannot have " + std::to_string(blocks) + " blocks");
  return static_cast<unsigned>(blocks);
}

#ifndef FASTGPT_EMULATE
// CUDA's words for an error, which the next call of CUDA then does not find.
std::string words(cudaError_t error);

// A function of the driver, which nothing is linked with; null where it has none of this name.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<Function*>(found);
}
#endif

// Runs kernel(params). `params.describe()` says of what shape, where it fails.
template <class Params>
void launch(void (*kernel)(Params), const Launch& how, const Queue& queue, const Params& params) {
#ifdef FASTGPT_EMULATE
  (void)queue;
  struct Bound {
    void (*kernel)(Params);
    const Params& params;
  } bound{kernel, params};
  std::string name = std::string(how.kernel) + "(" + params.describe() + ")";
  emulated::run(
      name.c_str(), how.grid, how.block, how.shared_bytes,
      [](const void* b) { static_cast<const Bound*>(b)->kernel(static_cast<const Bound*>(b)->params); },
      &bound);
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (how.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(function, how.grid, how.block, arguments, static_cast<size_t>(how.shared_bytes),
                             static_cast<cudaStream_t>(queue.stream));
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(how.kernel) + "(" + params.describe() + "): " + words(error));
#endif
}

}  // namespace fastgpt
