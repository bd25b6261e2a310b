// copy_blocks: pages of both caches, pair after pair (copy-on-write)     (arXiv:2309.06180)
// Shapes   caches (num_blocks, block_bytes), of keys and of values each its own; block_pairs
//          (num_pairs, 2): source, destination
// Traffic  2 * num_pairs * (key_block_bytes + value_block_bytes) bytes
// Limit    memory
// Tiling   a thread takes the same 16 bytes of every pair in turn, so that a chain of pairs is done
//          in order; grid.y 0 is keys, 1 is values
// Numerics exact
#include "cuda/runtime/common.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void copy_blocks_kernel(const __grid_constant__ CopyBlocksParams p) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 16;
  const bool key = blockIdx.y == 0;
  const int64_t block_bytes = key ? p.key_block_bytes : p.value_block_bytes;
  if (at >= block_bytes) return;
  auto* cache = static_cast<unsigned char*>(key ? p.key_cache : p.value_cache) + at;
  for (int64_t i = 0; i < p.num_pairs; ++i) {
    const int64_t from = p.block_pairs[2 * i], to = p.block_pairs[2 * i + 1];
    *reinterpret_cast<uint4*>(cache + to * block_bytes) =
        *reinterpret_cast<const uint4*>(cache + from * block_bytes);
  }
}

}  // namespace

void copy_blocks(const CopyBlocksParams& p) {
  if (p.num_pairs == 0) return;
  if (!is_aligned(p.key_cache, 16) || !is_aligned(p.value_cache, 16)) {
    refuse("copy_blocks", "caches must be aligned to 16 bytes");
  }
  const int64_t bytes =
      p.key_block_bytes > p.value_block_bytes ? p.key_block_bytes : p.value_block_bytes;
  launch("copy_blocks", copy_blocks_kernel, dim3(ceil_div(bytes, kThreads * 16), 2), kThreads, 0,
         p);  // a page is 16 rows or more: its bytes are a multiple of 16
}

}  // namespace cuda
}  // namespace codellama_rt
