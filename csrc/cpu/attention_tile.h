// The inner code of attention: a few query rows against one tile of 64 keys.
//
// A word is one element, or a pair of bfloat16 where the CPU multiplies pairs. A score is the sum
// of kLanes chains in ascending order; chain j multiplies and adds the words j, j + kLanes, ...
// This is what a dot product of vectors gives when its lanes are added in order, and a tile whose
// keys are transposed, one key a lane, gives the same bits without a step across lanes. Few rows
// take the first road (4 cycles a key and row on Zen 5), many the second (10 a key for the
// transpose, shared by all rows, and 2.5 a key and row).
#pragma once

#include "task.h"
#include "vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kGroup = 16;  // keys that lie one row stride apart: block_size is a multiple of it
constexpr int kTile = 64;   // keys of one softmax step; a tile starts at a multiple of it
constexpr int kGroups = kTile / kGroup;
// Rows and vectors multiplied at a time: what fits 32 (AVX2: 16) registers. Values take one
// accumulator for each pair, scores two.
constexpr int kPanel = kLanes == 16 ? 4 : 2;
constexpr int kValueRows = 4;
constexpr int kScoreRows = 3;

// What work on a tile asks for of the next one (class Fetch): about a share for 8 cycles.
constexpr int kTransposeShares = 16;  // a vector of keys
constexpr int kScoreShares = 3;       // one word of kScoreRows rows
constexpr int kSoftenShares = 5;      // a row
constexpr int kValueShares = 1;       // a key and panel of kValueRows rows

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

// Words as whole vectors; what is past head_dim is zero in queries and keys.
template <typename T>
int64_t num_chunks(int64_t head_dim) {
  return ceil_div(Words<T>::count(head_dim), kLanes);
}

// `words` has room for head_dim rounded up to kGroup floats.
template <typename T, typename Q>
void pack_query(const Q* query, int64_t head_dim, float* words) {
  for (int64_t d = 0; d < head_dim; d += kLanes) store(words + d, splat(0.0f));
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t left = head_dim - d;
    Words<T>::store_query(words, d,
                          left < kLanes ? load_first(query + d, int(left)) : load(query + d));
  }
}

// ---- keys and values of a tile ------------------------------------------------------------

// Asks memory for the keys, then the values of the next tile, a few lines at each step of the work
// on this one: asked all at once they would hold up the loads behind them, and memory would rest
// for the remainder of the tile.
class Fetch {
 public:
  template <typename T>
  Fetch(const Tile<T>& next, int64_t head_dim, int64_t num_shares) {
    const bool whole = next.row_stride == head_dim;  // pages: a group is one piece
    stride_ = next.row_stride * sizeof(T);
    rows_ = whole ? 1 : kGroup;
    row_bytes_ = (whole ? kGroup : 1) * head_dim * sizeof(T);
    for (int first = 0; first < next.num_keys; first += kGroup) {
      groups_[num_groups_++] = reinterpret_cast<const char*>(next.keys[first / kGroup]);
    }
    for (int first = 0; first < next.num_keys; first += kGroup) {
      groups_[num_groups_++] = reinterpret_cast<const char*>(next.values[first / kGroup]);
    }
    const int64_t lines = 2 * next.num_keys * ceil_div(head_dim * sizeof(T), kLine);
    share_ = ceil_div(kLine * lines, num_shares);
    if (num_groups_ > 0) start_group();
  }

  void step(int64_t shares) {
    due_ += shares * share_;
    if (due_ < kLine || at_ == end_) return;
    for (; due_ >= kLine && at_ < end_; at_ += kLine, due_ -= kLine) __builtin_prefetch(at_);
    if (at_ >= end_) next_row();
  }

 private:
  static constexpr int64_t kLine = 64;
  void start_group() {
    row_ = 0;
    at_ = groups_[group_];
    end_ = at_ + row_bytes_;
  }
  void next_row() {
    if (++row_ < rows_) {
      at_ = groups_[group_] + row_ * stride_;
      end_ = at_ + row_bytes_;
    } else if (++group_ < num_groups_) {
      start_group();
    } else {
      at_ = end_;
    }
  }

  const char* groups_[2 * kGroups];
  int num_groups_ = 0, group_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_, rows_, row_bytes_, row_ = 0, share_, due_ = 0;
};

template <typename T>
inline Vec load_chunk(const T* row, int64_t chunk, int64_t head_dim) {
  const int64_t word = chunk * kLanes, left = Words<T>::count(head_dim) - word;
  return left < kLanes ? Words<T>::load_first_keys(row, word, int(left))
                       : Words<T>::load_keys(row, word);
}

// The rows of the kLanes keys from `first` on; past the last key, the last one's again.
template <typename T>
inline void key_rows(const Tile<T>& tile, int first, const T* (&rows)[kLanes]) {
  const T* group = tile.keys[first / kGroup] + first % kGroup * tile.row_stride;
  const int last = tile.num_keys - 1 - first;
  for (int i = 0; i < kLanes; ++i) rows[i] = group + (i < last ? i : last) * tile.row_stride;
}

// words[(j * chunks + c) * kTile + i] = word c * kLanes + j of key i: the words of chain j
// together.
template <typename T>
void transpose_keys(const Tile<T>& tile, Fetch& fetch, int64_t head_dim, float* words) {
  const int64_t chunks = num_chunks<T>(head_dim);
  for (int first = 0; first < tile.num_keys; first += kLanes) {
    const T* rows[kLanes];
    key_rows(tile, first, rows);
    fetch.step(kTransposeShares);
    for (int64_t c = 0; c < chunks; ++c) {
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = load_chunk(rows[i], c, head_dim);
      transpose(lanes);
      for (int j = 0; j < kLanes; ++j) store(words + (j * chunks + c) * kTile + first, lanes[j]);
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

// One row against keys as they lie. kChunks: num_chunks where known, for the query to stay in
// registers, or 0.
template <typename T, int kChunks>
void score_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
               int64_t head_dim, float* scores) {
  const int64_t chunks = kChunks ? kChunks : num_chunks<T>(head_dim);
  for (int first = 0; first < num_keys; first += kLanes) {
    const T* rows[kLanes];
    key_rows(tile, first, rows);
    Vec chains[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      fetch.step(kValueShares);
      chains[i] = splat(0.0f);
      for (int64_t c = 0; c < chunks; ++c) {
        const Vec key =
            kChunks ? Words<T>::load_keys(rows[i], c * kLanes) : load_chunk(rows[i], c, head_dim);
        chains[i] = Words<T>::multiply_add(load(query + c * kLanes), key, chains[i]);
      }
    }
    transpose(chains);
    Vec total = splat(0.0f);
    for (const Vec& chain : chains) total = total + chain;
    store(scores + first, total);
  }
}

template <typename T>
void score_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
               int64_t head_dim, float* scores) {
  const int64_t chunks = head_dim % (2 * kLanes) ? 0 : num_chunks<T>(head_dim);
  switch (chunks) {
    case 2:
      return score_row<T, 2>(tile, fetch, query, num_keys, head_dim, scores);
    case 4:
      return score_row<T, 4>(tile, fetch, query, num_keys, head_dim, scores);
    case 8:
      return score_row<T, 8>(tile, fetch, query, num_keys, head_dim, scores);
    default:
      return score_row<T, 0>(tile, fetch, query, num_keys, head_dim, scores);
  }
}

// kRows rows against kVecs vectors of transposed keys.
template <typename T, int kRows, int kVecs>
inline void score_panel(const float* query, int64_t query_stride, const float* words,
                        int64_t chunks, Fetch& fetch, float* scores) {
  Vec totals[kRows][kVecs];
  for (auto& row : totals) {
    for (Vec& total : row) total = splat(0.0f);
  }
  for (int j = 0; j < kLanes; ++j) {
    fetch.step(kScoreShares);
    Vec chains[kRows][kVecs];
    for (auto& row : chains) {
      for (Vec& chain : row) chain = splat(0.0f);
    }
    for (int64_t c = 0; c < chunks; ++c, words += kTile) {
      Vec keys[kVecs];
      for (int v = 0; v < kVecs; ++v) keys[v] = hold(load(words + v * kLanes));
      for (int r = 0; r < kRows; ++r) {
        const Vec q = splat(query[r * query_stride + c * kLanes + j]);
        for (int v = 0; v < kVecs; ++v) {
          chains[r][v] = Words<T>::multiply_add(q, keys[v], chains[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) totals[r][v] = totals[r][v] + chains[r][v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store(scores + r * kTile + v * kLanes, totals[r][v]);
  }
}

template <typename T, int kRows>
void score_rows(const float* query, int64_t query_stride, const float* words, int64_t chunks,
                int num_keys, Fetch& fetch, float* scores) {
  int key = 0;
  for (; key + (kPanel - 1) * kLanes < num_keys; key += kPanel * kLanes) {
    score_panel<T, kRows, kPanel>(query, query_stride, words + key, chunks, fetch, scores + key);
  }
  for (; key < num_keys; key += kLanes) {
    score_panel<T, kRows, 1>(query, query_stride, words + key, chunks, fetch, scores + key);
  }
}

// ---- out += weights . values --------------------------------------------------------------

// The sum over the tile is made apart and added once: shorter chains round less.
template <typename V, int kRows, int kVecs, bool kFetch>
inline void add_values_panel(const float* weights, const V* const* groups, int64_t row_stride,
                             Fetch& fetch, int num_keys, int64_t column, float* out,
                             int64_t out_stride) {
  Vec sums[kRows][kVecs];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int first = 0; first < num_keys; first += kGroup) {
    const V* row = groups[first / kGroup] + column;
    const int end = first + kGroup < num_keys ? first + kGroup : num_keys;
    for (int key = first; key < end; ++key, row += row_stride) {
      if constexpr (kFetch) fetch.step(kValueShares);
      Vec values[kVecs];
      for (int j = 0; j < kVecs; ++j) values[j] = hold(load(row + j * kLanes));
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
inline __attribute__((noinline)) void soften(float* scores, int num_keys, float scale,
                                             RowState state) {
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
  constexpr int kStep = kGroup / kLanes;
  for (int i = 0; i < kStep; ++i) {
    const Vec pairs = (sums[i] + sums[kStep + i]) + (sums[2 * kStep + i] + sums[3 * kStep + i]);
    store(state.weights() + i * kLanes, load(state.weights() + i * kLanes) + pairs);
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
