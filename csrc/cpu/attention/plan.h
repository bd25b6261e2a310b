// How attention's work is cut into tasks, and what a task sees of its arguments. None of this
// reaches the numbers: tasks are made of whole splits, and splits are folded in order.
#pragma once

#include <type_traits>

#include "cpu/attention/softmax.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kSplit = 1024;  // keys a partial result covers
constexpr int64_t kRows = 96;     // query rows that share a tile: their state stays in L2
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kStateBytes = 256 << 10;  // of all heads of a task, so that L2 keeps them

// PagedAttentionParams and FlashAttentionParams in one: paged where block_tables is not null.
struct Attention {
  const void *query, *key, *value;
  void* out;
  float* lse;
  const int32_t* cu_seqlens_q;
  const int32_t *block_tables, *seq_lens;  // paged
  const int32_t* cu_seqlens_k;             // contiguous
  DType dtype, cache_dtype;
  int64_t num_seqs, max_blocks, n_heads, n_kv_heads, head_dim, block_size;
  float scale;
  bool causal;
  int64_t query_stride;                     // from token to token, in elements
  CacheStrides key_strides, value_strides;  // of contiguous keys: block 0

  int64_t group_size() const { return n_heads / n_kv_heads; }
  int64_t padded_dim() const { return CLRT_ISA::padded_dim(cache_dtype, head_dim); }
  // Of a row's state: an int4 cache has zero points besides.
  int64_t state_width() const { return padded_dim() + (cache_dtype == DType::kInt4 ? kGroup : 0); }
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

// Consecutive queries of one sequence, some key/value heads with all their query heads, and the
// splits [first_split, end_split). Tile by tile the heads take turns: their pages lie side by side,
// and one long stretch is read faster than pages here and there (66 against 47 GB/s, Zen 5).
struct Task {
  int64_t seq, first_query, num_queries, first_head, end_head, first_split, end_split;
  float* partials;  // (splits, n_kv_heads, rows) states of these queries; null: fold at once
};

// A task's rows of one key/value head. Row r is query r / group_size, head r % group_size.
struct Block {
  const Attention& a;
  const Task& task;
  int64_t kv_head;
  int64_t group_size = a.group_size(), num_rows = task.num_queries * group_size;

  int64_t visible_keys(int64_t row) const {
    const int64_t num_keys = a.num_keys(task.seq);
    if (!a.causal) return num_keys;
    const int64_t query = task.first_query + row / group_size;
    const int64_t visible = num_keys - a.num_queries(task.seq) + query + 1;
    return visible < 0 ? 0 : visible;
  }
  int64_t most_keys() const { return visible_keys(num_rows - 1); }
  // Row number over (num_tokens, n_heads).
  int64_t output_row(int64_t row) const {
    const int64_t token = a.cu_seqlens_q[task.seq] + task.first_query + row / group_size;
    return token * a.n_heads + kv_head * group_size + row % group_size;
  }
  int64_t query_offset(int64_t row) const {  // in elements
    const int64_t token = a.cu_seqlens_q[task.seq] + task.first_query + row / group_size;
    return token * a.query_stride + (kv_head * group_size + row % group_size) * a.head_dim;
  }
  RowState state(float* states, int64_t row) const {
    return {states + row * a.state_floats(), a.state_width()};
  }
  float* partial(int64_t split) const {
    return task.partials + (split * a.n_kv_heads + kv_head) * num_rows * a.state_floats();
  }
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

// The work, cut into tasks of about `target` (head, split) pairs. Queries whose splits are dealt to
// several tasks keep the states of all of them until they can be folded in order: a join a head.
class Plan {
 public:
  explicit Plan(const Attention& a) : a_(a) {
    int64_t pairs = 0;
    for_each_block([&](const Task& block) { pairs += block.end_split * a.n_kv_heads; });
    target_ = ceil_div(pairs, num_threads() * kTasksPerThread);
    cut(nullptr, nullptr, nullptr);
    const int64_t floats = num_floats_;
    const int64_t list_bytes = ceil_div((num_tasks + num_joins) * sizeof(Task), 64) * 64;
    char* memory =
        static_cast<char*>(scratch(Scratch::kCaller, list_bytes + floats * sizeof(float)));
    tasks = reinterpret_cast<Task*>(memory);
    joins = tasks + num_tasks;
    cut(tasks, joins, reinterpret_cast<float*>(memory + list_bytes));
  }

  int64_t num_tasks, num_joins;
  Task *tasks, *joins;

 private:
  // Up to kRows rows a head, all heads and splits. Late queries come first: they take longest.
  template <typename Body>
  void for_each_block(const Body& body) const {
    const int64_t group = a_.group_size(), step = group < kRows ? kRows / group : 1;
    for (int64_t seq = 0; seq < a_.num_seqs; ++seq) {
      const int64_t num_queries = a_.num_queries(seq);
      for (int64_t i = ceil_div(num_queries, step) - 1; i >= 0; --i) {
        Task block{seq, i * step, smaller(step, num_queries - i * step), 0, a_.n_kv_heads, 0,
                   0,   nullptr};
        block.end_split = ceil_div(Block{a_, block, 0}.most_keys(), kSplit);
        body(block);
      }
    }
  }

  // Counts, and writes what it counts where that is not null.
  void cut(Task* task, Task* join, float* partials) {
    num_tasks = num_joins = num_floats_ = 0;
    for_each_block([&](const Task& block) {
      const int64_t states = block.num_queries * a_.group_size() * a_.state_floats();
      const int64_t fitting = smaller(target_, kStateBytes / int64_t(2 * states * sizeof(float)));
      const int64_t heads = smaller(a_.n_kv_heads, fitting < 1 ? 1 : fitting);
      const bool whole = block.end_split * heads <= target_ || block.end_split <= 1;
      const int64_t run = whole ? block.end_split + 1 : target_ / heads < 1 ? 1 : target_ / heads;
      for (int64_t head = 0; head < a_.n_kv_heads; head += heads) {
        for (int64_t split = 0; split == 0 || split < block.end_split; split += run) {
          if (task) {
            Task& part = task[num_tasks] = block;
            part.first_head = head;
            part.end_head = smaller(head + heads, a_.n_kv_heads);
            part.first_split = split;
            part.end_split = smaller(split + run, block.end_split);
            part.partials = whole ? nullptr : partials + num_floats_;
          }
          ++num_tasks;
        }
      }
      if (whole) return;
      for (int64_t head = 0; head < a_.n_kv_heads; ++head, ++num_joins) {
        if (!join) continue;
        join[num_joins] = block;
        join[num_joins].first_head = head;
        join[num_joins].partials = partials + num_floats_;
      }
      num_floats_ += block.end_split * a_.n_kv_heads * states;
    });
  }

  const Attention& a_;
  int64_t target_, num_floats_;
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
