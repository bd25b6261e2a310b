// Attention over caches of int8 and fp8 rows, computed in bf16: what launch.cuh is
// compiled for here.
#include "cuda/attention/launch.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

template <typename T, typename Cache>
void launch_over(const Attention& a) {
  if (decode_warps() == 8) {
    attend_few<T, QuantizedTile<Cache, 8>>(a);
  } else {
    attend_few<T, QuantizedTile<Cache, 4>>(a);
  }
  attend_many<T, QuantizedTile<Cache, 4>>(a);
}

template <typename T>
void launch_for(const Attention& a, DType cache_dtype) {
  cache_dtype == DType::kInt8 ? launch_over<T, int8_row>(a) : launch_over<T, fp8_row>(a);
}

}  // namespace

void attend_quantized(const Attention& a, const AttentionShape& shape) {
  shape.dtype == DType::kBFloat16 ? launch_for<bf16>(a, shape.cache_dtype)
                                  : launch_for<f16>(a, shape.cache_dtype);
}

}  // namespace cuda
}  // namespace codellama_rt
