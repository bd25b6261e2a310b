// paged_attention: out[t, h] = softmax(scale * q[t, h] . K) V over the pages of a sequence
//                  (arXiv:2309.06180; split keys: Flash-Decoding; arXiv:2307.08691)
// flash_attention: the same over contiguous keys and values: one page of any length, heads side by
//                  side
// Shapes   query, out (num_tokens, n_heads, head_dim); caches and tables as in ops.h; contiguous
//          key, value (num_keys, n_kv_heads, head_dim)
// Traffic  2 * sum(seq_lens) * n_kv_heads * head_dim * itemsize bytes read, once for every 16 rows
//          (queries x heads of a group) of a sequence with up to 16 queries, for every 64 or 128
//          rows of a longer chunk; partial results: 0.4 % more for one row, 3 % for eight
// Limit    memory read up to 16 rows (16 FLOP/byte of the 200 that matrix instructions have);
//          arithmetic in prefill, from about 200 rows a sequence on
// Tiling   plan.cuh; up to 16 queries: attend_split; more: attention_wgmma.cu on Hopper over a
//          16-bit cache, attend_unsplit elsewhere; other head_dims and types: attention_any.cu
// Numerics scores and sums in fp32; the query and the weights are rounded to the cache's 16-bit
//          type (an int8 or fp8 cache: to bf16; its scales multiply scores and weights, never
//          elements); values must be finite, but slots of a page that hold no token may hold
//          anything; a query without keys gives 0, lse = -inf
#include <climits>

#include "cuda/attention/attention.h"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504088896f;

// Gives the workspace to the split kernel, and finds out whether its room may not be enough; then
// the unsplit kernel looks as well.
void use_workspace(Attention& a, int64_t most_keys) {
  const Workspace space = workspace();
  a.partials = nullptr;
  a.few_too = true;
  if (space.bytes <= kTicketBytes) return;
  a.tickets = static_cast<int*>(space.memory);
  a.partials = reinterpret_cast<float*>(static_cast<char*>(space.memory) + kTicketBytes);
  a.max_tickets = kTicketBytes / sizeof(int);
  a.max_partial_rows = (space.bytes - kTicketBytes) / (kPartialFloats * sizeof(float));
  if (most_keys == 0) return;  // not known here
  const int64_t splits = ceil_div(most_keys, kSplit), nodes = ceil_div(splits, kNode);
  const int64_t rows = int64_t(a.num_tokens) * a.n_heads + a.num_seqs * a.n_kv_heads * (kRows - 1);
  const int64_t groups = rows;  // of one row each, at worst
  a.few_too = rows * (splits + nodes) > a.max_partial_rows || groups * (nodes + 1) > a.max_tickets;
}

void attend(const char* op, Attention a, const AttentionShape& shape) {
  if (a.num_tokens == 0) return;
  a.scale_log2 *= kLog2E;
  a.few_queries = a.num_tokens <= a.num_seqs ? INT_MAX : kFewQueries;
  use_workspace(a, a.block_tables ? a.max_blocks * a.block_size : 0);
  a.all_split = a.partials && !a.few_too && a.num_tokens <= a.few_queries;
  if (shape.head_dim > 256) refuse(op, "head_dim must be at most 256");
  const bool quantized = !is_float(shape.cache_dtype);
  bool by_matrices = shape.head_dim == kDim && shape.dtype != DType::kFloat32 &&
                     (quantized || shape.cache_dtype == shape.dtype);
  for (const void* memory : {a.query, a.key, a.value, (const void*)a.out}) {
    by_matrices = by_matrices && is_aligned(memory, 16);
  }
  if (!by_matrices) return attend_any(a, shape);
  if (quantized) return attend_quantized(a, shape);
  attend_float(a, shape);
}

// What both kinds have.
template <typename Params>
Attention common(const Params& p) {
  Attention a{};
  a.query = p.query;
  a.out = p.out;
  a.lse = p.lse;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.num_seqs = int(p.num_seqs);
  a.num_tokens = int(p.num_tokens);
  a.n_heads = int(p.n_heads);
  a.n_kv_heads = int(p.n_kv_heads);
  a.scale_log2 = p.scale;
  return a;
}

}  // namespace

void paged_attention(const PagedAttentionParams& p) {
  Attention a = common(p);
  a.key = p.key_cache;
  a.value = p.value_cache;
  a.block_tables = p.block_tables;
  a.seq_lens = p.seq_lens;
  a.max_blocks = p.max_blocks;
  a.num_keys = p.num_blocks * p.n_kv_heads * p.block_size;
  a.block_size = int(p.block_size);
  a.causal = true;
  attend("paged_attention", a, {p.dtype, p.cache_dtype, p.head_dim});
}

void flash_attention(const FlashAttentionParams& p) {
  Attention a = common(p);
  a.key = p.key;
  a.value = p.value;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.num_keys = p.num_keys;
  a.causal = p.causal;
  attend("flash_attention", a, {p.dtype, p.kv_dtype, p.head_dim});
}

}  // namespace cuda
}  // namespace codellama_rt
