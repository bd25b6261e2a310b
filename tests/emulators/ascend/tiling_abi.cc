// The plans as C symbols, for the tests: each copies its tiling out and returns what it takes of
// the unified buffer, or -1 where the plan refuses.
#include <cstring>
#include <exception>

#include "plan.h"

#define CLRT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace codellama_rt::ascend;

template <typename Plan, typename Bytes>
int64_t planned(void* out, const Plan& plan, const Bytes& bytes) {
  try {
    const auto tiling = plan();
    std::memcpy(out, &tiling, sizeof(tiling));
    return bytes(tiling);
  } catch (const std::exception&) {
    return -1;
  }
}
template <typename Plan>
int64_t planned(void* out, const Plan& plan) {
  return planned(out, plan, [](const auto& tiling) { return ub_bytes(tiling); });
}

}  // namespace

CLRT_EXPORT int64_t clrt_plan_rope_and_cache(void* out, int64_t num_tokens, int64_t n_heads,
                                             int64_t n_kv_heads, int64_t head_dim,
                                             int64_t block_size, int64_t cores) {
  return planned(out, [&] {
    return plan_rope_and_cache(num_tokens, n_heads, n_kv_heads, head_dim, block_size, kFloat16,
                               cores);
  });
}
CLRT_EXPORT int64_t clrt_plan_reshape_and_cache(void* out, int64_t num_tokens, int64_t n_kv_heads,
                                                int64_t head_dim, int64_t block_size,
                                                int64_t cores) {
  return planned(out, [&] {
    return plan_reshape_and_cache(num_tokens, n_kv_heads, head_dim, block_size, cores);
  });
}
CLRT_EXPORT int64_t clrt_plan_rms_norm(void* out, int64_t num_tokens, int64_t dim,
                                       int64_t has_residual, int64_t cores) {
  return planned(
      out, [&] { return plan_rms_norm(num_tokens, dim, has_residual, 1e-5f, kFloat16, cores); },
      [&](const RmsNormTiling& t) { return ub_bytes(t, has_residual); });
}
CLRT_EXPORT int64_t clrt_plan_silu_and_mul(void* out, int64_t num_tokens, int64_t hidden_dim,
                                           int64_t cores) {
  return planned(out, [&] { return plan_silu_and_mul(num_tokens, hidden_dim, kFloat16, cores); });
}
CLRT_EXPORT int64_t clrt_plan_paged_attention(void* out, int64_t num_seqs, int64_t max_blocks,
                                              int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                                              int64_t block_size, const int64_t* seq_lens,
                                              const int64_t* cu_seqlens_q, int64_t cores) {
  return planned(out, [&] {
    const AttentionSizes sizes{cu_seqlens_q[num_seqs],
                               num_seqs,
                               max_blocks,
                               n_heads,
                               n_kv_heads,
                               head_dim,
                               block_size,
                               kFloat16,
                               1.0f};
    return plan_paged_attention(sizes, seq_lens, cu_seqlens_q, cores);
  });
}
