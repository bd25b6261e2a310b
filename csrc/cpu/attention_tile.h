// The inner code of attention: a few query rows against one tile of 64 keys.
//
// A word is one element, or a pair of bfloat16 where the CPU multiplies pairs. A score is the sum
// of kLanes chains in ascending order; chain j multiplies and adds the words j, j + kLanes, ...
// This is what a dot product of vectors gives when its lanes are added in order, and a tile whose
// keys are transposed, one key a lane, gives the same bits without a step across lanes. Few rows
// take the first road (4 cycles a key and row on Zen 5), many the second (10 a key for the
// transpose, shared by all rows, and 2.5 a key and row).
#pragma once

#include "attention_words.h"
#include "task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kTile = 64;  // keys of one softmax step; a tile starts at a multiple of it
constexpr int kGroups = kTile / kGroup;
// Elements that one of T holds.
template <typename T>
constexpr int64_t kPacked = std::is_same_v<T, Nibbles> ? 2 : 1;

// Rows and vectors multiplied at a time: what fits 32 (AVX2: 16) registers. Values and exact scores
// take one accumulator for each pair, other scores two.
constexpr int kPanel = kLanes == 16 ? 4 : 2;
constexpr int kValueRows = 4;
template <typename T>
constexpr int kScoreRows = kQuantized<T> ? 6 : 3;

// What work on a tile asks for of the next one (class Fetch): about a share for 8 cycles.
constexpr int kTransposeShares = 16;  // a vector of keys
template <typename T>
constexpr int kScoreShares = kScoreRows<T>;  // one word of kScoreRows rows
constexpr int kSoftenShares = 5;             // a row
constexpr int kValueShares = 1;              // a key and panel of kValueRows rows

// Where the tile's groups lie. Groups past the last key stand for the last one again.
template <typename T>
struct Tile {
  const T* keys[kGroups];
  const T* values[kGroups];
  int64_t row_stride;              // in T
  int64_t key_bytes, value_bytes;  // of a group in one piece, its scales included; 0: rows apart
  int num_keys;                    // the keys that exist: in (0, kTile]
};

// ---- keys and values of a tile ------------------------------------------------------------

// Asks memory for the keys, then the values of the next tile, a few lines at each step of the work
// on this one: asked all at once they would hold up the loads behind them, and memory would rest
// for the remainder of the tile.
class Fetch {
 public:
  template <typename T>
  Fetch(const Tile<T>& next, int64_t head_dim, int64_t num_shares) {
    const bool whole = next.key_bytes > 0;
    const int64_t row_bytes = head_dim * sizeof(T);
    stride_ = next.row_stride * sizeof(T);
    rows_ = whole ? 1 : kGroup;
    row_bytes_[0] = whole ? next.key_bytes : row_bytes;
    row_bytes_[1] = whole ? next.value_bytes : row_bytes;
    num_groups_ = ceil_div(next.num_keys, kGroup);
    for (int g = 0; g < num_groups_; ++g) {
      groups_[g] = reinterpret_cast<const char*>(next.keys[g]);
      groups_[num_groups_ + g] = reinterpret_cast<const char*>(next.values[g]);
    }
    const int64_t lines = ceil_div(row_bytes_[0], kLine) + ceil_div(row_bytes_[1], kLine);
    share_ = ceil_div(num_groups_ * rows_ * lines * kLine, num_shares);
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
    end_ = at_ + row_bytes_[group_ >= num_groups_];
  }
  void next_row() {
    if (++row_ < rows_) {
      at_ = groups_[group_] + row_ * stride_;
      end_ = at_ + row_bytes_[group_ >= num_groups_];
    } else if (++group_ < 2 * num_groups_) {
      start_group();
    } else {
      at_ = end_;
    }
  }

  const char* groups_[2 * kGroups];
  int num_groups_ = 0, group_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_, rows_, row_bytes_[2], row_ = 0, share_, due_ = 0;
};

// The rows of the kLanes keys from `first` on; past the last key, the last one's again.
template <typename T>
inline void key_rows(const Tile<T>& tile, int first, typename Words<T>::Row (&rows)[kLanes]) {
  const int last = tile.num_keys - 1 - first;
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = Words<T>::key_row(tile.keys[first / kGroup], first % kGroup + (i < last ? i : last),
                                tile.row_stride);
  }
}

// words[(j * chunks + c) * kTile + i] = word c * kLanes + j of key i: the words of chain j
// together.
template <typename T>
void transpose_keys(const Tile<T>& tile, Fetch& fetch, int64_t head_dim, float* words) {
  const int64_t chunks = Words<T>::num_chunks(head_dim);
  for (int first = 0; first < tile.num_keys; first += kLanes) {
    typename Words<T>::Row rows[kLanes];
    key_rows(tile, first, rows);
    fetch.step(kTransposeShares);
    for (int64_t c = 0; c < chunks; ++c) {
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = Words<T>::load_chunk(rows[i], c, head_dim);
      transpose(lanes);
      for (int j = 0; j < kLanes; ++j) store(words + (j * chunks + c) * kTile + first, lanes[j]);
    }
  }
}

// The tile's values in float32 without their scales, rows `padded_dim` apart and zero past
// head_dim.
template <typename T>
void convert_values(const Tile<T>& tile, int64_t head_dim, int64_t padded_dim, float* values) {
  for (int i = 0; i < tile.num_keys; ++i) {
    const T* row = tile.values[i / kGroup] + i % kGroup * tile.row_stride;
    float* to = values + i * padded_dim;
    if constexpr (std::is_same_v<T, Nibbles>) {
      for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
        Vec even, odd;
        load_values(row + d / 2, even, odd);
        interleave(even, odd);
        store(to + d, even);
        store(to + d + kLanes, odd);
      }
    } else {
      for (int64_t d = 0; d < padded_dim; d += kLanes) {
        const int64_t left = head_dim - d;
        store(to + d,
              left >= kLanes ? load(row + d) : load_first(row + d, left < 0 ? 0 : int(left)));
      }
    }
  }
}

// ---- scores = query . keys ----------------------------------------------------------------

// One row against keys as they lie. kChunks: num_chunks where known, for the query to stay in
// registers, or 0.
template <typename T, int kChunks>
void score_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
               int64_t head_dim, float* scores) {
  const int64_t chunks = kChunks ? kChunks : Words<T>::num_chunks(head_dim);
  for (int first = 0; first < num_keys; first += kLanes) {
    typename Words<T>::Row rows[kLanes];
    key_rows(tile, first, rows);
    Vec chains[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      fetch.step(kValueShares);
      chains[i] = splat(0.0f);
      for (int64_t c = 0; c < chunks; ++c) {
        const Vec key = kChunks ? Words<T>::load_whole_chunk(rows[i], c)
                                : Words<T>::load_chunk(rows[i], c, head_dim);
        chains[i] = Words<T>::multiply_add(load(query + c * kLanes), key, chains[i]);
      }
    }
    transpose(chains);
    Vec total = splat(0.0f);
    for (const Vec& chain : chains) total = total + chain;
    store(scores + first, total);
  }
}

// The same of quantised keys. Their sums are exact, so lanes are added in pairs, in half the
// shuffles of a transpose; a group's rows past the last key are there to be read.
template <typename Dot>
inline void score_groups(Fetch& fetch, int num_keys, float* scores, const Dot& dot) {
  for (int first = 0; first < num_keys; first += kLanes) {
    Vec quads[kLanes / 4];
#pragma GCC unroll 4
    for (int q = 0; q < kLanes / 4; ++q) {
      fetch.step(4 * kValueShares);
      const int key = first + 4 * q;
      quads[q] = sum_lanes(dot(key), dot(key + 1), dot(key + 2), dot(key + 3));
    }
    store(scores + first, join_lanes(quads));
  }
}

template <typename T, int kChunks>
void score_exact_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
                     int64_t head_dim, float* scores) {
  const int64_t chunks = kChunks ? kChunks : Words<T>::num_chunks(head_dim);
  score_groups(fetch, num_keys, scores, [&](int key) {
    const auto row = Words<T>::key_row(tile.keys[key / kGroup], key % kGroup, tile.row_stride);
    Vec sum = splat(0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      const Vec words =
          kChunks ? Words<T>::load_whole_chunk(row, c) : Words<T>::load_chunk(row, c, head_dim);
      sum = Words<T>::multiply_add(load(query + c * kLanes), words, sum);
    }
    return sum;
  });
}

#if defined(__AVX512VNNI__)
// An int4 key of 128 elements as 64 bytes, low halves and high halves, against the query in two
// parts of 8 bits: the same sums in half the instructions.
inline void score_row_bytes(const Tile<Nibbles>& tile, Fetch& fetch, const float* query,
                            int num_keys, float* scores) {
  __m512i high[2], low[2];  // of the elements of even, of odd number
  for (int i = 0; i < 2; ++i) {
    const __m512i words[2] = {to_bits(load(query + i * kLanes)),
                              to_bits(load(query + (2 + i) * kLanes))};
    __m256i parts[2][2];
    for (int j = 0; j < 2; ++j) {
      const __m512i rounded = _mm512_add_epi16(words[j], _mm512_set1_epi16(128));
      parts[0][j] = _mm512_cvtepi16_epi8(_mm512_srai_epi16(rounded, 8));
      parts[1][j] = _mm512_cvtepi16_epi8(words[j]);  // less 256 times the other: in [-128, 127]
    }
    high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(parts[0][0]), parts[0][1], 1);
    low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(parts[1][0]), parts[1][1], 1);
  }
  const __m512i fours = _mm512_set1_epi8(15), bit = _mm512_set1_epi8(16);
  score_groups(fetch, num_keys, scores, [&](int key) {
    const uint8_t* group = &tile.keys[key / kGroup]->bits;
    const __m512i row = _mm512_loadu_si512(group + key % kGroup * 64);
    uint64_t even_bits, odd_bits;
    std::memcpy(&even_bits, group + kGroup * 64 + key % kGroup * 16, 8);
    std::memcpy(&odd_bits, group + kGroup * 64 + key % kGroup * 16 + 8, 8);
    __m512i even = _mm512_and_si512(row, fours);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi16(row, 4), fours);
    even = _mm512_mask_add_epi8(even, even_bits, even, bit);
    odd = _mm512_mask_add_epi8(odd, odd_bits, odd, bit);
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, high[0]);
    sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, odd, high[1]), 8);
    sum = _mm512_dpbusd_epi32(sum, even, low[0]);
    return from_bits(_mm512_dpbusd_epi32(sum, odd, low[1]));
  });
}
#endif

template <typename T>
void score_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
               int64_t head_dim, float* scores) {
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same_v<T, Nibbles>) {
    if (head_dim == 128) return score_row_bytes(tile, fetch, query, num_keys, scores);
  }
#endif
  const int64_t chunks = Words<T>::has_whole_chunks(head_dim) ? Words<T>::num_chunks(head_dim) : 0;
  const auto score = [&](auto known) {
    constexpr int n = decltype(known)::value;
    if constexpr (kQuantized<T>) {
      score_exact_row<T, n>(tile, fetch, query, num_keys, head_dim, scores);
    } else {
      score_row<T, n>(tile, fetch, query, num_keys, head_dim, scores);
    }
  };
  switch (chunks) {
    case 2:
      return score(std::integral_constant<int, 2>());
    case 4:
      return score(std::integral_constant<int, 4>());
    case 8:
      return score(std::integral_constant<int, 8>());
    default:
      return score(std::integral_constant<int, 0>());
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
    fetch.step(kScoreShares<T>);
    Vec chains[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {  // exact sums are one chain
        chains[r][v] = kQuantized<T> ? totals[r][v] : splat(0.0f);
      }
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
      for (int v = 0; v < kVecs; ++v) {
        totals[r][v] = kQuantized<T> ? chains[r][v] : totals[r][v] + chains[r][v];
      }
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
    const V* row = groups[first / kGroup] + column / kPacked<V>;
    const int end = first + kGroup < num_keys ? first + kGroup : num_keys;
    for (int key = first; key < end; ++key, row += row_stride) {
      if constexpr (kFetch) fetch.step(kValueShares);
      Vec values[kVecs];
      if constexpr (kPacked<V> == 2) {
        for (int j = 0; j < kVecs; j += 2) {
          load_values(row + j * kLanes / 2, values[j], values[j + 1]);
        }
      } else {
        for (int j = 0; j < kVecs; ++j) values[j] = load(row + j * kLanes);
      }
      for (Vec& value : values) value = hold(value);
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = splat(weights[r * kTile + key]);
        for (int j = 0; j < kVecs; ++j) sums[r][j] = fma(weight, values[j], sums[r][j]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kPacked<V> == 2) {
      for (int j = 0; j < kVecs; j += 2) interleave(sums[r][j], sums[r][j + 1]);
    }
    for (int j = 0; j < kVecs; ++j) {
      float* to = out + r * out_stride + column + j * kLanes;
      store(to, load(to) + sums[r][j]);
    }
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
