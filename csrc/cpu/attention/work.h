// What attention works on: its arguments, a task's share of them, and what rows see of the keys.
#pragma once

#include <type_traits>

#include "cpu/attention/softmax.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// PagedAttentionParams and FlashAttentionParams in one: paged where block_tables is not null.
struct Attention {
  const void *query, *key, *value;
  void* out;
  float* lse;
  const int32_t* cu_seqlens_q;
  const int32_t *block_tables, *seq_lens;  // paged
  const int32_t* cu_seqlens_k;             // contiguous
  DType dtype, cache_dtype, out_dtype;
  int64_t num_seqs, max_blocks, n_heads, n_kv_heads, head_dim, block_size;
  float scale;
  bool causal;
  int64_t query_stride;                     // from token to token, in elements
  CacheStrides key_strides, value_strides;  // of contiguous keys: block 0

  int64_t group_size() const { return n_heads / n_kv_heads; }
  int64_t padded_dim() const { return CLRT_ISA::padded_dim(cache_dtype, head_dim); }
  // Of a row's state (softmax.h).
  int64_t state_width() const {
    const bool has_sums = cache_dtype == DType::kInt4 || multiplies_pairs(cache_dtype);
    return padded_dim() + (has_sums ? kGroup : 0);
  }
  int64_t state_floats() const { return row_state_floats(state_width()); }
  int64_t num_queries(int64_t seq) const { return cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]; }
  int64_t num_keys(int64_t seq) const {
    return block_tables ? seq_lens[seq] : cu_seqlens_k[seq + 1] - cu_seqlens_k[seq];
  }
  // Where the group that key number `key` begins lies, in bytes.
  int64_t offset(const CacheStrides& strides, int64_t seq, int64_t kv_head, int64_t key) const {
    const int64_t head = kv_head * strides.head;
    if (!block_tables) return (cu_seqlens_k[seq] + key) * strides.token + head;
    const int64_t block = block_tables[seq * max_blocks + key / block_size];
    return block * strides.block + head + key % block_size / kCacheGroup * strides.group;
  }
};

// A query: its row of the batch, and how many keys it sees.
struct Query {
  int32_t token, visible;
};

// Neighbours in the plan's list of queries, some key/value heads with all their query heads, and
// the splits [first_split, end_split). The queries are of one sequence, or of several whose tables
// name the same blocks there. Tile by tile the heads take turns: their pages lie side by side,
// and one long stretch is read faster than pages here and there (66 against 47 GB/s, Zen 5).
struct Task {
  const Query* queries;
  int64_t num_queries, seq;  // the last query's: its table names the blocks
  int64_t first_head, end_head, first_split, end_split;
  float* states;       // that are left for a join: (splits, n_kv_heads, rows); null: written out
  bool folds;          // into one state for all its splits, which begin at 0
  const Task* shared;  // what attends these queries, among others, over the splits before; or null
};

// A task's rows of one key/value head. Row r is query r / group_size, head r % group_size.
struct Block {
  const Attention& a;
  const Task& task;
  int64_t kv_head;
  int64_t group_size = a.group_size(), num_rows = task.num_queries * group_size;

  // Does not fall from row to row, but where all rows see all of the task's splits.
  int64_t visible_keys(int64_t row) const { return task.queries[row / group_size].visible; }
  int64_t most_keys() const { return visible_keys(num_rows - 1); }
  // Row number over (num_tokens, n_heads).
  int64_t output_row(int64_t row) const {
    return token(row) * a.n_heads + kv_head * group_size + row % group_size;
  }
  int64_t query_offset(int64_t row) const {  // in elements
    return token(row) * a.query_stride + (kv_head * group_size + row % group_size) * a.head_dim;
  }
  RowState state(float* states, int64_t row) const {
    return {states + row * a.state_floats(), a.state_width()};
  }
  // The states that the task leaves of a split, or of all.
  float* left(int64_t split) const {
    const int64_t set = task.folds ? 0 : split - task.first_split;
    return task.states + (set * a.n_kv_heads + kv_head) * num_rows * a.state_floats();
  }

 private:
  int64_t token(int64_t row) const { return task.queries[row / group_size].token; }
};

// Calls body(first row, rows as a constant) for kStep rows at a time, then for what is left.
template <int kStep, typename Body>
inline void for_rows(int64_t row, int64_t end, const Body& body) {
  for (; row + kStep <= end; row += kStep) body(row, std::integral_constant<int, kStep>());
  if constexpr (kStep > 1) for_rows<kStep - 1>(row, end, body);
}

// How many of a tile's keys each row sees; the tile's first key is number `key`.
class VisibleKeys {
 public:
  VisibleKeys(const Block& block, int64_t key)
      : block_(block), key_(key), all_(block.visible_keys(0) - key >= kTile) {}
  int operator()(int64_t row) const {
    if (all_) return kTile;  // every tile but one or two on the diagonal
    const int64_t visible = block_.visible_keys(row) - key_;
    return visible < 0 ? 0 : int(smaller(kTile, visible));
  }

 private:
  const Block& block_;
  int64_t key_;
  bool all_;
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
