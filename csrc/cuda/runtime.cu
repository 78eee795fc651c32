#include "launch.h"

namespace fastgpt {

#ifdef FASTGPT_EMULATE
std::string unavailable() { return ""; }
#else
static std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string unavailable() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no NVIDIA driver was found (libcuda.so.1)";
  }
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "the NVIDIA driver serves CUDA " + version(driver) + ", and the kernels were built with CUDA " +
           version(CUDART_VERSION) + ", which needs a driver for " + version(CUDART_VERSION / 1000 * 1000) +
           " or later";
  return "";
}
#endif

}  // namespace fastgpt
