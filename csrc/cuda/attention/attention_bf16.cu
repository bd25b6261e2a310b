// Attention over caches of bf16: what launch.cuh is compiled for here.
#include "cuda/attention/launch.cuh"

namespace codellama_rt {
namespace cuda {

void attend_bf16(const Attention& a, const AttentionShape& shape) { attend_float<bf16>(a, shape); }

}  // namespace cuda
}  // namespace codellama_rt
