// reshape_and_cache: writes each token's keys and values into its slot of the pages
//                                                           (PagedAttention, arXiv:2309.06180)
// Shapes   key, value (num_tokens, n_kv_heads, head_dim); caches (num_blocks, n_kv_heads,
//          block_size, head_dim); slot_mapping (num_tokens), -1 = skip
// Traffic  2 * num_tokens * n_kv_heads * head_dim * (itemsize + cache itemsize) bytes, once each
// Limit    memory
// Tiling   tokens in groups of 32 KiB; of two tokens with one slot either may win: do not do it
// Numerics one rounding to the cache's dtype, nearest even; int8 and int4 as in quantize_row.h
#include "cpu/attention/page.h"
#include "cpu/runtime/task.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void reshape_and_cache(const ReshapeAndCacheParams& p) {
  const int64_t row = p.n_kv_heads * p.head_dim;
  with_type(p.dtype, [&](auto type) {
    with_cache_type(p.cache_dtype, [&](auto cache_type) {
      using T = decltype(type);
      using Page = PageRow<decltype(cache_type)>;
      for_each_row(p.num_tokens, 2 * row * item_size(p.dtype), [&](int64_t t) {
        const int64_t slot = p.slot_mapping[t];
        if (slot < 0) return;
        float* floats = page_scratch(p.head_dim);
        for (int64_t h = 0; h < p.n_kv_heads; ++h) {
          const int64_t from = h * p.head_dim;
          const Page key(p.key_cache, p.key_cache_strides, true, slot, h, p.block_size, p.head_dim);
          const Page value(p.value_cache, p.value_cache_strides, false, slot, h, p.block_size,
                           p.head_dim);
          key.write(static_cast<const T*>(p.key) + t * p.key_stride + from, floats);
          value.write(static_cast<const T*>(p.value) + t * p.value_stride + from, floats);
        }
      });
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
