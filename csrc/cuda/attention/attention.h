// What paged_attention and flash_attention share on the host.
#pragma once

#include "cuda/attention/plan.cuh"

namespace codellama_rt {
namespace cuda {

// Launches for one pair of storage types; false: they have no kernels by matrix instructions.
struct AttentionShape {
  DType dtype, cache_dtype;
  int64_t head_dim;
};
bool attend_bf16(const Attention& a, const AttentionShape& shape);
bool attend_f16(const Attention& a, const AttentionShape& shape);
bool attend_quantized(const Attention& a, const AttentionShape& shape);
// Prefill by wgmma, Hopper's; false: not for this shape or device.
bool attend_wgmma(const Attention& a, const AttentionShape& shape);
// Any head_dim and float types, a warp a row: slow.
void attend_any(const Attention& a, const AttentionShape& shape);

void attend(const char* op, Attention a, const AttentionShape& shape);

}  // namespace cuda
}  // namespace codellama_rt
