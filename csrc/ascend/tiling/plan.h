// How each op is divided over the vector cores and their unified buffers: plain C++, no CANN.
//
// Used by the tiling functions of op_host, by the emulator's library and by the tests. Each throws
// std::invalid_argument for what the kernels do not take; nothing else is checked here.
#pragma once

#include "tiling_data.h"

namespace codellama_rt {
namespace ascend {

constexpr int64_t kSplitTokens = 1024;  // 512 KB of keys and values at head_dim 128: long enough
                                        // that merging (1 KB) is nothing, short enough to share
constexpr int64_t kUnitOverhead = 64;   // what a unit costs beside its keys, in tokens

RopeAndCacheTiling plan_rope_and_cache(int64_t num_tokens, int64_t n_heads, int64_t n_kv_heads,
                                       int64_t head_dim, int64_t block_size, int64_t element_type,
                                       int64_t num_cores);
ReshapeAndCacheTiling plan_reshape_and_cache(int64_t num_tokens, int64_t n_kv_heads,
                                             int64_t head_dim, int64_t block_size,
                                             int64_t num_cores);
RmsNormTiling plan_rms_norm(int64_t num_tokens, int64_t dim, bool has_residual, float eps,
                            int64_t element_type, int64_t num_cores);
SiluAndMulTiling plan_silu_and_mul(int64_t num_tokens, int64_t hidden_dim, int64_t element_type,
                                   int64_t num_cores);

struct AttentionSizes {
  int64_t num_tokens, num_seqs, max_blocks, n_heads, n_kv_heads, head_dim, block_size, element_type;
  float scale;
};
// seq_lens (num_seqs) and cu_seqlens_q (num_seqs + 1) are on the host, as CANN has its own
// attention take them: how long the rows are decides who does them.
PagedAttentionTiling plan_paged_attention(const AttentionSizes& sizes, const int64_t* seq_lens,
                                          const int64_t* cu_seqlens_q, int64_t num_cores);

// Keys that query `i` of a sequence sees.
inline int64_t visible_keys(int64_t seq_len, int64_t num_queries, int64_t i) {
  return seq_len - num_queries + i + 1;
}
// Splits of a row; one without keys is a unit as well, for its zeros have to be written.
inline int64_t num_splits(int64_t keys, int64_t split) {
  return keys > split ? (keys + split - 1) / split : 1;
}

// What the kernels' buffers take of the unified buffer, in bytes.
int64_t ub_bytes(const RopeAndCacheTiling& t);
int64_t ub_bytes(const ReshapeAndCacheTiling& t);
int64_t ub_bytes(const RmsNormTiling& t, bool has_residual);
int64_t ub_bytes(const SiluAndMulTiling& t);
int64_t ub_bytes(const PagedAttentionTiling& t);

inline int64_t workspace_bytes(const PagedAttentionTiling& t) {
  return t.num_slots * t.slot_floats * 4;
}

}  // namespace ascend
}  // namespace codellama_rt
