// The inner code of attention: a few query rows against one tile of 64 keys.
//
// A tile's keys are transposed once into "words": word w of all 64 keys side by side, one key a
// lane. A score is then one chain of multiply-adds over the words, in a lane of its own: its bits
// do not depend on how many rows or keys are computed at a time, and it needs no reduction across
// lanes. The transpose costs about 10 cycles a key (Zen 5), a tenth of the time the key takes to
// come from memory, and is shared by all rows.
#pragma once

#include "task.h"
#include "vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kGroup = 16;  // keys that lie one row stride apart: block_size is a multiple of it
constexpr int kTile = 64;   // keys of one softmax step; a tile starts at a multiple of it
constexpr int kGroups = kTile / kGroup;
constexpr int kQuad = 4;  // rows multiplied at a time: with kPanel, 16 (8) accumulators
constexpr int kPanel = kLanes == 16 ? 4 : 2;  // vectors multiplied at a time; AVX2 has 16 registers

// Where the tile's groups lie. Groups past the last key are not set.
template <typename T>
struct Tile {
  const T* keys[kGroups];
  const T* values[kGroups];
  int64_t row_stride;
  int num_keys;  // the keys that exist: in (0, kTile]
};

// ---- what a word is -----------------------------------------------------------------------

// One element a word, multiplied in float32. A query is first rounded to a bfloat16 cache's dtype,
// so that every instruction set computes the same mathematical function.
template <typename T>
struct Words {
  static int64_t count(int64_t head_dim) { return head_dim; }
  static Vec load_keys(const T* row, int64_t word) { return load(row + word); }
  static Vec load_first_keys(const T* row, int64_t word, int n) {
    return load_first(row + word, n);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static void store_query(float* words, int64_t element, Vec x) { store(words + element, x); }
};

#if defined(__AVX512BF16__)
// Two elements a word, as they lie.
template <>
struct Words<bf16> {
  static int64_t count(int64_t head_dim) { return head_dim / 2; }
  static Vec load_keys(const bf16* row, int64_t word) {
    return load(reinterpret_cast<const float*>(row) + word);
  }
  static Vec load_first_keys(const bf16* row, int64_t word, int n) {
    return load_first(reinterpret_cast<const float*>(row) + word, n);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return dot_bf16_pairs(a, b, c); }
  static void store_query(float* words, int64_t element, Vec x) {
    store(reinterpret_cast<bf16*>(words) + element, x);
  }
};
#else
template <>
inline void Words<bf16>::store_query(float* words, int64_t element, Vec x) {
  bf16 rounded[kLanes];
  store(rounded, x);
  store(words + element, load(rounded));
}
#endif

// `words` has room for head_dim rounded up to kGroup floats.
template <typename T, typename Q>
void pack_query(const Q* query, int64_t head_dim, float* words) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t left = head_dim - d;
    Words<T>::store_query(words, d,
                          left < kLanes ? load_first(query + d, int(left)) : load(query + d));
  }
}

// ---- keys and values of a tile ------------------------------------------------------------

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// words[w * kTile + i] = word w of key i. The next tile's keys are fetched meanwhile.
template <typename T>
void transpose_keys(const Tile<T>& tile, const Tile<T>& next, int64_t head_dim, float* words) {
  const int64_t count = Words<T>::count(head_dim);
  for (int first = 0; first < tile.num_keys; first += kLanes) {
    const int group = first / kGroup, row = first % kGroup, last = tile.num_keys - 1 - first;
    const T* keys[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      keys[i] = tile.keys[group] + (row + (i < last ? i : last)) * tile.row_stride;
      if (first + i < next.num_keys) {
        prefetch_row(next.keys[group] + (row + i) * next.row_stride, head_dim * sizeof(T));
      }
    }
    for (int64_t w = 0; w < count; w += kLanes) {
      const int n = int(smaller(kLanes, count - w));
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        lanes[i] = n < kLanes ? Words<T>::load_first_keys(keys[i], w, n)
                              : Words<T>::load_keys(keys[i], w);
      }
      transpose(lanes);
      for (int i = 0; i < n; ++i) store(words + (w + i) * kTile + first, lanes[i]);
    }
  }
}

// The tile's values in float32, rows `padded_dim` apart and zero past head_dim.
template <typename T>
void convert_values(const Tile<T>& tile, int64_t head_dim, int64_t padded_dim, float* values) {
  for (int i = 0; i < tile.num_keys; ++i) {
    const T* row = tile.values[i / kGroup] + i % kGroup * tile.row_stride;
    for (int64_t d = 0; d < padded_dim; d += kLanes) {
      const int64_t left = head_dim - d;
      store(values + i * padded_dim + d,
            left >= kLanes ? load(row + d) : load_first(row + d, left < 0 ? 0 : int(left)));
    }
  }
}

// ---- scores = query . keys ----------------------------------------------------------------

template <typename T, int kRows, int kVecs>
inline void score_panel(const float* query, int64_t query_stride, const float* words, int64_t count,
                        float* scores) {
  Vec sums[kRows][kVecs];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int64_t w = 0; w < count; ++w) {
    Vec keys[kVecs];
    for (int j = 0; j < kVecs; ++j) keys[j] = load(words + w * kTile + j * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec q = splat(query[r * query_stride + w]);
      for (int j = 0; j < kVecs; ++j) sums[r][j] = Words<T>::multiply_add(q, keys[j], sums[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVecs; ++j) store(scores + r * kTile + j * kLanes, sums[r][j]);
  }
}

template <typename T, int kRows>
void score_rows(const float* query, int64_t query_stride, const float* words, int64_t count,
                int num_keys, float* scores) {
  int key = 0;
  for (; key + (kPanel - 1) * kLanes < num_keys; key += kPanel * kLanes) {
    score_panel<T, kRows, kPanel>(query, query_stride, words + key, count, scores + key);
  }
  for (; key < num_keys; key += kLanes) {
    score_panel<T, kRows, 1>(query, query_stride, words + key, count, scores + key);
  }
}

// ---- out += weights . values --------------------------------------------------------------

// The sum over the tile is made apart and added once: shorter chains round less.
template <typename V, int kRows, int kVecs>
inline void add_values_panel(const float* weights, const V* const* groups, int64_t row_stride,
                             int num_keys, int64_t column, float* out, int64_t out_stride) {
  Vec sums[kRows][kVecs];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int first = 0; first < num_keys; first += kGroup) {
    const V* row = groups[first / kGroup] + column;
    const int end = first + kGroup < num_keys ? first + kGroup : num_keys;
    for (int key = first; key < end; ++key, row += row_stride) {
      Vec values[kVecs];
      for (int j = 0; j < kVecs; ++j) values[j] = load(row + j * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = splat(weights[r * kTile + key]);
        for (int j = 0; j < kVecs; ++j) sums[r][j] = fma(weight, values[j], sums[r][j]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVecs; ++j) {
      float* to = out + r * out_stride + column + j * kLanes;
      store(to, load(to) + sums[r][j]);
    }
  }
}

// ---- softmax ------------------------------------------------------------------------------

// The state of a query row over the keys of one split, and over the splits so far:
// [0, padded_dim) the weighted sum of values, then kGroup floats that add up to the sum of
// weights, then the greatest score. Scores are in units of log2.
struct RowState {
  float* out;
  int64_t padded_dim;
  float* weights() const { return out + padded_dim; }
  float& top() const { return out[padded_dim + kGroup]; }
};
constexpr int64_t row_state_floats(int64_t padded_dim) { return padded_dim + 2 * kGroup; }

inline void clear(RowState state) {
  for (int64_t i = 0; i < state.padded_dim + kGroup; i += kLanes) store(state.out + i, splat(0.0f));
  state.top() = -INFINITY;
}

// Turns the row's scores into weights 2^(scale * score - top); lanes past num_keys are never read
// as numbers, whatever they hold.
inline __attribute__((noinline)) void soften(float* scores, int num_keys, float scale, RowState state) {
  constexpr int kVecs = kTile / kLanes;
  Vec x[kVecs], greatest = splat(-INFINITY);
  for (int j = 0; j < kVecs; ++j) {
    x[j] = load(scores + j * kLanes) * splat(scale);
    if (num_keys < kTile) x[j] = select_first(num_keys - j * kLanes, x[j], splat(-INFINITY));
    greatest = max(x[j], greatest);
  }
  if (const float top = max_lane(greatest); top > state.top()) {
    const Vec shrink = exp2_nonpositive(splat(state.top() - top));
    for (int64_t i = 0; i < state.padded_dim + kGroup; i += kLanes) {
      store(state.out + i, load(state.out + i) * shrink);
    }
    state.top() = top;
  }
  Vec sums[kVecs];
  for (int j = 0; j < kVecs; ++j) {
    sums[j] = exp2_nonpositive(x[j] - splat(state.top()));
    store(scores + j * kLanes, sums[j]);
  }
  for (int width = kGroup / kLanes; width < kVecs; width *= 2) {
    for (int j = 0; j + width < kVecs; j += 2 * width) {
      for (int i = 0; i < width; ++i) sums[j + i] = sums[j + i] + sums[j + width + i];
    }
  }
  for (int i = 0; i < kGroup / kLanes; ++i) {
    store(state.weights() + i * kLanes, load(state.weights() + i * kLanes) + sums[i]);
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
