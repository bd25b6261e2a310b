// attention: out[t, h] = softmax(scale * q[t, h] . K) V, over paged or contiguous keys and values:
//            one kernel for decoding and prefill          (arXiv:2205.14135, arXiv:2309.06180)
// Shapes   q, out (num_tokens, n_heads, head_dim); keys and values as in ops.h
// Traffic  2 * sum(keys) * n_kv_heads * head_dim * itemsize bytes read, once each, for up to kRows
//          rows (queries x heads of the group) a sequence
// Limit    memory read up to about 12 rows (bf16, Zen 5); then multiply-adds, of which the half
//          of q . K runs in bfloat16 pairs where the CPU has them
// Tiling   one task = (sequence, kv head, up to kRows rows, a run of splits of kSplit keys); all
//          rows share each transposed tile of kTile keys; tiles above the diagonal are skipped
// Numerics fp32 scores, softmax and sums (one a tile, added up a split); a query without keys
//          gives zeros and lse = -inf; lanes a row does not see are never multiplied, so NaN in
//          unused slots or in later tokens stays there
//
// Determinism: tiles and splits start at multiples of kTile and kSplit in the sequence; a row's
// splits are folded in ascending order. What a row computes is therefore a function of its query
// and of the keys it sees alone; how rows share tiles and splits are dealt to tasks only decides
// when.
#pragma once

#include <cmath>

#include "attention_tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kSplit = 1024;  // keys a partial result covers
constexpr int64_t kRows = 64;     // query rows that share a tile: their state stays in L2
constexpr int64_t kDirectRows = 4;  // up to this many rows, values are converted as they are used
constexpr int64_t kTasksPerThread = 16;

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

  int64_t group_size() const { return n_heads / n_kv_heads; }
  int64_t padded_dim() const { return ceil_div(head_dim, kGroup) * kGroup; }
  int64_t state_floats() const { return row_state_floats(padded_dim()); }
  int64_t num_queries(int64_t seq) const { return cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]; }
  int64_t num_keys(int64_t seq) const {
    return block_tables ? seq_lens[seq] : cu_seqlens_k[seq + 1] - cu_seqlens_k[seq];
  }
  // Elements between two keys of a group, and from the start to key number `key` (a group's first).
  int64_t row_stride() const { return block_tables ? head_dim : n_kv_heads * head_dim; }
  int64_t row_offset(int64_t seq, int64_t kv_head, int64_t key) const {
    if (!block_tables) return ((cu_seqlens_k[seq] + key) * n_kv_heads + kv_head) * head_dim;
    const int64_t page = block_tables[seq * max_blocks + key / block_size];
    return ((page * n_kv_heads + kv_head) * block_size + key % block_size) * head_dim;
  }
};

// Consecutive queries of one sequence with all query heads of one key/value head. Row r is query
// r / group_size, head r % group_size. A task computes the splits [first_split, end_split) of it.
struct Task {
  int64_t seq, kv_head, first_query, num_queries, first_split, end_split;
  float* partials;  // (splits of the block, rows) states; null: fold at once
};

// A task's view of its rows.
struct Block {
  const Attention& a;
  const Task& task;
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
    return token * a.n_heads + task.kv_head * group_size + row % group_size;
  }
  RowState state(float* states, int64_t row) const {
    return {states + row * a.state_floats(), a.padded_dim()};
  }
};

// What a task works in, on its thread.
struct Workspace {
  float *query, *keys, *values, *scores, *split, *total;

  Workspace(const Attention& a, int64_t num_rows) {
    const int64_t dim = a.padded_dim(), states = num_rows * a.state_floats();
    const int64_t sizes[] = {num_rows * dim, kTile * dim, kTile * dim, num_rows * kTile,
                             states,         states};
    float** const parts[] = {&query, &keys, &values, &scores, &split, &total};
    int64_t floats = 0;
    for (int64_t size : sizes) floats += size;
    float* next = static_cast<float*>(scratch(Scratch::kTask, floats * sizeof(float)));
    for (int i = 0; i < 6; ++i) {
      *parts[i] = next;
      next += sizes[i];
    }
  }
};

template <typename T>
Tile<T> tile_at(const Block& block, int64_t key) {
  Tile<T> tile;
  tile.row_stride = block.a.row_stride();
  const int64_t left = block.most_keys() - key;
  tile.num_keys = left < 0 ? 0 : int(smaller(kTile, left));
  for (int first = 0; first < tile.num_keys; first += kGroup) {
    const int64_t offset = block.a.row_offset(block.task.seq, block.task.kv_head, key + first);
    tile.keys[first / kGroup] = static_cast<const T*>(block.a.key) + offset;
    tile.values[first / kGroup] = static_cast<const T*>(block.a.value) + offset;
  }
  return tile;
}

// Calls body(first row, rows as a constant) for the rows in quads, then what is left.
template <typename Body>
inline void for_each_quad(int64_t num_rows, const Body& body) {
  int64_t row = 0;
  for (; row + kQuad <= num_rows; row += kQuad) body(row, std::integral_constant<int, kQuad>());
  switch (num_rows - row) {
    case 3: return body(row, std::integral_constant<int, 3>());
    case 2: return body(row, std::integral_constant<int, 2>());
    case 1: return body(row, std::integral_constant<int, 1>());
  }
}

// How many of a tile's keys a row sees; the tile's first key is number `key`.
inline int seen_of_tile(const Block& block, int64_t row, int64_t key) {
  const int64_t seen = block.visible_keys(row) - key;
  return seen < 0 ? 0 : int(smaller(kTile, seen));
}

template <typename V>
void add_values(const Block& block, int64_t key, const V* const* groups, int64_t row_stride,
                const float* weights, float* states) {
  const int64_t vecs = block.a.padded_dim() / kLanes, state_floats = block.a.state_floats();
  for (int64_t vec = 0; vec < vecs;) {
    const bool full = vec + kPanel <= vecs;
    // A block of rows sees the tile alike, or else (on the diagonal) each row its own part.
    const auto add = [&](int64_t row, auto rows, int seen) {
      constexpr int n = decltype(rows)::value;
      const float* from = weights + row * kTile;
      float* to = states + row * state_floats;
      if (full) {
        add_values_panel<V, n, kPanel>(from, groups, row_stride, seen, vec * kLanes, to,
                                       state_floats);
      } else {
        add_values_panel<V, n, 1>(from, groups, row_stride, seen, vec * kLanes, to, state_floats);
      }
    };
    for_each_quad(block.num_rows, [&](int64_t row, auto rows) {
      constexpr int n = decltype(rows)::value;
      const int seen = seen_of_tile(block, row, key);
      if (seen == seen_of_tile(block, row + n - 1, key)) {
        if (seen > 0) add(row, rows, seen);
        return;
      }
      for (int64_t r = row; r < row + n; ++r) {
        const int own = seen_of_tile(block, r, key);
        if (own > 0) add(r, std::integral_constant<int, 1>(), own);
      }
    });
    vec += full ? kPanel : 1;
  }
}

template <typename T>
void attend_tile(const Block& block, int64_t key, const Tile<T>& tile, const Tile<T>& next,
                 const Workspace& work, float* states) {
  const Attention& a = block.a;
  const int64_t dim = a.padded_dim();
  transpose_keys(tile, next, a.head_dim, work.keys);
  for_each_quad(block.num_rows, [&](int64_t row, auto rows) {
    constexpr int n = decltype(rows)::value;
    score_rows<T, n>(work.query + row * dim, dim, work.keys, Words<T>::count(a.head_dim),
                     seen_of_tile(block, row + n - 1, key), work.scores + row * kTile);
  });
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const int seen = seen_of_tile(block, row, key);
    const float scale = a.scale * 1.44269504f;
    if (seen > 0) soften(work.scores + row * kTile, seen, scale, block.state(states, row));
  }
  for (int i = 0; i < next.num_keys; ++i) {
    prefetch_row(next.values[i / kGroup] + i % kGroup * next.row_stride, a.head_dim * sizeof(T));
  }
  if (block.num_rows <= kDirectRows && a.head_dim == dim) {
    add_values(block, key, tile.values, tile.row_stride, work.scores, states);
  } else {
    convert_values(tile, a.head_dim, dim, work.values);
    const float* groups[kGroups];
    for (int g = 0; g < kGroups; ++g) groups[g] = work.values + g * kGroup * dim;
    add_values(block, key, groups, dim, work.scores, states);
  }
}

template <typename T>
void attend_split(const Block& block, int64_t split, const Workspace& work, float* states) {
  for (int64_t row = 0; row < block.num_rows; ++row) clear(block.state(states, row));
  const int64_t end = smaller((split + 1) * kSplit, block.most_keys());
  Tile<T> tile = tile_at<T>(block, split * kSplit);
  for (int64_t key = split * kSplit; key < end; key += kTile) {
    const Tile<T> next = tile_at<T>(block, key + kTile);
    attend_tile(block, key, tile, next, work, states);
    tile = next;
  }
}

// total = total and split joined: their weights are brought to one top.
inline __attribute__((noinline)) void fold(RowState split, RowState total) {
  float weights[kLanes * (kGroup / kLanes)];
  Vec sums = load(split.weights());
  for (int i = kLanes; i < kGroup; i += kLanes) sums = sums + load(split.weights() + i);
  store(weights, splat(sum(sums)));
  const float top = split.top() > total.top() ? split.top() : total.top();
  const Vec keep = exp2_nonpositive(splat(total.top() - top));
  const Vec take = exp2_nonpositive(splat(split.top() - top));
  for (int64_t i = 0; i < total.padded_dim; i += kLanes) {
    store(total.out + i, fma(load(split.out + i), take, load(total.out + i) * keep));
  }
  const Vec joined = fma(load(weights), take, load(total.weights()) * keep);
  for (int i = 0; i < kGroup; i += kLanes) store(total.weights() + i, joined);
  total.top() = top;
}

// Rows that see no key of the split keep their total as it is.
inline void fold_rows(const Block& block, int64_t split, float* states, float* totals) {
  for (int64_t row = 0; row < block.num_rows; ++row) {
    if (block.visible_keys(row) > split * kSplit) {
      fold(block.state(states, row), block.state(totals, row));
    }
  }
}

template <typename Q>
void write_rows(const Block& block, float* totals) {
  const int64_t dim = block.a.head_dim;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const RowState total = block.state(totals, row);
    const int64_t to = block.output_row(row);
    const bool empty = block.visible_keys(row) == 0;
    const float weights = empty ? 1.0f : total.weights()[0];
    Q* out = static_cast<Q*>(block.a.out) + to * dim;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec x = load(total.out + d) / splat(weights);
      if (dim - d < kLanes) {
        store_first(out + d, x, int(dim - d));
      } else {
        store(out + d, x);
      }
    }
    constexpr double kLn2 = 0.693147180559945309;
    block.a.lse[to] = empty ? -INFINITY : float(total.top() * kLn2 + std::log(double(weights)));
  }
}

template <typename T, typename Q>
void run_task(const Attention& a, const Task& task) {
  const Block block{a, task};
  const Workspace work(a, block.num_rows);
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const Q* query = static_cast<const Q*>(a.query) + block.output_row(row) * a.head_dim;
    pack_query<T>(query, a.head_dim, work.query + row * a.padded_dim());
    clear(block.state(work.total, row));
  }
  const int64_t states = block.num_rows * a.state_floats();
  for (int64_t split = task.first_split; split < task.end_split; ++split) {
    float* to = task.partials ? task.partials + split * states : work.split;
    attend_split<T>(block, split, work, to);
    if (!task.partials) fold_rows(block, split, to, work.total);
  }
  if (!task.partials) write_rows<Q>(block, work.total);
}

template <typename Q>
void join_partials(const Attention& a, const Task& task) {
  const Block block{a, task};
  const Workspace work(a, block.num_rows);
  for (int64_t row = 0; row < block.num_rows; ++row) clear(block.state(work.total, row));
  for (int64_t split = 0; split < task.end_split; ++split) {
    float* states = task.partials + split * block.num_rows * a.state_floats();
    fold_rows(block, split, states, work.total);
  }
  write_rows<Q>(block, work.total);
}

// Every block of rows as one task over all its splits. Late blocks come first: they are longest.
template <typename Body>
void for_each_block(const Attention& a, const Body& body) {
  const int64_t group = a.group_size(), step = group < kRows ? kRows / group : 1;
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
    const int64_t num_queries = a.num_queries(seq), blocks = ceil_div(num_queries, step);
    for (int64_t kv_head = 0; kv_head < a.n_kv_heads; ++kv_head) {
      for (int64_t i = blocks - 1; i >= 0; --i) {
        Task task{seq, kv_head, i * step, smaller(step, num_queries - i * step), 0, 0, nullptr};
        task.end_split = ceil_div(Block{a, task}.most_keys(), kSplit);
        body(task);
      }
    }
  }
}

// The work in tasks of at most `run` splits. A block cut into several tasks keeps the states of
// all its splits until they can be folded in order.
struct Plan {
  int64_t num_tasks = 0, num_joins = 0;
  Task *tasks, *joins;

  explicit Plan(const Attention& a) {
    int64_t splits = 0, floats = 0;
    for_each_block(a, [&](const Task& block) { splits += block.end_split; });
    const int64_t run = ceil_div(splits, num_threads() * kTasksPerThread);
    for_each_block(a, [&](const Task& block) {
      num_tasks += block.end_split <= run ? 1 : ceil_div(block.end_split, run);
      if (block.end_split > run) {
        ++num_joins;
        floats += block.end_split * Block{a, block}.num_rows * a.state_floats();
      }
    });
    const int64_t list_bytes = ceil_div((num_tasks + num_joins) * sizeof(Task), 64) * 64;
    char* memory =
        static_cast<char*>(scratch(Scratch::kCaller, list_bytes + floats * sizeof(float)));
    tasks = reinterpret_cast<Task*>(memory);
    joins = tasks + num_tasks;
    fill(a, run, reinterpret_cast<float*>(memory + list_bytes));
  }

 private:
  void fill(const Attention& a, int64_t run, float* partials) {
    Task *next = tasks, *next_join = joins;
    for_each_block(a, [&](Task block) {
      if (block.end_split <= run) {
        *next++ = block;
        return;
      }
      block.partials = partials;
      partials += block.end_split * Block{a, block}.num_rows * a.state_floats();
      *next_join++ = block;
      for (int64_t split = 0; split < block.end_split; split += run) {
        Task part = block;
        part.first_split = split;
        part.end_split = smaller(split + run, block.end_split);
        *next++ = part;
      }
    });
  }
};

inline void attend(const Attention& a) {
  const Plan plan(a);
  with_type(a.dtype, [&](auto type) {
    using Q = decltype(type);
    with_type(a.cache_dtype, [&](auto cache_type) {
      using T = decltype(cache_type);
      for_each_task(plan.num_tasks, [&](int64_t i) { run_task<T, Q>(a, plan.tasks[i]); });
    });
    for_each_task(plan.num_joins, [&](int64_t i) { join_partials<Q>(a, plan.joins[i]); });
  });
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
