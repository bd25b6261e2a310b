// How attention's work is cut into tasks. None of this reaches the numbers: tasks are made of whole
// splits, and splits are folded in order.
#pragma once

#include <cstring>

#include "cpu/attention/work.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kSplit = 1024;  // keys a partial result covers
constexpr int64_t kRows = 96;     // query rows that share a tile: their state stays in L2
// Up to this many rows a head, reading is the limit: of floats, and of bytes multiplied as such
// (Zen 4: 8 rows over 32,768 int8 keys, 7B, took 14.1 ms by all heads in turn, 13.5 by one).
constexpr int64_t kStreamRows = 8, kStreamByteRows = 5;
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kStateBytes = 256 << 10;  // of all heads of a task, so that L2 keeps them

// The work, cut into tasks of about `target` (head, split) pairs. Queries whose splits are dealt to
// several tasks keep the states of all of them until they can be folded in order: a join a head.
//
// Sequences with the same blocks at the head of their tables are attended together over the whole
// splits of them, as long as all their rows see these and fit a task. Sorted by their tables, those
// with most in common are neighbours: [first, end) share the least that any two neighbours do, then
// runs of them share more, and what is left is each one's own. A sequence of more rows, such as a
// long chunk of a prompt, stays apart: it reads its keys once for many rows already.
class Plan {
 public:
  explicit Plan(const Attention& a) : a_(a) {
    list_blocks();
    cut(nullptr, nullptr, nullptr);
    const int64_t list_bytes = ceil_div((num_tasks + num_joins) * sizeof(Task), 64) * 64;
    char* memory =
        static_cast<char*>(scratch(Scratch::kCaller, list_bytes + num_floats_ * sizeof(float)));
    tasks = reinterpret_cast<Task*>(memory);
    joins = tasks + num_tasks;
    cut(tasks, joins, reinterpret_cast<float*>(memory + list_bytes));
  }

  int64_t num_tasks, num_joins;
  Task *tasks, *joins;

 private:
  // All queries, and blocks of them with all heads and splits.
  void list_blocks() {
    const int64_t num_tokens = a_.cu_seqlens_q[a_.num_seqs];
    const int64_t most_blocks = 2 * a_.num_seqs + num_tokens / step_;  // fewer than half are shared
    const int64_t bytes =
        most_blocks * sizeof(Task) + num_tokens * sizeof(Query) + 2 * a_.num_seqs * sizeof(int32_t);
    blocks_ = static_cast<Task*>(scratch(Scratch::kPlan, bytes));
    next_query_ = reinterpret_cast<Query*>(blocks_ + most_blocks);
    order_ = reinterpret_cast<int32_t*>(next_query_ + num_tokens);
    common_ = order_ + a_.num_seqs;
    sort();
    if (a_.num_seqs > 0) add_blocks(0, a_.num_seqs, 0, nullptr);
    int64_t pairs = 0;
    for (int64_t i = 0; i < num_blocks_; ++i) {
      pairs += (blocks_[i].end_split - blocks_[i].first_split) * a_.n_kv_heads;
    }
    target_ = ceil_div(pairs, num_threads() * kTasksPerThread);
  }

  // The splits that a sequence may share: whole ones that all its queries see.
  int64_t whole_splits(int64_t seq) const {
    const int64_t num_queries = a_.num_queries(seq);
    if (!a_.block_tables || num_queries == 0 || num_queries > step_) return 0;
    return (a_.num_keys(seq) - num_queries + 1) / kSplit;
  }
  int64_t num_table_blocks(int64_t splits) const {
    return ceil_div(splits * kSplit, a_.block_size);
  }
  const int32_t* table(int64_t seq) const { return a_.block_tables + seq * a_.max_blocks; }

  // Whether `seq` goes behind `other` in order: by the bytes of their tables' heads, the shorter
  // first.
  bool is_behind(int64_t seq, int64_t other) const {
    const int64_t ours = whole_splits(seq), theirs = whole_splits(other);
    const int64_t both = smaller(ours, theirs);
    if (both == 0) return ours >= theirs;
    const int64_t bytes = num_table_blocks(both) * sizeof(int32_t);
    const int differ = std::memcmp(table(seq), table(other), bytes);
    return differ == 0 ? ours >= theirs : differ > 0;
  }

  int64_t common_splits(int64_t seq, int64_t other) const {
    const int64_t both = smaller(whole_splits(seq), whole_splits(other));
    if (both == 0) return 0;
    const int64_t most = num_table_blocks(both);
    int64_t same = 0;
    while (same < most && table(seq)[same] == table(other)[same]) ++same;
    return same == most ? both : same * a_.block_size / kSplit;
  }

  // order_, and of each sequence the splits in common with the one before.
  void sort() {
    for (int64_t seq = 0; seq < a_.num_seqs; ++seq) {
      int64_t low = 0, high = seq;
      if (seq > 0 && is_behind(seq, order_[seq - 1])) low = seq;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (is_behind(seq, order_[middle])) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      std::memmove(order_ + low + 1, order_ + low, (seq - low) * sizeof(int32_t));
      order_[low] = int32_t(seq);
    }
    for (int64_t i = 1; i < a_.num_seqs; ++i) {
      common_[i] = int32_t(common_splits(order_[i - 1], order_[i]));
    }
  }

  // The sequences order_[first, end), which `shared` attends over the splits before `split`.
  void add_blocks(int64_t first, int64_t end, int64_t split, const Task* shared) {
    if (end - first == 1) return add_own_blocks(order_[first], split, shared);
    int64_t common = common_[first + 1];
    for (int64_t i = first + 2; i < end; ++i) common = smaller(common, common_[i]);
    if (common > split) {
      int64_t fitting = first, num_queries = 0;
      while (fitting < end && num_queries + a_.num_queries(order_[fitting]) <= step_) {
        num_queries += a_.num_queries(order_[fitting++]);
      }
      if (fitting < end) {
        add_blocks(first, fitting, split, shared);
        return add_blocks(fitting, end, split, shared);
      }
      shared = add_block({next_query_, num_queries, order_[end - 1], 0, a_.n_kv_heads, split,
                          common, nullptr, false, shared});
      split = common;
    }
    for (int64_t next; first < end; first = next) {
      for (next = first + 1; next < end && common_[next] > split; ++next) {
      }
      add_blocks(first, next, split, shared);
    }
  }

  // Late queries come first: they take longest.
  void add_own_blocks(int64_t seq, int64_t split, const Task* shared) {
    const int64_t num_queries = a_.num_queries(seq), num_keys = a_.num_keys(seq);
    for (int64_t query = 0; query < num_queries; ++query) {
      const int64_t visible = a_.causal ? num_keys - num_queries + query + 1 : num_keys;
      next_query_[query] = {int32_t(a_.cu_seqlens_q[seq] + query), int32_t(larger(0, visible))};
    }
    for (int64_t i = ceil_div(num_queries, step_) - 1; i >= 0; --i) {
      Task block{next_query_ + i * step_,
                 smaller(step_, num_queries - i * step_),
                 seq,
                 0,
                 a_.n_kv_heads,
                 split,
                 0,
                 nullptr,
                 false,
                 shared};
      block.end_split = ceil_div(Block{a_, block, 0}.most_keys(), kSplit);
      add_block(block);
    }
    next_query_ += num_queries;
  }

  const Task* add_block(const Task& block) {
    blocks_[num_blocks_] = block;
    return &blocks_[num_blocks_++];
  }

  int64_t states_of(const Task& block) const {  // floats, of one head and split
    return block.num_queries * a_.group_size() * a_.state_floats();
  }

  // As many heads in turn as L2 keeps the states of. Of many rows rather all splits of few heads,
  // which fold: those of 96 rows and 100,000 keys (7B) would leave 190 MB of states.
  int64_t heads_per_task(const Task& block) const {
    const int64_t fitting = kStateBytes / int64_t(2 * states_of(block) * sizeof(float));
    const int64_t splits = larger(1, block.end_split - block.first_split);
    const bool bytes = kByteDots && !is_float(a_.cache_dtype);
    const bool many = block.num_queries * a_.group_size() > (bytes ? kStreamByteRows : kStreamRows);
    const int64_t most = larger(1, smaller(fitting, many ? target_ / splits : target_));
    return ceil_div(a_.n_kv_heads, ceil_div(a_.n_kv_heads, most));  // about as many in each task
  }

  // Counts, and writes what it counts where that is not null.
  void cut(Task* task, Task* join, float* left) {
    num_tasks = num_joins = num_floats_ = 0;
    for (int64_t i = 0; i < num_blocks_; ++i) {
      Task& block = blocks_[i];
      const bool is_shared = i + 1 < num_blocks_ && blocks_[i + 1].shared == &block;
      const int64_t splits = block.end_split - block.first_split, heads = heads_per_task(block);
      const int64_t head_states = a_.n_kv_heads * states_of(block);
      block.folds = block.first_split == 0 && (splits * heads <= target_ || splits <= 1);
      const bool leaves = is_shared || !block.folds;
      block.states = leaves && left ? left + num_floats_ : nullptr;
      const int64_t run = block.folds ? splits + 1 : larger(1, target_ / heads);
      for (int64_t head = 0; head < a_.n_kv_heads; head += heads) {
        for (int64_t split = 0; split < splits || (block.folds && split == 0); split += run) {
          if (task) {
            Task& part = task[num_tasks] = block;
            part.first_head = head;
            part.end_head = smaller(head + heads, a_.n_kv_heads);
            part.first_split = block.first_split + split;
            part.end_split = block.first_split + smaller(split + run, splits);
            if (part.states) part.states += split * head_states;
          }
          ++num_tasks;
        }
      }
      if (leaves) num_floats_ += (block.folds ? 1 : splits) * head_states;
      if (is_shared || block.folds) continue;
      for (int64_t head = 0; head < a_.n_kv_heads; ++head, ++num_joins) {
        if (!join) continue;
        join[num_joins] = block;
        join[num_joins].first_head = head;
      }
    }
  }

  const Attention& a_;
  const int64_t step_ =
      a_.group_size() < kRows ? kRows / a_.group_size() : 1;  // queries of a block
  Task* blocks_;
  int64_t num_blocks_ = 0;
  Query* next_query_;
  int32_t *order_, *common_;
  int64_t target_, num_floats_;
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
