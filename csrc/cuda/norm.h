// Layer norm and RMS norm on GPUs: what the binding hands to norm.cu.
#pragma once

#include <cstdint>
#include <string>

#include "fastgpt/params.h"
#include "queue.h"

namespace fastgpt {

struct NormShape {
  DType dtype, weight_dtype;
  int64_t rows, hidden;

  std::string describe() const {
    static const char* const kNames[] = {"fp32", "bf16", "fp16"};
    return "rows " + std::to_string(rows) + ", hidden " + std::to_string(hidden) + ", " +
           kNames[static_cast<int>(dtype)];
  }
};

// As NormForwardParams; row strides count elements, null is what a call has not.
struct DeviceNormForward : NormShape {
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const void *weight, *bias;
  void *out, *residual_out;
  float *mean, *rstd;
  DeviceDropout dropout;
  float eps;
};

// As NormBackwardParams. Each block adds up its rows' share of dweight and dbias in a row of its own of
// partial_dweight and partial_dbias, fp32 (partial_rows, hidden): at most so many blocks.
struct DeviceNormBackward : NormShape {
  const void* dout;
  int64_t dout_stride;
  const void* dresidual_out;
  int64_t dresidual_stride;
  const void* z;
  int64_t z_stride;
  const void* weight;
  const float *mean, *rstd;
  void *dx, *dresidual, *dweight, *dbias;
  float *partial_dweight, *partial_dbias;
  int64_t partial_rows;
  DeviceDropout dropout;
  int64_t multiprocessors;
};

void norm_forward(const DeviceNormForward& p, const Queue& queue);
void norm_backward(DeviceNormBackward p, const Queue& queue);

}  // namespace fastgpt
