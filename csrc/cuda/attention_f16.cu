// Attention over caches of f16: what attention_launch.cuh is compiled for here.
#include "attention_launch.cuh"

namespace codellama_rt {
namespace cuda {

bool attend_f16(const Attention& a, const AttentionShape& shape) {
  return shape.cache_dtype == DType::kFloat16 && attend_float<f16>(a, shape);
}

}  // namespace cuda
}  // namespace codellama_rt
