// How kernels are launched: on the queue that the caller names, without waiting for anything, so that
// launches can be captured in a CUDA graph. Errors are exceptions with kernel, shape and CUDA's own words.
#pragma once

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

#ifndef FASTGPT_EMULATE
// The device is the current one while this lives.
struct OnDevice {
  int before = -1, now;
  cudaError_t error;
  explicit OnDevice(int device) : now(device), error(cudaGetDevice(&before)) {
    if (error == cudaSuccess && before != now) error = cudaSetDevice(now);
  }
  ~OnDevice() {
    if (before >= 0 && before != now) cudaSetDevice(before);
  }
};
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
  OnDevice on(queue.device);
  cudaError_t error = on.error;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (error == cudaSuccess && how.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(function, how.grid, how.block, arguments, static_cast<size_t>(how.shared_bytes),
                             static_cast<cudaStream_t>(queue.stream));
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what has been reported is not found by the next call of CUDA
  throw std::runtime_error(std::string(how.kernel) + "(" + params.describe() +
                           "): " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
#endif
}

}  // namespace fastgpt
