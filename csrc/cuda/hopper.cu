#include "hopper.h"

#include <stdexcept>
#include <string>

#include "launch.h"

namespace fastgpt {
namespace {

constexpr int kSuccess = 0;

// Returns the driver's error.
#ifdef FASTGPT_EMULATE
int encode(TensorMap& map, DType, void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
           const uint32_t (&tile)[4]) {
  constexpr int kInvalid = 1;
  if (reinterpret_cast<uintptr_t>(data) % 16 || tile[0] * 2 > 128) return kInvalid;
  map = {static_cast<unsigned char*>(data), {}, {2}, static_cast<int>(tile[1])};
  for (int axis = 0; axis < 4; axis++) {
    if (sizes[axis] < 1 || sizes[axis] > uint64_t{1} << 32 || tile[axis] < 1 || tile[axis] > 256)
      return kInvalid;
    map.sizes[axis] = static_cast<int64_t>(sizes[axis]);
    if (axis == 0) continue;
    if (strides[axis - 1] % 16 || strides[axis - 1] >= uint64_t{1} << 40) return kInvalid;
    map.strides[axis] = static_cast<int64_t>(strides[axis - 1]);
  }
  return kSuccess;
}
#else
int encode(TensorMap& map, DType dtype, void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
           const uint32_t (&tile)[4]) {
  static const auto driver = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!driver) throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled: CUDA 12 has it");
  const uint32_t steps[4] = {1, 1, 1, 1};
  return driver(&map,
                dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                data, sizes, strides, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
#endif

}  // namespace

TensorMap make_tensor_map(const Tensor& tensor, DType dtype, int64_t columns, int64_t rows, int64_t heads,
                          int64_t sequences, int tile_rows) {
  const uint64_t sizes[4] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows),
                             static_cast<uint64_t>(heads), static_cast<uint64_t>(sequences)};
  // The stride of an axis of one element is never used, but checked.
  auto bytes = [&](int64_t stride, int axis) {
    return static_cast<uint64_t>(sizes[axis] == 1 ? 16 : 2 * stride);
  };
  const uint64_t strides[3] = {bytes(tensor.seq_stride, 1), bytes(tensor.head_stride, 2),
                               bytes(tensor.batch_stride, 3)};
  const uint32_t tile[4] = {kTileColumns, static_cast<uint32_t>(tile_rows), 1, 1};
  TensorMap map;
  int error = encode(map, dtype, tensor.data, sizes, strides, tile);
  if (error == kSuccess) return map;
  std::string given;
  for (int i = 0; i < 4; i++)
    given += " " + std::to_string(sizes[i]) + (i ? " (" + std::to_string(strides[i - 1]) + " bytes)" : "");
  throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error) + " of sizes" + given);
}

}  // namespace fastgpt
