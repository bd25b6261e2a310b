// The softmax of attention: scores of a tile into weights, and the state of a row that they go
// into.
#pragma once

#include "cpu/attention/tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The state of a query row over the keys of one split, and over the splits so far:
// [0, width) the weighted sum of values, then kGroup floats that add up to the sum of weights, then
// the greatest score. Scores are in units of log2. Over an int4 cache the last kGroup columns of
// the width add up to the weighted sum of the values' zero points.
struct RowState {
  float* out;
  int64_t width;
  float* zero_points() const { return out + width - kGroup; }
  float* weights() const { return out + width; }
  float& top() const { return out[width + kGroup]; }
};
constexpr int64_t row_state_floats(int64_t width) { return width + 2 * kGroup; }

inline void clear(RowState state) {
  for (int64_t i = 0; i < state.width + kGroup; i += kLanes) store(state.out + i, splat(0.0f));
  state.top() = -INFINITY;
}

// What a quantised tile's scores, in int32, and its weights are multiplied by; made once a tile.
template <typename T>
struct Scales {
  explicit Scales(const Tile<T>&) {}
  Vec score(int, Vec total, float) const { return total; }
  Vec weight(int, Vec weight) const { return weight; }
};

template <>
class Scales<int8_t> {
 public:
  explicit Scales(const Tile<int8_t>& tile) : tile_(tile) {}
  Vec score(int key, Vec total, float query_sum) const {
    if (kByteDots) {  // of keys plus 128; modulo 2^32, as all integer sums
      total = add_int32(total, splat_int32(int32_t(uint32_t(int32_t(query_sum)) * -128u)));
    }
    return int32_to_float(total) * load(key_scales(key));
  }
  Vec weight(int key, Vec weight) const { return weight * value_scale(key); }
  Vec value_scale(int key) const { return load(value_scales(key)); }
  const float* key_scales(int key) const { return scales(tile_.keys[key / kGroup], key); }
  const float* value_scales(int key) const { return scales(tile_.values[key / kGroup], key); }

 private:
  const float* scales(const int8_t* group, int key) const {
    return reinterpret_cast<const float*>(group + kGroup * tile_.row_stride) + key % kGroup;
  }

  const Tile<int8_t>& tile_;
};

// Values are taken less a zero point, about which their sums cancel least; that of the tile's
// values is kValueZeroPoint.
template <>
class Scales<Nibbles> {
 public:
  explicit Scales(const Tile<Nibbles>& tile) {
    const int64_t row_bytes = tile.row_stride;
    for (int key = 0; key < kTile; key += kLanes) {
      const int g = key / kGroup;
      take(tile.keys[g] + kGroup * (row_bytes + row_bytes / 4), key, kKeyZeroPoint, key_);
      take(tile.values[g] + kGroup * row_bytes, key, kValueZeroPoint, value_);
    }
  }
  Vec score(int key, Vec total, float query_sum) const {
    const Vec about = add_int32(total, splat_int32(int32_t(-kKeyZeroPoint * query_sum)));
    return fma(int32_to_float(about), load(key_[0] + key), load(key_[1] + key) * splat(query_sum));
  }
  Vec weight(int key, Vec weight) const { return weight * value_scale(key); }
  Vec value_scale(int key) const { return load(value_scales(key)); }
  Vec zero_point(int key, Vec weight) const { return weight * load(value_minima(key)); }
  const float* key_scales(int key) const { return key_[0] + key; }
  const float* key_minima(int key) const { return key_[1] + key; }
  const float* value_scales(int key) const { return value_[0] + key; }
  const float* value_minima(int key) const { return value_[1] + key; }

 private:
  static constexpr float kKeyZeroPoint = 16.0f;
  using Table = float[2][kTile];  // scales; what the zero point stands for

  static void take(const Nibbles* scales, int key, float zero_point, Table& to) {
    const f16* scale = reinterpret_cast<const f16*>(scales) + key % kGroup;
    store(to[0] + key, load(scale));
    store(to[1] + key, fma(load(scale), splat(zero_point), load(scale + kGroup)));
  }

  Table key_, value_;
};

// Turns the row's scores into weights 2^(scale * score - top), times the values' scales; lanes past
// num_keys are never read as numbers, whatever they hold.
template <typename T>
__attribute__((noinline)) void softmax(const Scales<T>& scales, float* scores, int num_keys,
                                       QueryScale query, float scale, RowState state) {
  constexpr int kVecs = kTile / kLanes;
  const Vec factor = splat(scale * query.scale);
  Vec x[kVecs], greatest = splat(-INFINITY);
  for (int j = 0; j < kVecs; ++j) {
    x[j] = load(scores + j * kLanes);
    x[j] = scales.score(j * kLanes, x[j], query.sum) * factor;
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
    store(scores + j * kLanes, scales.weight(j * kLanes, sums[j]));
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
      sums[j] = scales.zero_point(j * kLanes, sums[j]);
      if (num_keys < kTile) sums[j] = select_first(num_keys - j * kLanes, sums[j], splat(0.0f));
    }
    add_up(sums, state.zero_points());
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
