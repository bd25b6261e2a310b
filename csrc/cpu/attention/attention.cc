// paged_attention over the blocks of a cache, wherever their rows lie (CacheStrides), and
// flash_attention over contiguous keys and values (num_keys, n_kv_heads, head_dim). The kernel
// of both, with its traffic, tiling and numerics, is in attention.h.
#include "cpu/attention/attention.h"

#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void paged_attention(const PagedAttentionParams& p) {
  Attention a{};
  a.query = p.query;
  a.key = p.key_cache;
  a.value = p.value_cache;
  a.out = p.out;
  a.lse = p.lse;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.block_tables = p.block_tables;
  a.seq_lens = p.seq_lens;
  a.dtype = p.dtype;
  a.out_dtype = p.out_dtype;
  a.cache_dtype = p.cache_dtype;
  a.num_seqs = p.num_seqs;
  a.max_blocks = p.max_blocks;
  a.n_heads = p.n_heads;
  a.n_kv_heads = p.n_kv_heads;
  a.head_dim = p.head_dim;
  a.block_size = p.block_size;
  a.scale = p.scale;
  a.causal = true;
  a.query_stride = p.query_stride;
  a.key_strides = p.key_cache_strides;
  a.value_strides = p.value_cache_strides;
  attend<true>(a);
}

void flash_attention(const FlashAttentionParams& p) {
  Attention a{};
  a.query = p.query;
  a.key = p.key;
  a.value = p.value;
  a.out = p.out;
  a.lse = p.lse;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.dtype = a.out_dtype = p.dtype;
  a.cache_dtype = p.kv_dtype;
  a.num_seqs = p.num_seqs;
  a.n_heads = p.n_heads;
  a.n_kv_heads = p.n_kv_heads;
  a.head_dim = p.head_dim;
  a.scale = p.scale;
  a.causal = p.causal;
  a.query_stride = p.query_stride;
  const int64_t item = item_size(p.kv_dtype), token = p.key_stride * item;
  a.key_strides = a.value_strides = {0, p.head_dim * item, kCacheGroup * token, token};
  attend<false>(a);
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
