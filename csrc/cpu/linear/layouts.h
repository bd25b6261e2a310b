// Layouts of quantised weights: where the values and scales of 16 rows of a group lie.
//
// A group of a tile is kGroup / 4 vectors of 16 rows x 4 unsigned bytes (or nibbles), then scales:
// what the integer dot product takes. Own formats lie in memory like this and are read in place, as
// are GGUF's in tiles (tiles.h); `Unpacked` is what rows of GGUF's blocks become. An element is
// (value - kBias) * scale + minimum.
#pragma once

#include <type_traits>

#include "cpu/linear/int_dot.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

inline float bf16_at(const uint8_t* p) {
  bf16 x;
  std::memcpy(&x, p, 2);
  return to_float(x);
}

struct Int8Layout {
  static constexpr int kGroup = int(kInt8Group);  // elements along k
  static constexpr int kShared = 1;               // groups whose activations have one scale
  static constexpr bool kRotated = true;          // activations as well: see quantized.h
  static constexpr int kValuesBytes = kGroup * int(kWeightTile);
  static constexpr int64_t kHeadBytes = 0;  // of a tile, before its groups
  static constexpr int64_t kBytes = kValuesBytes + 2 * kWeightTile;
  static constexpr int kHalves = 1;  // scales along k
  static constexpr bool kHasMinimum = false;
  static constexpr int kBias = 128;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return load_bytes(group + quad * kStepBytes + part * kPartBytes);
  }
  static inline Vec scales(const uint8_t*, const uint8_t* group, int, int part) {
    return load(reinterpret_cast<const bf16*>(group + kValuesBytes) + part * kLanes);
  }
  static inline Vec minima(const uint8_t*, const uint8_t*, int) { return splat(0.0f); }
  // Of one row: element i, its scale.
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return group[i / 4 * kStepBytes + row * 4 + i % 4];
  }
  static inline float scale(const uint8_t*, const uint8_t* group, int, int row) {
    return bf16_at(group + kValuesBytes + 2 * row);
  }
  static inline float minimum(const uint8_t*, const uint8_t*, int) { return 0.0f; }
};

// Before a tile's groups: a float32 a row, the unit of its steps, then one of its minima. After
// the nibbles of a group: a byte a row, its step in those units, then its minimum.
struct Int4Layout {
  static constexpr int kGroup = int(kWeightGroup);
  static constexpr int kShared = 2;  // 1 takes 5 % more time; 4 costs 0.6 % of perplexity
  static constexpr bool kRotated = false;
  static constexpr int64_t kHeadBytes = 2 * 4 * kWeightTile;
  static constexpr int64_t kCodes = kGroup * kWeightTile / 2;
  static constexpr int64_t kBytes = kCodes + 2 * kWeightTile;
  static constexpr int kHalves = 1;
  static constexpr bool kHasMinimum = true;
  static constexpr int kBias = 0;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    constexpr int kPairs = kGroup / 8;  // step q in the low nibbles, q + 4 in the high ones
    const Bytes both = load_bytes(group + quad % kPairs * kStepBytes + part * kPartBytes);
    return quad < kPairs ? low_nibbles(both) : high_nibbles(both);
  }
  static inline Vec scales(const uint8_t* head, const uint8_t* group, int, int part) {
    return load_codes(group + kCodes + part * kLanes) * load(floats(head) + part * kLanes);
  }
  static inline Vec minima(const uint8_t* head, const uint8_t* group, int part) {
    return load_codes(group + kCodes + kWeightTile + part * kLanes) *
           load(floats(head) + kWeightTile + part * kLanes);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    const uint8_t both = group[i / 4 % (kGroup / 8) * kStepBytes + row * 4 + i % 4];
    return i < kGroup / 2 ? both & 15 : both >> 4;
  }
  static inline float scale(const uint8_t* head, const uint8_t* group, int, int row) {
    return float(group[kCodes + row]) * floats(head)[row];
  }
  static inline float minimum(const uint8_t* head, const uint8_t* group, int row) {
    return float(group[kCodes + kWeightTile + row]) * floats(head)[kWeightTile + row];
  }

 private:
  static inline const float* floats(const uint8_t* head) {
    return reinterpret_cast<const float*>(head);
  }
};

// What GGUF blocks are unpacked into.
template <int kBiasOf, int kHalvesOf, bool kHasMinimumOf, int kGroupOf = int(kWeightGroup),
          int kSharedOf = 1>
struct Unpacked {
  static constexpr int kGroup = kGroupOf;
  static constexpr int kShared = kSharedOf;
  static constexpr bool kRotated = false;
  static constexpr int kValuesBytes = kGroup * int(kWeightTile);
  static constexpr int kHalves = kHalvesOf;
  static constexpr bool kHasMinimum = kHasMinimumOf;
  static constexpr int kBias = kBiasOf;
  static constexpr int64_t kHeadBytes = 0;
  static constexpr int64_t kBytes = kValuesBytes + (kHalves + kHasMinimum) * 4 * kWeightTile;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return load_bytes(group + quad * kStepBytes + part * kPartBytes);
  }
  static inline Vec scales(const uint8_t*, const uint8_t* group, int half, int part) {
    return load(floats(group, half) + part * kLanes);
  }
  static inline Vec minima(const uint8_t*, const uint8_t* group, int part) {
    return load(floats(group, kHalves) + part * kLanes);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return group[i / 4 * kStepBytes + row * 4 + i % 4];
  }
  static inline float scale(const uint8_t*, const uint8_t* group, int half, int row) {
    return floats(group, half)[row];
  }
  static inline float minimum(const uint8_t*, const uint8_t* group, int row) {
    return floats(group, kHalves)[row];
  }
  template <typename Group>  // row of floats after the values: scales of a half, or minima
  static inline auto floats(Group* group, int i) {
    using Float = std::conditional_t<std::is_const_v<Group>, const float, float>;
    return reinterpret_cast<Float*>(group + kValuesBytes) + i * kWeightTile;
  }
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
