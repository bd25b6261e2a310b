// The softmax of attention: scores of a tile into weights, and the state of a row that they go
// into.
#pragma once

#include "cpu/attention/tile.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The state of a query row over the keys of one split, and over the splits so far:
// [0, width) the weighted sum of values, then kGroup floats that add up to the sum of weights, then
// the greatest score. Scores are in units of log2. Of the width the last kGroup columns add up,
// over an int4 cache, to the weighted sum of the values' zero points, and over a bfloat16 one,
// where pairs are multiplied, to the sum of the weights as rounded: dividing by these, a row
// remains a mean of values, and a weight near 1 loses nothing by its rounding.
struct RowState {
  float* out;
  int64_t width;
  float* zero_points() const { return out + width - kGroup; }
  float* rounded_weights() const { return out + width - kGroup; }
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

// Stores the weights of a row as add_values takes them: times the values' scales.
template <typename T>
inline void store_weights(const Scales<T>& scales, Vec (&weights)[kTile / kLanes], float* to,
                          RowState) {
  for (int j = 0; j < kTile / kLanes; ++j) {
    store(to + j * kLanes, scales.weight(j * kLanes, weights[j]));
  }
}

#if defined(__AVX512BF16__)
// Over bfloat16 values, which VDPBF16PS multiplies: rounded to bfloat16, those of two keys side by
// side.
inline void store_weights(const Scales<bf16>&, Vec (&weights)[kTile / kLanes], float* to,
                          RowState state) {
  Vec sum = load(state.rounded_weights());
  for (int j = 0; j < kTile / kLanes; j += 2, to += kLanes) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(weights[j + 1].v, weights[j].v);
    const Vec pairs = {reinterpret_cast<__m512>(rounded)};
    store(to, pairs);
    sum = dot_bf16_pairs(pairs, splat_int32(0x3f803f80), sum);  // times ones
  }
  store(state.rounded_weights(), sum);
}
#endif

template <typename T>
inline void add_weights(const Scales<T>& scales, int num_keys, Vec (&weights)[kTile / kLanes],
                        RowState state) {
  constexpr int kVecs = kTile / kLanes, kStep = kGroup / kLanes;
  const auto add_up = [&](float* to) {
    for (int i = 0; i < kStep; ++i) {
      const Vec pairs =
          (weights[i] + weights[kStep + i]) + (weights[2 * kStep + i] + weights[3 * kStep + i]);
      store(to + i * kLanes, load(to + i * kLanes) + pairs);
    }
  };
  add_up(state.weights());
  if constexpr (std::is_same_v<T, Nibbles>) {
    for (int j = 0; j < kVecs; ++j) {
      weights[j] = scales.zero_point(j * kLanes, weights[j]);
      if (num_keys < kTile) {
        weights[j] = select_first(num_keys - j * kLanes, weights[j], splat(0.0f));
      }
    }
    add_up(state.zero_points());
  }
}

// Rows whose chains of dependent steps, a maximum across lanes and a power, run side by side.
constexpr int kSoftmaxRows = kLanes == 16 ? 2 : 1;

// Turns scores of neighbouring rows into weights 2^(scale * score - top), times the values' scales.
// `visible` says how many keys each row from `row` on sees: at least one. Lanes past these are
// never read as numbers, whatever they hold.
template <typename T, int kRows, typename Visible>
__attribute__((noinline)) void softmax(const Scales<T>& scales, const Visible& visible, int64_t row,
                                       const QueryScale* queries, float scale, float* scores,
                                       RowState first, int64_t state_floats) {
  constexpr int kVecs = kTile / kLanes;
  Vec x[kRows][kVecs], greatest[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int num_keys = visible(row + r);
    const Vec factor = splat(scale * queries[r].scale);
    greatest[r] = splat(-INFINITY);
    for (int j = 0; j < kVecs; ++j) {
      const Vec score = load(scores + r * kTile + j * kLanes);
      x[r][j] = scales.score(j * kLanes, score, queries[r].sum) * factor;
      if (num_keys < kTile) {
        x[r][j] = select_first(num_keys - j * kLanes, x[r][j], splat(-INFINITY));
      }
      greatest[r] = max(x[r][j], greatest[r]);
    }
  }
  RowState states[kRows];
  float tops[kRows];
  for (int r = 0; r < kRows; ++r) {
    states[r] = {first.out + r * state_floats, first.width};
    tops[r] = max_lane(greatest[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    if (tops[r] > states[r].top()) {
      const Vec shrink = exp2_nonpositive(splat(states[r].top() - tops[r]));
      for (int64_t i = 0; i < first.width + kGroup; i += kLanes) {
        store(states[r].out + i, load(states[r].out + i) * shrink);
      }
      states[r].top() = tops[r];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Vec top = splat(states[r].top());
    for (int j = 0; j < kVecs; ++j) x[r][j] = exp2_nonpositive(x[r][j] - top);
  }
  for (int r = 0; r < kRows; ++r) {
    store_weights(scales, x[r], scores + r * kTile, states[r]);
    add_weights(scales, visible(row + r), x[r], states[r]);
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
