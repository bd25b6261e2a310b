// flash_attention: attention over contiguous keys and values (num_keys, n_kv_heads,
// head_dim). The kernel, with its traffic, tiling and numerics, is in attention.h.
#include "cpu/attention/attention.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void flash_attention(const FlashAttentionParams& p) {
  Attention a{};
  a.query = p.query;
  a.key = p.key;
  a.value = p.value;
  a.out = p.out;
  a.lse = p.lse;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.dtype = p.dtype;
  a.cache_dtype = p.kv_dtype;
  a.num_seqs = p.num_seqs;
  a.n_heads = p.n_heads;
  a.n_kv_heads = p.n_kv_heads;
  a.head_dim = p.head_dim;
  a.scale = p.scale;
  a.causal = p.causal;
  attend<false>(a);
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
