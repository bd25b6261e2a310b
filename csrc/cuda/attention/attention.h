// What paged_attention and flash_attention share on the host.
#pragma once

#include "cuda/attention/plan.cuh"

namespace codellama_rt {
namespace cuda {

struct AttentionShape {
  DType dtype, cache_dtype;
  int64_t head_dim;
};
// By matrix instructions: head_dim 128, 16-bit queries, the cache of their type or quantised.
void attend_float(Attention a, const AttentionShape& shape);
void attend_quantized(const Attention& a, const AttentionShape& shape);
// Prefill by wgmma; false: not on this device.
bool attend_wgmma(const Attention& a, const AttentionShape& shape);
// Any head_dim and types, a warp a row: slow.
void attend_any(const Attention& a, const AttentionShape& shape);

}  // namespace cuda
}  // namespace codellama_rt
