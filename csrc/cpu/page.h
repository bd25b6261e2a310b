// Where a token's row lies in the head-major pages of a cache.
#pragma once

#include "vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The row of (slot, head) in a cache (num_blocks, n_kv_heads, block_size, head_dim).
inline int64_t page_row(int64_t slot, int64_t head, int64_t n_kv_heads, int64_t block_size) {
  return (slot / block_size * n_kv_heads + head) * block_size + slot % block_size;
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
