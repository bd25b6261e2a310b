// rope_and_cache: one pass over a token's qkv: rotated query out, rotated key and value into their
//                 page    (RoFormer, arXiv:2104.09864; PagedAttention, arXiv:2309.06180)
// Shapes   qkv (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim); the rest as in ops.h
// Traffic  num_tokens * head_dim * (2 * (n_heads + n_kv_heads) * itemsize + 2 * n_kv_heads * cache
//          itemsize) bytes, once each: 201 MB at 4,096 tokens of 32/32 heads of 128 in bf16
// Limit    memory from about 100 tokens on, the launch below
// Tiling   a warp a (token, head); 8 warps a block, which share nothing
// Numerics fp32 rotation, rounded once, to the query's or the cache's dtype; an int8 or fp8 row is
//          quantised by its own largest magnitude, in the warp that holds it
#include "cache_layout.cuh"
#include "ops.h"
#include "rotary.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Cache, int kEach>
__global__ void rope_and_cache_kernel(const __grid_constant__ RopeAndCacheParams p) {
  const int64_t num_heads = p.n_heads + 2 * p.n_kv_heads;
  const int64_t row = blockIdx.x * int64_t(kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.num_tokens * num_heads) return;
  const int64_t token = row / num_heads, head = row % num_heads, half = p.head_dim / 2;
  const int first = threadIdx.x % kWarp * kEach;
  const bool inside = first < p.head_dim, is_value = head >= p.n_heads + p.n_kv_heads;
  const T* x = static_cast<const T*>(p.qkv) + row * p.head_dim;
  float out[kEach] = {};
  if (inside && is_value) load_piece(x + first, out);
  if (inside && !is_value) {
    const int64_t at = p.positions[token] * half;
    rotate_piece(x, p.cos + at, p.sin + at, first, int(half), p.interleaved, out);
  }
  if (head < p.n_heads) {
    T* query = static_cast<T*>(p.query) + (token * p.n_heads + head) * p.head_dim;
    if (inside) store_piece(query + first, out);
    return;
  }
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  const int64_t kv_head = (head - p.n_heads) % p.n_kv_heads;
  store_row<Cache>(is_value ? p.value_cache : p.key_cache,
                   page_row(slot, kv_head, p.n_kv_heads, p.block_size), p.head_dim, out);
}

}  // namespace

void rope_and_cache(const RopeAndCacheParams& p) {
  require_head_dim("rope_and_cache", p.head_dim);
  const int64_t rows = p.num_tokens * (p.n_heads + 2 * p.n_kv_heads);
  const dim3 grid(ceil_div(rows, kThreads / kWarp));
  with_type(p.dtype, [&](auto type) {
    with_cache_type("rope_and_cache", p.cache_dtype, [&](auto cache_type) {
      using T = decltype(type);
      using Cache = decltype(cache_type);
      const auto kernel = p.head_dim <= kWarp * kSmallPiece
                              ? rope_and_cache_kernel<T, Cache, kSmallPiece>
                              : rope_and_cache_kernel<T, Cache, kLargePiece>;
      launch("rope_and_cache", kernel, grid, kThreads, 0, p);
    });
  });
}

}  // namespace cuda
}  // namespace codellama_rt
