// The softmax of attention: scores of a tile into weights, and the state of a row that they go into.
#pragma once

#include "attention_tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The state of a query row over the keys of one split, and over the splits so far:
// [0, width) the weighted sum of values, then kGroup floats that add up to the sum of weights, then
// the greatest score. Scores are in units of log2. Over an int4 cache the last kGroup columns of
// the width add up to the weighted sum of the values' middles.
struct RowState {
  float* out;
  int64_t width;
  float* middles() const { return out + width - kGroup; }
  float* weights() const { return out + width; }
  float& top() const { return out[width + kGroup]; }
};
constexpr int64_t row_state_floats(int64_t width) { return width + 2 * kGroup; }

inline void clear(RowState state) {
  for (int64_t i = 0; i < state.width + kGroup; i += kLanes) store(state.out + i, splat(0.0f));
  state.top() = -INFINITY;
}

// What a quantised tile's scores, in int32, and weights are multiplied by: kLanes keys from `key`.
template <typename T>
struct Scales {
  static Vec score(const Tile<T>&, int, Vec total, float) { return total; }
  static Vec weight(const Tile<T>&, int, Vec weight) { return weight; }
};
template <>
struct Scales<int8_t> {
  static Vec scales(const int8_t* group, int64_t row, int key) {
    return load(reinterpret_cast<const float*>(group + kGroup * row) + key % kGroup);
  }
  static Vec score(const Tile<int8_t>& tile, int key, Vec total, float) {
    return int32_to_float(total) * scales(tile.keys[key / kGroup], tile.row_stride, key);
  }
  static Vec weight(const Tile<int8_t>& tile, int key, Vec weight) {
    return weight * scales(tile.values[key / kGroup], tile.row_stride, key);
  }
};
template <>
struct Scales<Nibbles> {
  static constexpr float kMiddle = 16.0f;  // of a key's values, about which sums cancel least
  static const f16* scales(const Nibbles* group, int64_t row_bytes, int key) {
    return reinterpret_cast<const f16*>(group + kGroup * row_bytes) + key % kGroup;
  }
  static Vec score(const Tile<Nibbles>& tile, int key, Vec total, float query_sum) {
    const int64_t row_bytes = tile.row_stride + tile.row_stride / 4;
    const f16* scale = scales(tile.keys[key / kGroup], row_bytes, key);
    const Vec about = int32_to_float(add_int32(total, splat_int32(int32_t(-kMiddle * query_sum))));
    const Vec middle = fma(load(scale), splat(kMiddle), load(scale + kGroup));
    return fma(about, load(scale), middle * splat(query_sum));
  }
  static Vec weight(const Tile<Nibbles>& tile, int key, Vec weight) {
    return weight * load(scales(tile.values[key / kGroup], tile.row_stride, key));
  }
  // Of what is taken off values when they are loaded.
  static Vec middle(const Tile<Nibbles>& tile, int key, Vec weight) {
    const f16* scale = scales(tile.values[key / kGroup], tile.row_stride, key);
    return weight * fma(load(scale), splat(kValueMiddle), load(scale + kGroup));
  }
};

// Turns the row's scores into weights 2^(scale * score - top), times the values' scales; lanes past
// num_keys are never read as numbers, whatever they hold.
template <typename T>
__attribute__((noinline)) void soften(const Tile<T>& tile, float* scores, int num_keys,
                                      QueryScale query, float scale, RowState state) {
  constexpr int kVecs = kTile / kLanes;
  const Vec factor = splat(scale * query.scale);
  Vec x[kVecs], greatest = splat(-INFINITY);
  for (int j = 0; j < kVecs; ++j) {
    x[j] = load(scores + j * kLanes);
    x[j] = Scales<T>::score(tile, j * kLanes, x[j], query.sum) * factor;
    if (num_keys < kTile) x[j] = select_first(num_keys - j * kLanes, x[j], splat(-INFINITY));
    greatest = max(x[j], greatest);
  }
  if (const float top = max_lane(greatest); top > state.top()) {
    const Vec shrink = exp2_nonpositive(splat(state.top() - top));
    for (int64_t i = 0; i < state.width + kGroup; i += kLanes) {
      store(state.out + i, load(state.out + i) * shrink);
    }
    state.top() = top;
  }
  Vec sums[kVecs];
  for (int j = 0; j < kVecs; ++j) {
    sums[j] = exp2_nonpositive(x[j] - splat(state.top()));
    store(scores + j * kLanes, Scales<T>::weight(tile, j * kLanes, sums[j]));
  }
  constexpr int kStep = kGroup / kLanes;
  const auto add_up = [&](const Vec* parts, float* to) {
    for (int i = 0; i < kStep; ++i) {
      const Vec pairs =
          (parts[i] + parts[kStep + i]) + (parts[2 * kStep + i] + parts[3 * kStep + i]);
      store(to + i * kLanes, load(to + i * kLanes) + pairs);
    }
  };
  add_up(sums, state.weights());
  if constexpr (std::is_same_v<T, Nibbles>) {
    for (int j = 0; j < kVecs; ++j) {
      sums[j] = Scales<T>::middle(tile, j * kLanes, sums[j]);
      if (num_keys < kTile) sums[j] = select_first(num_keys - j * kLanes, sums[j], splat(0.0f));
    }
    add_up(sums, state.middles());
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
