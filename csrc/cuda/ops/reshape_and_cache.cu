// reshape_and_cache: keys and values into their slots of the pages       (arXiv:2309.06180)
// Shapes   key, value (num_tokens, n_kv_heads, head_dim); caches and slots as in ops.h
// Traffic  2 * num_tokens * n_kv_heads * head_dim * (itemsize + cache itemsize) bytes, once each
// Limit    memory; the launch below about 100 tokens
// Tiling   a warp a (token, head), of keys in grid.y 0 and of values in grid.y 1
// Numerics rounded once, to the cache's dtype; int8 and fp8 as in cache_layout.cuh
#include "cuda/attention/cache_layout.cuh"
#include "cuda/ops/rotary.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Cache, int kEach>
__global__ void reshape_and_cache_kernel(const __grid_constant__ ReshapeAndCacheParams p) {
  const int64_t row = blockIdx.x * int64_t(kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.num_tokens * p.n_kv_heads) return;
  const int64_t token = row / p.n_kv_heads, head = row % p.n_kv_heads;
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  const bool is_value = blockIdx.y == 1;
  const T* x = static_cast<const T*>(is_value ? p.value : p.key) + row * p.head_dim;
  const int first = threadIdx.x % kWarp * kEach;
  float piece[kEach] = {};
  if (first < p.head_dim) load_piece(x + first, piece);
  store_row<Cache>(is_value ? p.value_cache : p.key_cache,
                   page_row(slot, head, p.n_kv_heads, p.block_size), p.head_dim, piece);
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& p) {
  require_head_dim("reshape_and_cache", p.head_dim);
  const dim3 grid(ceil_div(p.num_tokens * p.n_kv_heads, kThreads / kWarp), 2);
  with_type(p.dtype, [&](auto type) {
    with_cache_type("reshape_and_cache", p.cache_dtype, [&](auto cache_type) {
      using T = decltype(type);
      using Cache = decltype(cache_type);
      const auto kernel = p.head_dim <= kWarp * kSmallPiece
                              ? reshape_and_cache_kernel<T, Cache, kSmallPiece>
                              : reshape_and_cache_kernel<T, Cache, kLargePiece>;
      launch("reshape_and_cache", kernel, grid, kThreads, 0, p);
    });
  });
}

}  // namespace cuda
}  // namespace codellama_rt
