// attention: out[t, h] = softmax(scale * q[t, h] . K) V, over paged or contiguous keys and values:
//            one kernel for decoding and prefill          (arXiv:2205.14135, arXiv:2309.06180)
// Shapes   q, out (num_tokens, n_heads, head_dim); keys and values as in ops.h
// Traffic  2 * sum(keys) * n_kv_heads * head_dim * itemsize bytes read (quantised pages: as many as
//          quantized.h says), once each, for up to kRows rows (queries x heads of the group) of a
//          sequence, or of all sequences whose tables name the same blocks (plan.h); of sequences
//          that share, also their states: 2 * rows * splits * (head_dim + 32) floats
// Limit    memory read up to about 8 rows (bf16, Zen 4 and 5); then multiply-adds: over bfloat16
//          keys and values in pairs where the CPU has them, over quantised ones in bytes on CPUs
//          with AVX512-VNNI (byte_tile.h). A row more takes the same time from 8 rows on to 96,
//          so that blocks of fewer gain nothing
// Tiling   one task = (queries of up to kRows rows a kv head, some kv heads in turn, a run of
//          splits of kSplit keys); a kv head's rows share each tile of kTile keys; tiles above the
//          diagonal are skipped. The queries are of one sequence, or, over the whole splits that
//          the tables of several begin with, of all these
// Numerics fp32 scores, softmax and sums (one a tile, added up a split); bfloat16 keys and values
//          are multiplied in pairs where the CPU has VDPBF16PS, with weights rounded to bfloat16
//          (softmax.h); over quantised keys the query is int16 with one scale, its products exact
//          sums; with AVX512-VNNI a tile's weights are 16 bits, their products with values exact
//          sums too; a query without keys gives zeros and lse = -inf; what a row does not see is
//          dropped by selection, its values are never multiplied: NaN in unused slots or in later
//          tokens stays there
//
// Determinism: tiles and splits start at multiples of kTile and kSplit in the sequence; a row's
// splits are folded in ascending order, those of shared blocks as well. What a row computes is
// therefore a function of its query and of the keys it sees alone; how rows share tiles and splits
// are dealt to tasks only decides when.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/attention/byte_tile.h"
#include "cpu/attention/page.h"
#include "cpu/attention/plan.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/values.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kDirectRows = 4;        // up to this many, keys are multiplied as they lie
constexpr int64_t kDirectValueRows = 16;  // up to this many, values too: converted at each use

template <typename T>
QueryLayout query_layout(const Attention& a, int64_t num_rows) {
  const bool direct = num_rows <= kDirectRows && a.head_dim == a.padded_dim();
  const int spread = direct ? kLanes : num_rows <= kQueryGroups * kLanes / 4 ? 4 : 1;
  return {Qk<T>::num_chunks(a.head_dim), spread};
}

// What the packed queries of num_rows rows take: as words, or two bytes an element (bytes.h).
template <typename T>
int64_t query_floats(const Attention& a, const QueryLayout& layout, int64_t num_rows) {
  if (kByteDots && kQuantized<T>) return padded_rows(num_rows) * a.padded_dim() / 2;
  return layout.floats(num_rows);
}

// What a task works in, on its thread. Query and states are of all its heads, the rest of one.
struct Workspace {
  float *query, *split, *total, *keys, *values, *scores;
  QueryScale* scales;  // a query row each

  Workspace(const Attention& a, int64_t num_heads, int64_t num_rows) {
    const int64_t dim = a.padded_dim(), states = num_heads * num_rows * a.state_floats();
    const int64_t queries = ceil_div(num_rows, kLanes) * kLanes * dim;  // groups of rows are whole
    const int64_t sizes[] = {num_heads * queries, states,      states,
                             kLanes * dim,        kTile * dim, num_rows * kTile};
    float** const parts[] = {&query, &split, &total, &keys, &values, &scores};
    int64_t floats = 0;
    for (int64_t size : sizes) floats += size;
    const int64_t bytes =
        floats * sizeof(float) + (num_heads * num_rows + kByteRows) * sizeof(QueryScale);
    float* next = static_cast<float*>(scratch(Scratch::kTask, bytes));
    for (int i = 0; i < 6; ++i) {
      *parts[i] = next;
      next += sizes[i];
    }
    scales = reinterpret_cast<QueryScale*>(next);
  }
};

template <typename T>
Tile<T> tile_at(const Block& block, int64_t key) {
  const Attention& a = block.a;
  Tile<T> tile;
  tile.row_stride = kQuantized<T> ? a.head_dim / kPacked<T> : a.key_strides.token / sizeof(T);
  const bool whole = kQuantized<T> || tile.row_stride == a.head_dim;
  tile.key_bytes = whole ? a.key_strides.group : 0;
  tile.value_bytes = whole ? a.value_strides.group : 0;
  const int64_t left = block.most_keys() - key;
  tile.num_keys = left < 0 ? 0 : int(smaller(kTile, left));
  for (int g = 0; g < kGroups && tile.num_keys > 0; ++g) {
    const int64_t last = (tile.num_keys - 1) / kGroup;
    const auto at = [&](const void* rows, const CacheStrides& strides) {
      const int64_t offset =
          a.offset(strides, block.task.seq, block.kv_head, key + smaller(g, last) * kGroup);
      return reinterpret_cast<const T*>(static_cast<const char*>(rows) + offset);
    };
    tile.keys[g] = at(a.key, a.key_strides);
    tile.values[g] = at(a.value, a.value_strides);
  }
  return tile;
}

template <typename T>
void softmax_rows(const Block& block, const Tile<T>& tile, const VisibleKeys& visible, Fetch& fetch,
                  const QueryScale* queries, float* scores, float* states) {
  const float scale = block.a.scale * 1.44269504f;  // log2(e)
  const Scales<T> scales(tile);
  int64_t first = 0;
  while (visible(first) == 0) ++first;
  for_rows<kSoftmaxRows>(first, block.num_rows, [&](int64_t row, auto rows) {
    constexpr int n = decltype(rows)::value;
    fetch.step(n * kSoftmaxShares);
    softmax<T, n>(scales, visible, row, queries + row, scale, scores + row * kTile,
                  block.state(states, row), block.a.state_floats());
  });
}

template <bool kDirect, typename V>
void add_values(const Block& block, const VisibleKeys& visible, const V* const* groups,
                int64_t row_stride, Fetch& fetch, const float* weights, float* states) {
  const int64_t vecs = block.a.padded_dim() / kLanes, state_floats = block.a.state_floats();
  const int64_t most = value_panel(block.num_rows);
  for (int64_t vec = 0; vec < vecs;) {
    const int64_t width = vec + most <= vecs ? most : vec + kPanel <= vecs ? kPanel : kLeastVecs<V>;
    for_rows<kValueRows>(0, block.num_rows, [&](int64_t row, auto rows) {
      constexpr int n = decltype(rows)::value;
      if (visible(row + n - 1) == 0) return;
      const auto panel = [&](auto panel_vecs) {
        add_values_panel<V, n, decltype(panel_vecs)::value, kDirect>(
            weights + row * kTile, groups, row_stride, fetch, visible, row, vec * kLanes,
            states + row * state_floats, state_floats);
      };
      if (!kDirect) fetch.step(kTile);
      if (width == kLeastVecs<V>) return panel(std::integral_constant<int, kLeastVecs<V>>());
      if constexpr (n == 1) {
        if (width > kPanel) return panel(std::integral_constant<int, 2 * kPanel>());
      }
      if constexpr (n <= 4) {
        if (width > 2) return panel(std::integral_constant<int, kPanel>());
      }
      panel(std::integral_constant<int, 2>());
    });
    vec += width;
  }
}

template <int kSpread, typename T>
void score_groups_of_rows(const Block& block, const Tile<T>& tile, const VisibleKeys& visible,
                          Fetch& fetch, const float* query, const Workspace& work) {
  const QueryLayout layout{Qk<T>::num_chunks(block.a.head_dim), kSpread};
  const int64_t rows = block.num_rows, group_rows = layout.rows();
  for (int first = 0; first < tile.num_keys; first += kLanes) {
    with_spread_keys<kSpread>(
        tile, first, block.a.head_dim, work.keys, [&](const auto* keys, auto chunks) {
          for_rows<kQueryGroups>(0, ceil_div(rows, group_rows), [&](int64_t group, auto groups) {
            const int64_t row = group * group_rows;
            const int64_t left = smaller(rows - row, groups * group_rows);
            if (visible(row + left - 1) <= first) return;
            score_rows<T, decltype(chunks)::value, kSpread, decltype(groups)::value>(
                query + group * layout.group_floats(), keys, layout.chunks, left, fetch,
                work.scores + row * kTile + first);
          });
        });
  }
}

// What follows the tile's keys in memory, its values, is asked for meanwhile.
template <typename T>
void score_tile(const Block& block, const Tile<T>& tile, const VisibleKeys& visible,
                const QueryLayout& layout, const float* query, const Workspace& work) {
  const int64_t dim = block.a.head_dim, rows = block.num_rows;
  Fetch fetch = fetch_values(tile, dim, ceil_div(rows, layout.rows()) * layout.rows() * kTile);
  if (layout.spread == 1) return score_groups_of_rows<1>(block, tile, visible, fetch, query, work);
  if (layout.spread == 4 && kLanes != 4) {
    return score_groups_of_rows<4>(block, tile, visible, fetch, query, work);
  }
  for (int64_t row = 0; row < rows; ++row) {
    score_row(tile, fetch, query + row * layout.group_floats(), visible(row), dim,
              work.scores + row * kTile);
  }
}

// A few rows use values as they lie; many share one conversion.
template <typename T>
void attend_tile(const Block& block, int64_t key, const Tile<T>& tile, const Tile<T>& next,
                 const QueryLayout& layout, const float* query, const QueryScale* scales,
                 const Workspace& work, float* states) {
  const Attention& a = block.a;
  const int64_t dim = a.padded_dim(), rows = block.num_rows;
  const VisibleKeys visible(block, key);
  score_tile(block, tile, visible, layout, query, work);
  const int64_t panels = ceil_div(dim, value_panel(rows) * kLanes);
  Fetch fetch = fetch_keys(next, a.head_dim,
                           rows * kSoftmaxShares + ceil_div(rows, kValueRows) * panels * kTile);
  softmax_rows(block, tile, visible, fetch, scales, work.scores, states);
  if (rows <= kDirectValueRows && a.head_dim == dim) {
    add_values<true>(block, visible, tile.values, tile.row_stride, fetch, work.scores, states);
    return;
  }
  using V = Converted<T>;
  V* values = reinterpret_cast<V*>(work.values);
  convert_values(tile, a.head_dim, dim, values);
  const V* groups[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    groups[g] = values + g * (kGroup / ValueStep<V>::kKeys) * dim;
  }
  add_values<false>(block, visible, groups, dim, fetch, work.scores, states);
}

// The states of the task's heads over one split, of head h at states + (h - first_head) * stride.
template <typename T>
void attend_split(const Attention& a, const Task& task, int64_t split, const Workspace& work,
                  float* states) {
  const Block first{a, task, task.first_head};
  const int64_t stride = first.num_rows * a.state_floats();
  const QueryLayout layout = query_layout<T>(a, first.num_rows);
  const int64_t query_stride = query_floats<T>(a, layout, first.num_rows);
  const int64_t num_heads = task.end_head - task.first_head;
  for (int64_t row = 0; row < num_heads * first.num_rows; ++row) clear(first.state(states, row));
  const int64_t end = smaller((split + 1) * kSplit, first.most_keys());
  Tile<T> tile = tile_at<T>(first, split * kSplit);
  for (int64_t key = split * kSplit; key < end; key += kTile) {
    for (int64_t h = 0; h < num_heads; ++h) {
      const Block block{a, task, task.first_head + h};
      const bool last = h + 1 == num_heads;
      const Block next_block{a, task, last ? task.first_head : block.kv_head + 1};
      const Tile<T> next = tile_at<T>(next_block, last ? key + kTile : key);
      const float* query = work.query + h * query_stride;
      const QueryScale* scales = work.scales + h * first.num_rows;
      if constexpr (kByteDots && kQuantized<T>) {
        attend_tile_bytes(block, key, tile, next, reinterpret_cast<const int8_t*>(query), scales,
                          reinterpret_cast<uint8_t*>(work.keys), states + h * stride);
      } else {
        attend_tile(block, key, tile, next, layout, query, scales, work, states + h * stride);
      }
      tile = next;
    }
  }
}

inline float sum_group(const float* group) {
  Vec sums = load(group);
  for (int i = kLanes; i < kGroup; i += kLanes) sums = sums + load(group + i);
  return sum(sums);
}

// total = total and split joined: their weights are brought to one top.
inline __attribute__((noinline)) void fold(RowState split, RowState total) {
  const Vec weights = splat(sum_group(split.weights()));
  const float top = split.top() > total.top() ? split.top() : total.top();
  const Vec keep = exp2_nonpositive(splat(total.top() - top));
  const Vec take = exp2_nonpositive(splat(split.top() - top));
  for (int64_t i = 0; i < total.width; i += kLanes) {
    store(total.out + i, fma(load(split.out + i), take, load(total.out + i) * keep));
  }
  const Vec joined = fma(weights, take, load(total.weights()) * keep);
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

template <typename Out>
void write_rows_as(const Block& block, float* totals) {
  const int64_t dim = block.a.head_dim;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const RowState total = block.state(totals, row);
    const int64_t to = block.output_row(row);
    const bool empty = block.visible_keys(row) == 0;
    const float weights = empty ? 1.0f : total.weights()[0];
    const bool rounds = !empty && multiplies_pairs(block.a.cache_dtype);
    const float divisor = rounds ? sum_group(total.rounded_weights()) : weights;
    Out* out = static_cast<Out*>(block.a.out) + to * dim;
    if (kByteDots && !is_float(block.a.cache_dtype)) {
      order_columns(total.out, block.a.padded_dim(), block.a.cache_dtype == DType::kInt4 ? 2 : 1);
    }
    const float zero_point =
        block.a.cache_dtype == DType::kInt4 ? sum_group(total.zero_points()) : 0.0f;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec x = (load(total.out + d) + splat(zero_point)) / splat(divisor);
      if (dim - d < kLanes) {
        store_first(out + d, x, int(dim - d));
      } else {
        store(out + d, x);
      }
    }
    if (!block.a.lse) continue;
    constexpr double kLn2 = 0.693147180559945309;
    block.a.lse[to] = empty ? -INFINITY : float(total.top() * kLn2 + std::log(double(weights)));
  }
}

inline void write_rows(const Block& block, float* totals) {
  with_type(block.a.out_dtype, [&](auto out) { write_rows_as<decltype(out)>(block, totals); });
}

// Packs the block's queries as scores multiply them.
template <typename T, typename Q>
void lay_queries(const Block& block, const QueryLayout& layout, const Workspace& work,
                 float* queries, QueryScale* scales) {
  const int64_t head_dim = block.a.head_dim, dim = block.a.padded_dim(), rows = block.num_rows;
  for (int64_t row = 0; row < rows; ++row) {
    const Q* query = static_cast<const Q*>(block.a.query) + block.query_offset(row);
    if constexpr (kQuantized<T>) {
      scales[row] = pack_quantized_query<T>(query, head_dim, work.keys, work.values);
      if constexpr (kByteDots) {
        split_query(work.keys, dim, row, rows, reinterpret_cast<int8_t*>(queries));
      } else {
        layout.lay(row, work.keys, queries);
      }
    } else {
      const int64_t in_group = layout.spread == 1 ? row % kLanes : 0;
      scales[row] = pack_query<T>(query, head_dim, work.values + in_group * dim);
      if (layout.spread > 1) {
        layout.lay(row, work.values, queries);
      } else if (in_group == kLanes - 1 || row == rows - 1) {
        layout.lay_group(row, in_group + 1, work.values, dim, queries);
      }
    }
  }
}

template <typename T, typename Q>
void run_task(const Attention& a, const Task& task) {
  const int64_t num_heads = task.end_head - task.first_head;
  const int64_t rows = task.num_queries * a.group_size(), states = rows * a.state_floats();
  const Workspace work(a, num_heads, rows);
  const Block first{a, task, task.first_head};
  const auto for_heads = [&](const auto& body) {
    for (int64_t h = 0; h < num_heads; ++h) body(h, Block{a, task, task.first_head + h});
  };
  const QueryLayout layout = query_layout<T>(a, rows);
  const int64_t head_floats = query_floats<T>(a, layout, rows);
  if (kQuantized<T> || layout.spread > 1) {  // else all of it is written
    std::memset(work.query, 0, num_heads * head_floats * sizeof(float));
  }
  for_heads([&](int64_t h, const Block& block) {
    lay_queries<T, Q>(block, layout, work, work.query + h * head_floats, work.scales + h * rows);
  });
  float* const total = task.states && task.folds ? first.left(0) : work.total;
  for_heads([&](int64_t h, const Block& block) {
    for (int64_t row = 0; row < rows; ++row) clear(block.state(total + h * states, row));
  });
  for (int64_t split = task.first_split; split < task.end_split; ++split) {
    if (!task.folds) {
      attend_split<T>(a, task, split, work, first.left(split));
      continue;
    }
    attend_split<T>(a, task, split, work, work.split);
    for_heads([&](int64_t h, const Block& block) {
      fold_rows(block, split, work.split + h * states, total + h * states);
    });
  }
  if (task.states) return;
  for_heads([&](int64_t h, const Block& block) { write_rows(block, total + h * states); });
}

// What `shared`, and those before it, attended for the block's rows among others.
inline void fold_shared(const Block& block, const Task* shared, float* totals) {
  if (!shared) return;
  fold_shared(block, shared->shared, totals);
  const Block all{block.a, *shared, block.kv_head};
  const int64_t row_floats = block.a.state_floats();
  const int64_t first = (block.task.queries - shared->queries) * block.group_size * row_floats;
  if (shared->folds) {
    std::memcpy(totals, all.left(0) + first, block.num_rows * row_floats * sizeof(float));
    return;
  }
  for (int64_t split = shared->first_split; split < shared->end_split; ++split) {
    fold_rows(block, split, all.left(split) + first, totals);
  }
}

inline void join_states(const Attention& a, const Task& task) {
  const Block block{a, task, task.first_head};
  const Workspace work(a, 1, block.num_rows);
  for (int64_t row = 0; row < block.num_rows; ++row) clear(block.state(work.total, row));
  fold_shared(block, task.shared, work.total);
  for (int64_t split = task.first_split; split < task.end_split; ++split) {
    fold_rows(block, split, block.left(split), work.total);
  }
  write_rows(block, work.total);
}

// Contiguous keys and values are floats; only pages may be quantised.
template <bool kPages>
void attend(const Attention& a) {
  const auto with_keys = [&](const auto& body) {
    if constexpr (kPages) {
      with_cache_type(a.cache_dtype, body);
    } else {
      with_type(a.cache_dtype, body);
    }
  };
  const Plan plan(a);
  with_type(a.dtype, [&](auto type) {
    using Q = decltype(type);
    with_keys([&](auto cache_type) {
      using T = decltype(cache_type);
      for_each_task(plan.num_tasks, [&](int64_t i) { run_task<T, Q>(a, plan.tasks[i]); });
    });
  });
  for_each_task(plan.num_joins, [&](int64_t i) { join_states(a, plan.joins[i]); });
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
