// rope_and_cache: one pass over a token's qkv: rotated query out, rotated key and value into their
//                 page    (RoFormer, arXiv:2104.09864; PagedAttention, arXiv:2309.06180)
// Shapes   qkv (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim); cos, sin (num_positions,
//          head_dim / 2); positions, slot_mapping (num_tokens); caches (num_blocks, n_kv_heads,
//          block_size, head_dim); query (num_tokens, n_heads, head_dim)
// Traffic  num_tokens * head_dim * ((2 * n_heads + 2 * n_kv_heads) * itemsize
//          + 2 * n_kv_heads * cache itemsize) bytes, once each
// Limit    memory
// Tiling   tokens in groups of 32 KiB
// Numerics fp32 rotation; keys and values are rounded once, to the cache's dtype; int8 and int4 as
//          in quantize_row.h
#include "cpu/attention/page.h"
#include "cpu/ops/rotary.h"
#include "cpu/runtime/task.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

template <typename T, typename Cache>
void rope_and_cache_token(const RopeAndCacheParams& p, int64_t t) {
  const int64_t half = p.head_dim / 2, slot = p.slot_mapping[t];
  const T* query = static_cast<const T*>(p.qkv) + t * p.qkv_stride;
  const T* key = query + p.n_heads * p.head_dim;
  const T* value = key + p.n_kv_heads * p.head_dim;
  const float* cos = p.cos + p.positions[t] * half;
  const float* sin = p.sin + p.positions[t] * half;
  T* out = static_cast<T*>(p.query) + t * p.n_heads * p.head_dim;
  for (int64_t h = 0; h < p.n_heads; ++h) {
    rotate_head(query + h * p.head_dim, cos, sin, out + h * p.head_dim, half, p.interleaved);
  }
  if (slot < 0) return;
  float* floats = page_scratch(p.head_dim);
  for (int64_t h = 0; h < p.n_kv_heads; ++h) {
    using Page = PageRow<Cache>;
    const Page keys(p.key_cache, p.key_cache_strides, true, slot, h, p.block_size, p.head_dim);
    const Page values(p.value_cache, p.value_cache_strides, false, slot, h, p.block_size,
                      p.head_dim);
    if constexpr (Page::kQuantizes) {
      rotate_head(key + h * p.head_dim, cos, sin, floats, half, p.interleaved);
      keys.write(floats, floats);
    } else {
      rotate_head(key + h * p.head_dim, cos, sin, keys.floats(), half, p.interleaved);
    }
    values.write(value + h * p.head_dim, floats);
  }
}

}  // namespace

void rope_and_cache(const RopeAndCacheParams& p) {
  const int64_t row_bytes = (p.n_heads + 2 * p.n_kv_heads) * p.head_dim * item_size(p.dtype);
  with_type(p.dtype, [&](auto type) {
    with_cache_type(p.cache_dtype, [&](auto cache_type) {
      using T = decltype(type);
      using Cache = decltype(cache_type);
      for_each_row(p.num_tokens, row_bytes,
                   [&](int64_t t) { rope_and_cache_token<T, Cache>(p, t); });
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
