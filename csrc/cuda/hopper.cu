#include "hopper.h"

#include <stdexcept>
#include <string>

namespace fastgpt {

#ifdef FASTGPT_EMULATE
TensorMap make_tensor_map(const Tensor& tensor, DType, int64_t columns, int64_t rows, int64_t heads,
                          int64_t sequences, int tile_rows) {
  return {static_cast<unsigned char*>(tensor.data),
          {columns, rows, heads, sequences},
          {2, 2 * tensor.seq_stride, 2 * tensor.head_stride, 2 * tensor.batch_stride},
          tile_rows};
}
#else
TensorMap make_tensor_map(const Tensor& tensor, DType dtype, int64_t columns, int64_t rows, int64_t heads,
                          int64_t sequences, int tile_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled: CUDA 12 has it");
  cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                         static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(sequences)};
  // The stride of an axis of one element is never used, but checked.
  auto bytes = [&](int64_t stride, int axis) {
    return static_cast<cuuint64_t>(sizes[axis] == 1 ? 16 : 2 * stride);
  };
  cuuint64_t strides[3] = {bytes(tensor.seq_stride, 1), bytes(tensor.head_stride, 2),
                           bytes(tensor.batch_stride, 3)};
  cuuint32_t tile[4] = {kTileColumns, static_cast<cuuint32_t>(tile_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  TensorMap map;
  CUresult error = encode(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      tensor.data, sizes, strides, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS) return map;
  std::string given;
  for (int i = 0; i < 4; i++)
    given += " " + std::to_string(sizes[i]) + (i ? " (" + std::to_string(strides[i - 1]) + " bytes)" : "");
  throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error) + " of sizes" + given);
}
#endif

}  // namespace fastgpt
