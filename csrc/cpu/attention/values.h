// The values of attention: a tile's, weighted and added to the states of rows.
#pragma once

#include "cpu/attention/tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

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

// ---- out += weights . values --------------------------------------------------------------

// The sum over the tile is made apart and added once: shorter chains round less.
template <typename V, int kRows, int kVecs, bool kFetch>
inline void add_values_panel(const float* weights, const V* const* groups, int64_t row_stride,
                             Fetch& fetch, int num_keys, int64_t column, float* out,
                             int64_t out_stride) {
  constexpr bool kPairs = kLoadsPairs<V> && kVecs % 2 == 0;
  Vec sums[kRows][kVecs];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = splat(0.0f);
  }
  for (int first = 0; first < num_keys; first += kGroup) {
    const V* row = groups[first / kGroup] + column / kPacked<V>;
    const int end = first + kGroup < num_keys ? first + kGroup : num_keys;
    for (int key = first; key < end; ++key, row += row_stride) {
      if constexpr (kFetch) fetch.step(1);
      Vec values[kVecs];
      if constexpr (kPairs) {
        for (int j = 0; j < kVecs; j += 2) {
          load_values(row + j * kLanes / kPacked<V>, values[j], values[j + 1]);
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
    if constexpr (kPairs) {
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
