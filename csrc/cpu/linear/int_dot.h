// Integer dot products for quantised weights: what activations become, and four products a lane.
//
// A lane of `Ints` is a row of the weight. A step multiplies four unsigned bytes a lane with four
// signed values that all lanes share. The sums are exact on every instruction set.
#pragma once

#include <limits>

#include "common/quantized.h"
#include "cpu/linear/rotation.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kParts = int(kWeightTile) / kLanes;  // vectors of rows of a tile
constexpr int kPartBytes = 4 * kLanes;             // of a step of one of them
constexpr int kStepBytes = int(kWeightTile) * 4;   // of a step of a tile

#if defined(__AVX512VNNI__)

struct Ints {
  __m512i v;
};
using Bytes = __m512i;
using Stored = int8_t;  // of an activation
using Quad = __m512i;   // four of them in each lane
inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Quad load_quad(const Stored* x) {
  Quad quad;  // the intrinsic is repeated by GCC for each use
  asm("vpbroadcastd %1, %0" : "=v"(quad) : "m"(*reinterpret_cast<const int32_t*>(x)));
  return quad;
}
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints dot(Bytes w, Quad x, Ints sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w), "v"(x));
  return sum;
}
inline Ints dot_at(Bytes w, const Stored* x, Ints sum) {  // of four that are used once
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum.v)
      : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
  return sum;
}
inline Vec to_vec(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }

#elif defined(__AVX2__)

// VPMADDUBSW saturates: two products of unsigned and signed bytes reach 2 * 255 * 127. So both are
// widened to 16 bits, activations as they are stored: each four in the order 0, 2, 1, 3.
using Stored = int16_t;
#if defined(__AVX512F__)
struct Ints {
  __m512i v;
};
using Bytes = __m512i;
struct Quad {
  __m512i even, odd;
};
inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Quad load_quad(const Stored* x) {
  int32_t pairs[2];
  std::memcpy(pairs, x, 8);
  return {_mm512_set1_epi32(pairs[0]), _mm512_set1_epi32(pairs[1])};
}
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints dot(Bytes w, Quad x, Ints sum) {
  const __m512i even = _mm512_and_si512(w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(w, 8);
  const __m512i products =
      _mm512_add_epi32(_mm512_madd_epi16(even, x.even), _mm512_madd_epi16(odd, x.odd));
  return {_mm512_add_epi32(sum.v, products)};
}
inline Vec to_vec(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
#else
struct Ints {
  __m256i v;
};
using Bytes = __m256i;
struct Quad {
  __m256i even, odd;
};
inline Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Quad load_quad(const Stored* x) {
  int32_t pairs[2];
  std::memcpy(pairs, x, 8);
  return {_mm256_set1_epi32(pairs[0]), _mm256_set1_epi32(pairs[1])};
}
inline Bytes load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints dot(Bytes w, Quad x, Ints sum) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
  const __m256i products =
      _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd));
  return {_mm256_add_epi32(sum.v, products)};
}
inline Vec to_vec(Ints x) { return {_mm256_cvtepi32_ps(x.v)}; }
#endif

#else

struct Ints {
  int32_t v[kLanes];
};
struct Bytes {
  uint8_t v[4 * kLanes];
};
using Stored = int8_t;
using Quad = const int8_t*;
inline Ints splat_int(int32_t x) { return {{x, x, x, x}}; }
inline Quad load_quad(const Stored* x) { return x; }
inline Bytes load_bytes(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(bytes.v, p, sizeof(bytes.v));
  return bytes;
}
inline Bytes low_nibbles(Bytes x) {
  for (uint8_t& byte : x.v) byte &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (uint8_t& byte : x.v) byte = uint8_t(byte >> 4);
  return x;
}
inline Ints operator+(Ints a, Ints b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints dot(Bytes w, Quad x, Ints sum) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) sum.v[i] += w.v[4 * i + j] * x[j];
  }
  return sum;
}
inline Vec to_vec(Ints x) {
  return lanewise([&](int i) { return float(x.v[i]); });
}

#endif

#if !defined(__AVX512VNNI__)
inline Ints dot_at(Bytes w, const Stored* x, Ints sum) { return dot(w, load_quad(x), sum); }
#endif

inline Vec load_codes(const uint8_t* p) {  // bytes as floats
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
#else
  return lanewise([&](int i) { return float(p[i]); });
#endif
}

// ---- activations ---------------------------------------------------------------------------

// A token's group, quantised: x = value * scale, value in [-127, 127].
template <int kGroup>
struct TokenGroup {
  Stored values[kGroup];
  float scale;           // NaN if a NaN or an infinity is among those that share it, 0 if all are 0
  float minimum_factor;  // the sum of the values, times the scale where the group has its own
  int32_t start[2];      // -bias * (sum of the values), of each half or of the whole: weights are
};  // stored as value + bias, and this is where their dot product begins

// Below it 127 / max would overflow: such a group counts as zeros.
constexpr float kSmallestMax = 0x1p-100f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The largest magnitude's bits: more than any finite float's if an element is not finite.
template <int kVecs>
inline uint32_t largest_bits(const Vec (&x)[kVecs]) {
#if defined(__AVX512F__)
  __m512i most = _mm512_setzero_si512();
  for (const Vec& v : x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    most = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(v.v), magnitude), most);
  }
  return _mm512_reduce_max_epu32(most);
#else
  int32_t most = 0;
  for (const Vec& v : x) {
    float lanes[kLanes];
    store(lanes, v);
    for (const float lane : lanes) {
      const int32_t bits = int32_t(float_to_bits(lane) & 0x7fffffff);
      most = bits > most ? bits : most;
    }
  }
  return uint32_t(most);
#endif
}

// Stores x * factor rounded to nearest even; the sums of each half.
template <int kVecs>
inline void put_rounded(const Vec (&x)[kVecs], float factor, Stored* to, int32_t (&sums)[2]) {
#if defined(__AVX512VNNI__)
  for (int i = 0; i < kVecs; ++i) {
    const __m512i rounded = _mm512_cvtps_epi32((x[i] * splat(factor)).v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * kLanes), _mm512_cvtepi32_epi8(rounded));
    sums[2 * i / kVecs] += _mm512_reduce_add_epi32(rounded);
  }
#else
  constexpr int kOrder[] = {0, 2, 1, 3};
  constexpr int kGroup = kVecs * kLanes;
  float lanes[kGroup];
  for (int i = 0; i < kVecs; ++i) store(lanes + i * kLanes, round(x[i] * splat(factor)));
  for (int i = 0; i < kGroup; ++i) {
    const int from = sizeof(Stored) == 1 ? i : i / 4 * 4 + kOrder[i % 4];
    to[i] = Stored(lanes[from]);
    sums[i / (kGroup / 2)] += to[i];
  }
#endif
}

// The first n elements of kShared groups, into groups `stride` apart; elements past n are zero, and
// groups past n are not written.
template <typename Layout, typename X>
inline void quantize_groups(const X* x, int64_t n, TokenGroup<Layout::kGroup>* to, int64_t stride) {
  constexpr int kGroup = Layout::kGroup, kVecs = kGroup / kLanes;
  Vec parts[Layout::kShared][kVecs];
  uint32_t most = 0;
  for (int i = 0; i < Layout::kShared * kVecs; ++i) {
    const int64_t left = n - i * kLanes;
    parts[i / kVecs][i % kVecs] = left >= kLanes ? load(x + i * kLanes)
                                  : left > 0     ? load_first(x + i * kLanes, int(left))
                                                 : splat(0.0f);
  }
  for (Vec(&group)[kVecs] : parts) {
    if constexpr (Layout::kRotated) rotate(group);
    const uint32_t bits = largest_bits(group);
    most = bits > most ? bits : most;
  }
  const float largest = bits_to_float(most);
  const bool is_usable = largest >= kSmallestMax && largest < kInfinity;
  const float scale = is_usable ? largest / 127.0f : largest < kSmallestMax ? 0.0f : kNaN;
  for (int g = 0; g < Layout::kShared && g * kGroup < n; ++g, to += stride) {
    int32_t sums[2] = {};
    if (is_usable) {
      put_rounded(parts[g], 127.0f / largest, to->values, sums);
    } else {
      std::memset(to->values, 0, sizeof(to->values));
    }
    const int32_t sum = sums[0] + sums[1];
    to->scale = scale;
    to->minimum_factor = Layout::kShared == 1 ? scale * float(sum) : float(sum);
    to->start[0] = -Layout::kBias * (Layout::kHalves == 2 ? sums[0] : sum);
    to->start[1] = -Layout::kBias * sums[1];
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
