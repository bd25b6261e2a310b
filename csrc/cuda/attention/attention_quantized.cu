// Attention over caches of int8 and fp8 rows, computed in bf16: what launch.cuh is
// compiled for here.
#include "cuda/attention/launch.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

template <typename T>
void launch_over(const Attention& a, DType cache_dtype) {
  if (cache_dtype == DType::kInt8) {
    launch_attention<T, QuantizedTile<int8_row, 128>, 128>(a, false);
  } else {
    launch_attention<T, QuantizedTile<fp8_row, 128>, 128>(a, false);
  }
}

}  // namespace

bool attend_quantized(const Attention& a, const AttentionShape& shape) {
  if (shape.head_dim != 128 || shape.dtype == DType::kFloat32) return false;
  if (shape.dtype == DType::kBFloat16) {
    launch_over<bf16>(a, shape.cache_dtype);
  } else {
    launch_over<f16>(a, shape.cache_dtype);
  }
  return true;
}

}  // namespace cuda
}  // namespace codellama_rt
