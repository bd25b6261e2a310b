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
namespace {

void copy_block(const BlockPieces& pieces, const char* from, char* to) {
  for (int64_t outer = 0; outer < pieces.num_outer; ++outer) {
    for (int64_t inner = 0; inner < pieces.num_inner; ++inner) {
      const int64_t at = outer * pieces.outer_stride + inner * pieces.inner_stride;
      std::memcpy(to + at, from + at, pieces.bytes);
    }
  }
}

}  // namespace

void copy_blocks(const CopyBlocksParams& p) {
  for_each_task(2, [&](int64_t task) {
    char* cache = static_cast<char*>(task == 0 ? p.key_cache : p.value_cache);
    const BlockPieces& pieces = task == 0 ? p.key_pieces : p.value_pieces;
    for (int64_t i = 0; i < p.num_pairs; ++i) {
      const int64_t source = p.block_pairs[2 * i], destination = p.block_pairs[2 * i + 1];
      if (source == destination) continue;
      copy_block(pieces, cache + source * pieces.block_stride,
                 cache + destination * pieces.block_stride);
    }
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
