// The scores of attention: a tile's keys as they lie, or transposed, times queries.
#pragma once

#include "attention_tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The rows of the kLanes keys from `first` on; past the last key, the last one's again.
template <typename T>
inline void key_rows(const Tile<T>& tile, int first, typename Words<T>::Row (&rows)[kLanes]) {
  const int last = tile.num_keys - 1 - first;
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = Words<T>::key_row(tile.keys[first / kGroup], first % kGroup + (i < last ? i : last),
                                tile.row_stride);
  }
}

#if defined(__AVX512F__)
// Transposes the chunks that are whole; returns how many.
template <typename T>
inline int64_t transpose_whole(const T* const (&keys)[kLanes], int64_t head_dim, float* words) {
  const int64_t chunks = Words<T>::num_chunks(head_dim), count = Words<T>::count(head_dim);
  constexpr bool kSplit = sizeof(T) == 2 && !kPairWords<T>;  // a column holds two words
  constexpr int64_t kStep = kSplit ? 2 : 1;
  const void* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = keys[i];
  int64_t c = 0;
  for (; (c + kStep) * kLanes <= count; c += kStep) {
    Vec columns[kLanes];
    load_columns(rows, c / kStep * 4 * kLanes, columns);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t word = c * kLanes + kStep * i;
      float* to = words + (word % kLanes * chunks + word / kLanes) * kTile;
      if constexpr (kSplit) {
        Vec odd;
        split_pairs<T>(columns[i], odd);
        store(to + chunks * kTile, odd);
      }
      store(to, columns[i]);
    }
  }
  return c;
}
#endif

// words[(j * chunks + c) * kTile + i] = word c * kLanes + j of key i: the words of chain j
// together.
template <typename T>
void transpose_keys(const Tile<T>& tile, Fetch& fetch, int64_t head_dim, float* words) {
  const int64_t chunks = Words<T>::num_chunks(head_dim);
  for (int first = 0; first < tile.num_keys; first += kLanes) {
    typename Words<T>::Row rows[kLanes];
    key_rows(tile, first, rows);
    fetch.step(kTransposeShares);
    int64_t c = 0;
#if defined(__AVX512F__)
    if constexpr (!kQuantized<T>) {
      c = transpose_whole<T>(rows, head_dim, words + first);
    }
#endif
    for (; c < chunks; ++c) {
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = Words<T>::load_chunk(rows[i], c, head_dim);
      transpose(lanes);
      for (int j = 0; j < kLanes; ++j) store(words + (j * chunks + c) * kTile + first, lanes[j]);
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

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
