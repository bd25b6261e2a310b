#include "cuda/runtime/tensor_map.h"

namespace codellama_rt {
namespace cuda {
#ifdef CLRT_EMULATE

ptx::TensorMap make_tensor_map(const void* memory, DType, int64_t rows, int64_t columns,
                               int box_rows) {
  return {
      static_cast<const unsigned char*>(memory), columns, rows, columns * 2, kBoxColumns, box_rows};
}

#else
namespace {

// By the runtime, so that libcuda is not needed to load this library.
decltype(&cuTensorMapEncodeTiled) encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    throw std::runtime_error("cuda: the driver has no cuTensorMapEncodeTiled; it must be 12.0+");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

ptx::TensorMap make_tensor_map(const void* memory, DType dtype, int64_t rows, int64_t columns,
                               int box_rows) {
  static const auto encode = encoder();
  ptx::TensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[] = {kBoxColumns, cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult result = encode(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(memory), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return map;
  throw std::runtime_error("cuda: cuTensorMapEncodeTiled gave error " + std::to_string(result) +
                           " for a matrix of " + std::to_string(rows) + " x " +
                           std::to_string(columns));
}

#endif
}  // namespace cuda
}  // namespace codellama_rt
