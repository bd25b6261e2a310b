// A token's row of a quantised cache: made of its own numbers alone.
//
// int8: value = round(x / scale), scale = max|x| / 127.
// int4, values: value = round((x - minimum) / scale) in 0..15, scale = (max - min) / 15.
// int4, keys: the row is rotated first, and has 5 bits: 0..31, scale = (max - min) / 31. A key's
// outliers recur in the same elements; a rotation that the query takes as well spreads them over
// all (QuaRot, arXiv:2404.00456). csrc/README.md has what each scheme costs in perplexity.
// A row that holds an element that is not finite, or is past float16's range in int4, gets the
// scale NaN and zeros.
#pragma once

#include <limits>

#include "common/quantized.h"
#include "cpu/linear/rotation.h"
#include "cpu/simd/vec_int.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// x (n), which may be `out` itself, in float32, zero up to a multiple of kCacheGroup.
template <typename T>
inline void widen(const T* x, int64_t n, float* out) {
  convert(x, out, n);
  while (n % kCacheGroup != 0) out[n++] = 0.0f;
}

struct Range {
  float least, most;
  bool finite;
  float greatest() const { return most > -least ? most : 0.0f - least; }  // never -0
};

// Of x (n), n a multiple of kCacheGroup.
inline Range range_of(const float* x, int64_t n) {
  Vec least = load(x), most = least, poison = splat(0.0f);
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec v = load(x + d);
    least = min(v, least);
    most = max(v, most);
    poison = fma(v, splat(0.0f), poison);  // NaN from NaN and from infinity
  }
  // -0 and 0 are both 0.
  return {0.0f - max_lane(splat(0.0f) - least), max_lane(most) + 0.0f, sum(poison) == 0.0f};
}

// round((x - minimum) * inverse), held in [0, most].
inline void round_values(const float* x, int64_t n, float minimum, float inverse, float least,
                         float most, int8_t* values) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec scaled = round((load(x + d) - splat(minimum)) * splat(inverse));
    store_int8(values + d, float_to_int32(min(splat(most), max(splat(least), scaled))));
  }
}

// A row with an element that is not finite.
inline constexpr uint32_t kNanBits = 0x7fc00000;
inline constexpr uint16_t kHalfNanBits = 0x7e00;
// A greatest element of less counts as zero: its inverse would be infinite.
inline constexpr float kLeast = 1e-30f;

// x (head_dim, zero up to a multiple of kCacheGroup) into row i of a group; x and `values`, as
// long, are scratch.
inline void quantize_int8(float* x, int8_t* values, int64_t head_dim, char* group, int64_t i) {
  const int64_t padded = (head_dim + kCacheGroup - 1) / kCacheGroup * kCacheGroup;
  const Range range = range_of(x, padded);
  const float greatest = range.greatest();
  const float inverse = greatest > kLeast ? 127.0f / greatest : 0.0f;
  const float scale = range.finite ? greatest / 127.0f : bits_to_float(kNanBits);
  if (range.finite) {
    round_values(x, padded, 0.0f, inverse, -127.0f, 127.0f, values);
  } else {
    std::memset(values, 0, padded);
  }
  std::memcpy(group + i * head_dim, values, head_dim);
  std::memcpy(group + kCacheGroup * head_dim + i * 4, &scale, 4);
}

// Eight bytes' low nibbles side by side.
inline uint32_t join_nibbles(uint64_t bytes) {
  bytes &= 0x0f0f0f0f0f0f0f0f;
  bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ff;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffff;
  return uint32_t(bytes | bytes >> 16);
}

// Bits 4 of bytes 0, 2, 4 and 6 side by side: the product moves each to its place from bit 48 on.
inline int join_fifth_bits(uint64_t bytes) {
  return int((bytes >> 4 & 0x0001000100010001) * 0x0001000200040008 >> 48) & 15;
}

inline void quantize_int4(float* x, int8_t* values, int64_t head_dim, bool key, char* group,
                          int64_t i) {
  const float most = key ? 31.0f : 15.0f;
  if (key) rotate(x, head_dim, kKeyRotation);
  const Range range = range_of(x, head_dim);
  f16 scale = from_float<f16>((range.most - range.least) / most);
  f16 minimum = from_float<f16>(range.least);
  const float step = to_float(scale);
  const bool finite = range.finite && std::isfinite(step) && std::isfinite(to_float(minimum));
  if (finite) {
    const float inverse = step > 0 ? 1.0f / step : 0.0f;
    round_values(x, head_dim, to_float(minimum), inverse, 0.0f, most, values);
  } else {
    scale = minimum = {kHalfNanBits};
    std::memset(values, 0, head_dim);
  }
  char *row = group + i * head_dim / 2, *scales = group + kCacheGroup * head_dim / 2;
  char* planes = scales + i * head_dim / 8;  // of a key's even elements, then of its odd ones
  for (int64_t d = 0; d < head_dim; d += 16) {
    uint64_t halves[2];
    std::memcpy(halves, values + d, 16);
    const uint32_t nibbles[] = {join_nibbles(halves[0]), join_nibbles(halves[1])};
    std::memcpy(row + d / 2, nibbles, 8);
    if (!key) continue;
    for (int odd = 0; odd < 2; ++odd) {
      const auto bits = [&](uint64_t bytes) { return join_fifth_bits(bytes >> (8 * odd)); };
      planes[(odd * head_dim + d) / 16] = char(bits(halves[0]) | bits(halves[1]) << 4);
    }
  }
  if (key) scales += kCacheGroup * head_dim / 8;
  std::memcpy(scales + i * 2, &scale, 2);
  std::memcpy(scales + kCacheGroup * 2 + i * 2, &minimum, 2);
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
