// The scores of attention: a tile's keys times queries.
#pragma once

#include <type_traits>

#include "cpu/attention/tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// Past the last key, the last one's again; a quantised group's rows are there to be read.
template <typename T>
inline typename Qk<T>::Row key_row(const Tile<T>& tile, int key) {
  if (!kQuantized<T> && key >= tile.num_keys) key = tile.num_keys - 1;
  return Qk<T>::key_row(tile.keys[key / kGroup], key % kGroup, tile.row_stride);
}

// ---- one row against keys as they lie --------------------------------------------------------

// The scores of kLanes keys from `first` on; kWhole: none of them is past the last.
template <bool kWhole, typename T, typename Dot>
inline void score_keys(const Tile<T>& tile, int first, Fetch& fetch, float* scores,
                       const Dot& dot) {
  const T* group = tile.keys[first / kGroup];
  Vec lanes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    fetch.step(kLanes / 4);
    Vec keys[kLanes / 4];
    for (int q = 0; q < kLanes / 4; ++q) {
      const int key = 4 * q + i;
      keys[q] = dot(kWhole ? Qk<T>::key_row(group, first % kGroup + key, tile.row_stride)
                           : key_row(tile, first + key));
    }
    lanes[i] = sum_quads(keys, Qk<T>::add);
  }
  store(scores, sum_lanes(lanes[0], lanes[1], lanes[2], lanes[3], Qk<T>::add));
}

// kChunks: num_chunks where known, for the query to stay in registers, or 0.
template <typename T, int kChunks>
void score_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
               int64_t head_dim, float* scores) {
  const int64_t chunks = kChunks ? kChunks : Qk<T>::num_chunks(head_dim);
  const auto dot = [&](const auto& row) {
    Vec chains = splat(0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      const Vec words =
          kChunks ? Qk<T>::load_whole_chunk(row, c) : Qk<T>::load_chunk(row, c, head_dim);
      chains = Qk<T>::multiply_add(load(query + c * kLanes), words, chains);
    }
    return chains;
  };
  for (int first = 0; first < num_keys; first += kLanes) {
    if (kQuantized<T> || first + kLanes <= tile.num_keys) {
      score_keys<true>(tile, first, fetch, scores + first, dot);
    } else {
      score_keys<false>(tile, first, fetch, scores + first, dot);
    }
  }
}

template <typename T>
void score_row(const Tile<T>& tile, Fetch& fetch, const float* query, int num_keys,
               int64_t head_dim, float* scores) {
  const int64_t chunks = Qk<T>::has_whole_chunks(head_dim) ? Qk<T>::num_chunks(head_dim) : 0;
  const auto score = [&](auto known) {
    constexpr int n = decltype(known)::value;
    score_row<T, n>(tile, fetch, query, num_keys, head_dim, scores);
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

// ---- many rows ---------------------------------------------------------------------------------

constexpr int kQueryGroups = 3;  // that share a load of a key's words

// How queries lie: kLanes / spread rows a group, of each `spread` words in a vector's lanes. For
// one row against keys as they lie, spread is kLanes; many rows take 4 or 1.
struct QueryLayout {
  int64_t chunks;
  int spread;

  int rows() const { return kLanes / spread; }  // of a group
  int64_t group_floats() const { return rows() * chunks * kLanes; }
  int64_t floats(int64_t num_rows) const { return ceil_div(num_rows, rows()) * group_floats(); }
  // The first word of a group's vector number `chain` of each chunk. Two neighbours are added
  // first, then two sums of two, and so on: the tree of sum_quads, then of sum_lanes.
  static constexpr int chain_word(int spread, int chain) {
    const int lane = chain / (kLanes / 4);
    return spread == 1 ? chain % (kLanes / 4) * 4 + lane % 2 * 2 + lane / 2 : spread * chain;
  }
  void lay(int64_t row, const float* words, float* groups) const {
    float* to = groups + row / rows() * group_floats() + row % rows() * spread;
    for (int chain = 0; chain < kLanes / spread; ++chain) {
      for (int64_t c = 0; c < chunks; ++c, to += kLanes) {
        std::memcpy(to, words + c * kLanes + chain_word(spread, chain), spread * sizeof(float));
      }
    }
  }
  // The same for `count` rows of one group, where spread is 1; their words lie `stride` apart.
  void lay_group(int64_t row, int64_t count, const float* words, int64_t stride,
                 float* groups) const {
    float* to = groups + row / kLanes * group_floats();
    for (int64_t c = 0; c < chunks; ++c) {
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        lanes[i] = i < count ? load(words + i * stride + c * kLanes) : splat(0.0f);
      }
      transpose(lanes);
      for (int chain = 0; chain < kLanes; ++chain) {
        store(to + (chain * chunks + c) * kLanes, lanes[chain_word(1, chain)]);
      }
    }
  }
};

// kLanes keys against kGroups groups of rows: totals[g][k] are of key k.
template <typename T, int kChunks, int kSpread, int kGroups, typename Key>
inline void score_groups(const float* queries, const Key* keys, int64_t num_chunks, Fetch& fetch,
                         Vec (&totals)[kGroups][kLanes]) {
  constexpr int kKeys = (kLanes == 16 && kQuantized<T> ? 4 : 2) * (kGroups == 1 ? 2 : 1);
  constexpr int kPerWord = std::is_same_v<Key, int8_t> ? 2 : 1;
  constexpr int kChains = kLanes / kSpread;
  const int64_t chunks = kChunks ? kChunks : num_chunks, stride = chunks * kLanes * kPerWord;
  const int64_t group_floats = kChains * chunks * kLanes;
  for (int first = 0; first < kLanes; first += kKeys, keys += kKeys * stride) {
    Vec chains[2][kGroups][kKeys], sums[4][kGroups][kKeys];
    Vec zero = splat(0.0f);
    const auto clear_chains = [&](Vec(&to)[kGroups][kKeys]) {
      for (auto& group : to) {
        for (Vec& chain : group) chain = zero;
      }
    };
    const auto multiply = [&](int i, Vec(&to)[kGroups][kKeys]) __attribute__((always_inline)) {
      const Key* words = keys + QueryLayout::chain_word(kSpread, i) * kPerWord;
      for (int64_t c = 0; c < chunks; ++c) {
        Vec query[kGroups];
        for (int g = 0; g < kGroups; ++g) {
          query[g] = hold(load(queries + g * group_floats + (i * chunks + c) * kLanes));
        }
        for (int k = 0; k < kKeys; ++k) {
          const Vec key = hold(spread<kSpread>(words + k * stride + c * kLanes * kPerWord));
          for (int g = 0; g < kGroups; ++g) {
            to[g][k] = Qk<T>::multiply_add(query[g], key, to[g][k]);
          }
        }
      }
    };
    const auto add = [&](const Vec(&from)[kGroups][kKeys], Vec(&to)[kGroups][kKeys]) {
      for (int g = 0; g < kGroups; ++g) {
        for (int k = 0; k < kKeys; ++k) to[g][k] = from[g][k] + to[g][k];
      }
    };
    fetch.step(kGroups * kKeys * kChains);
    if (kQuantized<T>) clear_chains(chains[1]);
#pragma GCC unroll 8
    for (int i = 0; i < kChains; i += 2) {
      if (kQuantized<T>) {  // exact sums are one chain
        multiply(i, chains[1]);
        multiply(i + 1, chains[1]);
        continue;
      }
      for (auto& chain : chains) clear_chains(chain);
      multiply(i, chains[0]);
      multiply(i + 1, chains[1]);
      add(chains[0], chains[1]);
      int level = 0;
      for (int n = i / 2; n % 2; n /= 2, ++level) add(sums[level], chains[1]);
      for (int g = 0; g < kGroups; ++g) {
        for (int k = 0; k < kKeys; ++k) {
          compute_after(chains[1][g][k], zero);
          sums[level][g][k] = chains[1][g][k];
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int k = 0; k < kKeys; ++k) totals[g][first + k] = chains[1][g][k];
    }
  }
}

// The scores of a group's first num_rows rows.
template <typename T, int kSpread>
inline void store_scores(Vec (&totals)[kLanes], int64_t num_rows, float* scores) {
  if constexpr (kSpread == 1) {
    transpose(totals);
    for (int64_t row = 0; row < num_rows; ++row) store(scores + row * kTile, totals[row]);
    return;
  }
  for (int key = 0; key < kLanes; key += 4) {
    float quads[kLanes];
    store(quads,
          sum_lanes(totals[key], totals[key + 1], totals[key + 2], totals[key + 3], Qk<T>::add));
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(scores + row * kTile + key, quads + row * 4, 4 * sizeof(float));
    }
  }
}

template <typename T, int kChunks, int kSpread, int kGroups, typename Key>
void score_rows(const float* queries, const Key* keys, int64_t chunks, int64_t num_rows,
                Fetch& fetch, float* scores) {
  constexpr int kRows = kLanes / kSpread;
  Vec totals[kGroups][kLanes];
  score_groups<T, kChunks, kSpread>(queries, keys, chunks, fetch, totals);
  for (int g = 0; g < kGroups; ++g) {
    store_scores<T, kSpread>(totals[g], smaller(kRows, num_rows - g * kRows),
                             scores + g * kRows * kTile);
  }
}

// kLanes keys from `first` on as words that lie without gaps.
template <typename T, int kChunks>
void convert_keys(const Tile<T>& tile, int first, int64_t head_dim, float* words) {
  const int64_t chunks = kChunks ? kChunks : Qk<T>::num_chunks(head_dim);
  for (int i = 0; i < kLanes; ++i) {
    const auto row = key_row(tile, first + i);
    for (int64_t c = 0; c < chunks; ++c, words += kLanes) {
      store(words, kChunks ? Qk<T>::load_whole_chunk(row, c) : Qk<T>::load_chunk(row, c, head_dim));
    }
  }
}

// Calls body(the words of kLanes keys from `first` on, kChunks): as they lie where nothing but they
// lies there, or converted to `words`.
template <int kSpread, int kChunks, typename T, typename Body>
inline void with_spread_keys(const Tile<T>& tile, int first, int64_t head_dim, float* words,
                             const Body& body) {
  using Key = typename SpreadFrom<T, kSpread>::Type;
  if constexpr (!std::is_void_v<Key> && kChunks > 0) {
    if (tile.key_bytes > 0) {
      const T* row = tile.keys[first / kGroup] + first % kGroup * tile.row_stride;
      return body(reinterpret_cast<const Key*>(row), std::integral_constant<int, kChunks>());
    }
  }
  convert_keys<T, kChunks>(tile, first, head_dim, words);
  body(words, std::integral_constant<int, kChunks>());
}

// The number of chunks is known for these two head_dims.
template <int kSpread, typename T, typename Body>
inline void with_spread_keys(const Tile<T>& tile, int first, int64_t head_dim, float* words,
                             const Body& body) {
  constexpr int k64 = Qk<T>::num_chunks(64), k128 = Qk<T>::num_chunks(128);
  if (head_dim == 64) return with_spread_keys<kSpread, k64>(tile, first, head_dim, words, body);
  if (head_dim == 128) return with_spread_keys<kSpread, k128>(tile, first, head_dim, words, body);
  with_spread_keys<kSpread, 0>(tile, first, head_dim, words, body);
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
