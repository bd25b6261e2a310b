// The values of attention: a tile's, weighted and added to the states of rows.
#pragma once

#include "cpu/attention/work.h"

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

// What a step multiplies: the values of one key with its weight.
template <typename V>
struct ValueStep {
  static constexpr int kKeys = 1, kRows = 1;  // of a step; rows of V that hold them
  static Vec multiply_add(Vec weight, Vec value, Vec sum) { return fma(weight, value, sum); }
  template <int kVecs>
  static void load(const V* row, int64_t, Vec (&values)[kVecs]) {
    if constexpr (kPairs<kVecs>) {
      for (int j = 0; j < kVecs; j += 2) {
        load_values(row + j * kLanes / kPacked<V>, values[j], values[j + 1]);
      }
    } else {
      for (int j = 0; j < kVecs; ++j) values[j] = CLRT_ISA::load(row + j * kLanes);
    }
  }
  template <int kVecs>
  static void order(Vec (&sums)[kVecs]) {
    if constexpr (kPairs<kVecs>) {
      for (int j = 0; j < kVecs; j += 2) interleave(sums[j], sums[j + 1]);
    }
  }

 private:
  template <int kVecs>
  static constexpr bool kPairs = kLoadsPairs<V> && kVecs % 2 == 0;
};

#if defined(__AVX512BF16__)
// Two keys with their weights. Two vectors hold 32 columns of both: 0 to 3 of 8, and 4 to 7.
struct PairStep {
  static constexpr int kKeys = 2;
  static Vec multiply_add(Vec weight, Vec value, Vec sum) {
    return dot_bf16_pairs(weight, value, sum);
  }
  static void pair(__m512i first, __m512i second, Vec& low, Vec& high) {
    low = from_bits(_mm512_unpacklo_epi16(first, second));
    high = from_bits(_mm512_unpackhi_epi16(first, second));
  }
  template <int kVecs>
  static void order(Vec (&sums)[kVecs]) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
    for (int j = 0; j < kVecs; j += 2) {
      const __m512i a = to_bits(sums[j]), b = to_bits(sums[j + 1]);
      sums[j] = from_bits(_mm512_permutex2var_epi64(a, low, b));
      sums[j + 1] = from_bits(_mm512_permutex2var_epi64(a, high, b));
    }
  }
};
// As they lie.
template <>
struct ValueStep<bf16> : PairStep {
  static constexpr int kRows = 2;
  template <int kVecs>
  static void load(const bf16* row, int64_t row_stride, Vec (&values)[kVecs]) {
    for (int j = 0; j < kVecs; j += 2) {
      pair(_mm512_loadu_si512(row + j * kLanes), _mm512_loadu_si512(row + row_stride + j * kLanes),
           values[j], values[j + 1]);
    }
  }
  template <int kVecs>
  static void load_first(const bf16* row, int64_t, Vec (&values)[kVecs]) {
    for (int j = 0; j < kVecs; j += 2) {
      pair(_mm512_loadu_si512(row + j * kLanes), _mm512_setzero_si512(), values[j], values[j + 1]);
    }
  }
};
// Paired by convert_values.
struct ValuePair {
  bf16 first, second;
};
template <>
struct ValueStep<ValuePair> : PairStep {
  static constexpr int kRows = 1;
  template <int kVecs>
  static void load(const ValuePair* row, int64_t, Vec (&values)[kVecs]) {
    for (int j = 0; j < kVecs; ++j) {
      values[j] = CLRT_ISA::load(reinterpret_cast<const float*>(row) + j * kLanes);
    }
  }
  template <int kVecs>
  static void load_first(const ValuePair* row, int64_t row_stride, Vec (&values)[kVecs]) {
    load(row, row_stride, values);
    for (Vec& value : values) value = and_bits(value, splat_int32(0xffff));
  }
};

// The tile's values in pairs, rows of them `padded_dim` apart and zero past head_dim.
inline void convert_values(const Tile<bf16>& tile, int64_t head_dim, int64_t padded_dim,
                           ValuePair* pairs) {
  const auto load = [&](int key, int64_t d) {
    if (key >= tile.num_keys) return _mm512_setzero_si512();
    const bf16* row = tile.values[key / kGroup] + key % kGroup * tile.row_stride + d;
    const int64_t left = head_dim - d;
    return left >= 2 * kLanes ? _mm512_loadu_si512(row)
                              : _mm512_maskz_loadu_epi16((1u << left) - 1, row);
  };
  float* to = reinterpret_cast<float*>(pairs);
  for (int key = 0; key < tile.num_keys; key += 2, to += padded_dim) {
    for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
      Vec low, high;
      PairStep::pair(load(key, d), load(key + 1, d), low, high);
      store(to + d, low);
      store(to + d + kLanes, high);
    }
  }
}
#endif

// What many rows share a tile's values in.
#if defined(__AVX512BF16__)
template <typename T>
using Converted = std::conditional_t<std::is_same_v<T, bf16>, ValuePair, float>;
#else
template <typename T>
using Converted = float;
#endif

// Vectors of values that are loaded at once.
template <typename V>
constexpr int kLeastVecs = ValueStep<V>::kKeys * int(kPacked<V>);

// Adds to rows from `row` on. The sum over the tile is made apart and added once: shorter chains
// round less. Rows that see more keys than the first, on the diagonal, go through these alone.
template <typename V, int kRows, int kVecs, bool kFetch>
inline void add_values_panel(const float* weights, const V* const* groups, int64_t row_stride,
                             Fetch& fetch, const VisibleKeys& visible, int64_t row, int64_t column,
                             float* out, int64_t out_stride) {
  using Step = ValueStep<V>;
  constexpr int kGroupSteps = kGroup / Step::kKeys;
  const auto at = [&](int step) {
    return groups[step / kGroupSteps] + step % kGroupSteps * Step::kRows * row_stride +
           column / kPacked<V>;
  };
  Vec sums[kRows][kVecs];
  for (auto& row_sums : sums) {
    for (Vec& sum : row_sums) sum = splat(0.0f);
  }
  const auto add = [&](int r, int step, const Vec(&values)[kVecs]) __attribute__((always_inline)) {
    const Vec weight = spread<1>(weights + r * kTile + step);
    for (int j = 0; j < kVecs; ++j) {
      sums[r][j] = Step::multiply_add(weight, values[j], sums[r][j]);
    }
  };
  const int common = visible(row) / Step::kKeys;
  for (int first = 0; first < common; first += kGroupSteps) {
    const V* values_row = at(first);
    const int end = first + kGroupSteps < common ? first + kGroupSteps : common;
    for (int step = first; step < end; ++step, values_row += Step::kRows * row_stride) {
      if constexpr (kFetch) fetch.step(Step::kKeys);
      Vec values[kVecs];
      Step::load(values_row, row_stride, values);
      for (Vec& value : values) value = hold(value);
      for (int r = 0; r < kRows; ++r) add(r, step, values);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int num_keys = visible(row + r);
    if (num_keys == 0) continue;
    for (int step = common; step * Step::kKeys < num_keys; ++step) {
      Vec values[kVecs];
      if constexpr (Step::kKeys == 2) {
        if (step == num_keys / 2) {  // the last: its second key is not seen, or not there
          Step::load_first(at(step), row_stride, values);
          add(r, step, values);
          break;
        }
      }
      Step::load(at(step), row_stride, values);
      add(r, step, values);
    }
    Step::order(sums[r]);
    for (int j = 0; j < kVecs; ++j) {
      float* to = out + r * out_stride + column + j * kLanes;
      store(to, load(to) + sums[r][j]);
    }
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
