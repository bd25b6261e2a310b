// The choice among attention's kernels, for paged_attention and flash_attention.
#include <climits>

#include "cuda/attention/attention.h"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504088896f;

// Lends the workspace to the split kernel, and finds out whether its room may not be enough; then
// the unsplit kernel looks as well.
void lend_workspace(Attention& a, int64_t most_keys) {
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

}  // namespace

void attend(const char* op, Attention a, const AttentionShape& shape) {
  if (a.num_tokens == 0) return;
  a.scale_log2 *= kLog2E;
  a.few_queries = a.num_tokens <= a.num_seqs ? INT_MAX : kFewQueries;
  lend_workspace(a, a.block_tables ? a.max_blocks * a.block_size : 0);
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
  shape.dtype == DType::kBFloat16 ? attend_bf16(a, shape) : attend_f16(a, shape);
}

}  // namespace cuda
}  // namespace codellama_rt
