// rope_and_cache: one pass over a token's qkv: rotated query out, rotated key and value into their
//                 page    (RoFormer, arXiv:2104.09864; PagedAttention, arXiv:2309.06180)
// Shapes   qkv (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim); the rest as in ops.h
// Traffic  num_tokens * head_dim * (2 * (n_heads + n_kv_heads) * itemsize + 2 * n_kv_heads * cache
//          itemsize) bytes, once each: 201 MB at 4,096 tokens of 32/32 heads of 128 in bf16
// Limit    memory from about 100 tokens on, the launch below
// Tiling   a warp takes kHeads heads of a token, 8 warps a block, which share nothing; its slot and
//          its angles are read once for all of them, and no index is divided by a head count: at
//          393,216 heads, 110 instructions each are all that the memory's time has room for
// Numerics fp32 rotation, rounded once, to the query's or the cache's dtype; an int8 or fp8 row is
//          quantised by its own largest magnitude, in the warp that holds it
#include "cuda/attention/cache_layout.cuh"
#include "cuda/ops/rotary.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kManyHeads = 4;     // heads a warp, whose loads are in flight together
constexpr int kManyTokens = 128;  // from here on: fewer warps still fill the device

template <typename T, typename Cache, int kEach, int kHeads>
__global__ void rope_and_cache_kernel(const __grid_constant__ RopeAndCacheParams p) {
  const int64_t token = blockIdx.x;
  const int n_heads = int(p.n_heads), n_kv_heads = int(p.n_kv_heads), dim = int(p.head_dim);
  const int rotated = n_heads + n_kv_heads, all = rotated + n_kv_heads;
  const int first_head = (blockIdx.y * kWarps + threadIdx.x / kWarp) * kHeads;
  const int first = threadIdx.x % kWarp * kEach;
  const bool inside = first < dim;
  const T* x = static_cast<const T*>(p.qkv) + token * all * dim;
  float in[kHeads][kEach] = {}, other[kHeads][kEach] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first_head + i;
    if (!inside || head >= all) continue;
    load_piece(x + head * dim + first, in[i]);
    if (!p.interleaved && head < rotated) {
      load_piece(x + head * dim + other_half(first, dim / 2), other[i]);
    }
  }
  const int slot = p.slot_mapping[token], block_size = int(p.block_size);
  const int page = slot < 0 ? 0 : slot / block_size, row_in_page = slot - page * block_size;
  const Angles<kEach> angles(p.cos, p.sin, p.positions[token] * int64_t(dim / 2),
                             inside ? first : 0, dim / 2, p.interleaved);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first_head + i;
    if (head >= all) return;
    if (head < rotated && inside) angles.rotate(in[i], other[i]);
    if (head < n_heads) {
      T* query = static_cast<T*>(p.query) + (token * n_heads + head) * dim;
      if (inside) store_piece(query + first, in[i]);
      continue;
    }
    if (slot < 0) return;
    const bool is_value = head >= rotated;
    const int kv_head = head - (is_value ? rotated : n_heads);
    store_row<Cache>(is_value ? p.value_cache : p.key_cache,
                     (int64_t(page) * n_kv_heads + kv_head) * block_size + row_in_page, dim, in[i]);
  }
}

template <typename T, typename Cache, int kEach>
void launch_for(const RopeAndCacheParams& p) {
  const bool many = p.num_tokens >= kManyTokens;
  const int64_t heads_a_block = kWarps * (many ? kManyHeads : 1);
  const dim3 grid(p.num_tokens, ceil_div(p.n_heads + 2 * p.n_kv_heads, heads_a_block));
  launch("rope_and_cache",
         many ? rope_and_cache_kernel<T, Cache, kEach, kManyHeads>
              : rope_and_cache_kernel<T, Cache, kEach, 1>,
         grid, kThreads, 0, p);
}

}  // namespace

void rope_and_cache(const RopeAndCacheParams& p) {
  require_head_dim("rope_and_cache", p.head_dim);
  with_type(p.dtype, [&](auto type) {
    with_cache_type("rope_and_cache", p.cache_dtype, [&](auto cache_type) {
      using T = decltype(type);
      using Cache = decltype(cache_type);
      p.head_dim <= kWarp* kSmallPiece ? launch_for<T, Cache, kSmallPiece>(p)
                                       : launch_for<T, Cache, kLargePiece>(p);
    });
  });
}

}  // namespace cuda
}  // namespace codellama_rt
