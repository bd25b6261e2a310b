// copy_blocks: copies whole pages of both caches, pair after pair: copy-on-write of shared pages
// Shapes   caches (num_blocks, n_kv_heads, block_size, head_dim); block_pairs (num_pairs, 2)
// Traffic  2 * num_pairs * (key_block_bytes + value_block_bytes) bytes, once each
// Limit    memory
// Tiling   one task a cache: a pair may read what an earlier one wrote, so pairs keep their order
// Numerics exact
#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void copy_blocks(const CopyBlocksParams& p) {
  for_each_task(2, [&](int64_t task) {
    char* cache = static_cast<char*>(task == 0 ? p.key_cache : p.value_cache);
    const int64_t block_bytes = task == 0 ? p.key_block_bytes : p.value_block_bytes;
    for (int64_t i = 0; i < p.num_pairs; ++i) {
      const int64_t source = p.block_pairs[2 * i], destination = p.block_pairs[2 * i + 1];
      if (source == destination) continue;
      std::memcpy(cache + destination * block_bytes, cache + source * block_bytes, block_bytes);
    }
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
