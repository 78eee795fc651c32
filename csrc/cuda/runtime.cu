#include "launch.h"

#ifndef FASTGPT_EMULATE
#include <cuda.h>
#endif

namespace fastgpt {

#ifdef FASTGPT_EMULATE
OnDevice::OnDevice(const Queue&) {}
OnDevice::~OnDevice() {}

std::string unavailable(int) { return ""; }
#else
std::string words(cudaError_t error) {
  cudaGetLastError();
  std::string said = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorMisalignedAddress:
      return said + " (perhaps of an earlier kernel; CUDA_LAUNCH_BLOCKING=1 tells)";
    default:
      return said;
  }
}

// Also where the device is the current one already: a thread that has not used it yet has no context.
OnDevice::OnDevice(const Queue& queue) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(queue.device);
  if (error != cudaSuccess)
    throw std::runtime_error("cudaSetDevice(" + std::to_string(queue.device) + "): " + words(error));
  if (current != queue.device) before = current;
}

// cudaSetDevice makes a context, hundreds of megabytes, on a device that the process has not used: there is
// nothing to go back to. (torch does the same: c10::cuda::MaybeSetDevice.)
OnDevice::~OnDevice() {
  if (before < 0) return;
  static const auto state =
      driver_function<decltype(cuDevicePrimaryCtxGetState)>("cuDevicePrimaryCtxGetState");
  unsigned flags;
  int active = 0;
  if (state && state(before, &flags, &active) == CUDA_SUCCESS && active) cudaSetDevice(before);
}

static std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string unavailable(int major) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no NVIDIA driver was found (libcuda.so.1)";
  }
  std::string versions = "the NVIDIA driver serves CUDA " + version(driver) +
                         ", and the kernels were built with CUDA " + version(CUDART_VERSION);
  if (driver / 1000 < CUDART_VERSION / 1000)
    return versions + ", which needs a driver for " + version(CUDART_VERSION / 1000 * 1000) + " or later";
  // cuda.cmake: for these there is PTX alone, which no older driver compiles.
  if (major > 9 && driver < CUDART_VERSION)
    return versions + ", which GPUs newer than sm_90 need a driver for";
  return "";
}
#endif

}  // namespace fastgpt
