// flash_attention: softmax attention of several sequences over contiguous keys and values
//                  (arXiv:2307.08691)
// Shapes   query, out (num_tokens, n_heads, head_dim); key, value (num_keys, n_kv_heads, head_dim)
// Traffic  keys and values once for every 64 or 128 rows (queries x heads of a group)
// Limit    arithmetic from about 200 rows a sequence on
// Tiling   as paged_attention's: one page of any length, with heads side by side
// Numerics as paged_attention's
#include "cuda/attention/attention.h"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {

void flash_attention(const FlashAttentionParams& p) {
  Attention a{};
  a.query = p.query;
  a.key = p.key;
  a.value = p.value;
  a.out = p.out;
  a.lse = p.lse;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.num_seqs = int(p.num_seqs);
  a.num_tokens = int(p.num_tokens);
  a.num_keys = p.num_keys;
  a.n_heads = int(p.n_heads);
  a.n_kv_heads = int(p.n_kv_heads);
  a.scale_log2 = p.scale;
  a.causal = p.causal;
  attend("flash_attention", a, {p.dtype, p.kv_dtype, p.head_dim});
}

}  // namespace cuda
}  // namespace codellama_rt
