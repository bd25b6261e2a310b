// paged_attention: out[t, h] = softmax(scale * q[t, h] . K) V over the pages of a sequence
//                  (arXiv:2309.06180; split keys: Flash-Decoding; arXiv:2307.08691)
// Shapes   query, out (num_tokens, n_heads, head_dim); caches and tables as in ops.h
// Traffic  2 * sum(seq_lens) * n_kv_heads * head_dim * itemsize bytes read, once for every 16 rows
//          (queries x heads of a group) of a sequence with up to 16 queries, for every 64 or 128
//          rows of a longer chunk; partial results: 0.4 % more for one row, 3 % for eight
// Limit    memory read up to 16 rows (16 FLOP/byte of the 200 that matrix instructions have);
//          arithmetic in prefill
// Tiling   plan.cuh; up to 16 queries: attend_split; more: attention_wgmma.cu on Hopper over a
//          16-bit cache, attend_unsplit elsewhere; other head_dims and types: attention_any.cu
// Numerics scores and sums in fp32; the query and the weights are rounded to the cache's
//          16-bit type (an int8 or fp8 cache: to bf16; its scales multiply scores and weights,
//          never elements);
//          unused slots of a page may hold anything; a query without keys gives 0, lse = -inf
#include "cuda/attention/attention.h"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {

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
  a.max_blocks = p.max_blocks;
  a.num_keys = p.num_blocks * p.n_kv_heads * p.block_size;
  a.num_seqs = int(p.num_seqs);
  a.num_tokens = int(p.num_tokens);
  a.n_heads = int(p.n_heads);
  a.n_kv_heads = int(p.n_kv_heads);
  a.block_size = int(p.block_size);
  a.scale_log2 = p.scale;
  a.causal = true;
  attend("paged_attention", a, {p.dtype, p.cache_dtype, p.head_dim});
}

}  // namespace cuda
}  // namespace codellama_rt
