// Where kernels run.
#pragma once

#include <string>

namespace fastgpt {

struct Queue {
  int device;    // its index
  void* stream;  // a cudaStream_t of the device
};

// The queue's device is the current one while this lives: of launches, and of what they ask of the driver.
class OnDevice {
 public:
  explicit OnDevice(const Queue& queue);  // throws std::runtime_error
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before = -1;  // the device to go back to, -1: none
};

// Why CUDA kernels cannot run on this machine, of whose GPUs the newest is sm_<major>x, "" if they can;
// starts nothing.
std::string unavailable(int major);

}  // namespace fastgpt
