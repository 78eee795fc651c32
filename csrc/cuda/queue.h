// Where kernels run.
#pragma once

#include <string>

namespace fastgpt {

struct Queue {
  int device;    // its index
  void* stream;  // a cudaStream_t of the device
};

// Why CUDA kernels cannot run on this machine, "" if they can; starts nothing.
std::string unavailable();

}  // namespace fastgpt
