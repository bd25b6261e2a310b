// Integers in the bits of a Vec: what quantised caches are multiplied with.
//
// A word of 32 bits is an int32 or a pair of int16; sums of integers are exact, so that their order
// is free. Bits pass through Vec untouched: shuffles, loads and stores are those of vec.h.
#pragma once

#include "cpu/simd/vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// Two elements of 4 bits, the even one in the low half.
struct Nibbles {
  uint8_t bits;
};

#if defined(__AVX512F__)

inline __m512i to_bits(Vec x) { return _mm512_castps_si512(x.v); }
inline Vec from_bits(__m512i x) { return {_mm512_castsi512_ps(x)}; }
inline Vec splat_int32(int32_t x) { return from_bits(_mm512_set1_epi32(x)); }
inline Vec add_int32(Vec a, Vec b) { return from_bits(_mm512_add_epi32(to_bits(a), to_bits(b))); }
inline Vec and_bits(Vec a, Vec b) { return from_bits(_mm512_and_si512(to_bits(a), to_bits(b))); }
inline Vec shift_right_4(Vec a) { return from_bits(_mm512_srli_epi32(to_bits(a), 4)); }
inline Vec int32_to_float(Vec a) { return {_mm512_cvtepi32_ps(to_bits(a))}; }
inline Vec float_to_int32(Vec a) { return from_bits(_mm512_cvtps_epi32(a.v)); }  // nearest even
// c + the products of the two int16 in each lane of a and b.
inline Vec dot_int16_pairs(Vec a, Vec b, Vec c) {
#if defined(__AVX512VNNI__)
  return from_bits(_mm512_dpwssd_epi32(to_bits(c), to_bits(a), to_bits(b)));
#else
  return add_int32(c, from_bits(_mm512_madd_epi16(to_bits(a), to_bits(b))));
#endif
}
inline __m256i load_half(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline __m128i load_quarter(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
// 2 * kLanes elements as int16.
inline Vec load_pairs(const int8_t* p) { return from_bits(_mm512_cvtepi8_epi16(load_half(p))); }
inline Vec load_pairs(const uint8_t* p) { return from_bits(_mm512_cvtepu8_epi16(load_half(p))); }
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_quarter(p)))};
}
inline Vec load_int32(const uint8_t* p) { return from_bits(_mm512_cvtepu8_epi32(load_quarter(p))); }
inline void store_int8(int8_t* p, Vec a) {  // the low byte of each lane
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(to_bits(a)));
}
// Adds 16 to the int16 whose bit is set.
inline Vec add_16_where(const uint8_t* bits, Vec a) {
  uint32_t mask;
  std::memcpy(&mask, bits, 4);
  return from_bits(_mm512_mask_add_epi16(to_bits(a), mask, to_bits(a), _mm512_set1_epi16(16)));
}
template <int kCount>
inline Vec spread(const int8_t* p) {  // kCount pairs of int16, again and again
  static_assert(kCount == 4);
  int64_t bits;
  std::memcpy(&bits, p, 8);
  return from_bits(_mm512_cvtepi8_epi16(_mm256_set1_epi64x(bits)));
}
inline void interleave(Vec& even, Vec& odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps(even.v, low, odd.v);
  odd.v = _mm512_permutex2var_ps(even.v, high, odd.v);
  even.v = first;
}

#elif defined(__AVX2__)

inline __m256i to_bits(Vec x) { return _mm256_castps_si256(x.v); }
inline Vec from_bits(__m256i x) { return {_mm256_castsi256_ps(x)}; }
inline Vec splat_int32(int32_t x) { return from_bits(_mm256_set1_epi32(x)); }
inline Vec add_int32(Vec a, Vec b) { return from_bits(_mm256_add_epi32(to_bits(a), to_bits(b))); }
inline Vec and_bits(Vec a, Vec b) { return from_bits(_mm256_and_si256(to_bits(a), to_bits(b))); }
inline Vec shift_right_4(Vec a) { return from_bits(_mm256_srli_epi32(to_bits(a), 4)); }
inline Vec int32_to_float(Vec a) { return {_mm256_cvtepi32_ps(to_bits(a))}; }
inline Vec float_to_int32(Vec a) { return from_bits(_mm256_cvtps_epi32(a.v)); }  // nearest even
inline Vec dot_int16_pairs(Vec a, Vec b, Vec c) {
  return add_int32(c, from_bits(_mm256_madd_epi16(to_bits(a), to_bits(b))));
}
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_quarter(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
inline Vec load_pairs(const int8_t* p) { return from_bits(_mm256_cvtepi8_epi16(load_half(p))); }
inline Vec load_pairs(const uint8_t* p) { return from_bits(_mm256_cvtepu8_epi16(load_half(p))); }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_quarter(p)))};
}
inline Vec load_int32(const uint8_t* p) { return from_bits(_mm256_cvtepu8_epi32(load_quarter(p))); }
inline void store_int8(int8_t* p, Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(float_to_bits(lanes[i]));
}
inline Vec add_16_where(const uint8_t* bits, Vec a) {
  int16_t mask;
  std::memcpy(&mask, bits, 2);
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                        8192, 16384, -32768);
  const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(mask), bit), bit);
  return from_bits(_mm256_or_si256(to_bits(a), _mm256_and_si256(set, _mm256_set1_epi16(16))));
}
inline void interleave(Vec& even, Vec& odd) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  even.v = _mm256_permute2f128_ps(low, high, 0x20);
  odd.v = _mm256_permute2f128_ps(low, high, 0x31);
}

#else  // any Vec, through its lanes in memory

struct Lanes {
  uint32_t at[kLanes];
};
inline Lanes to_bits(Vec x) {
  float floats[kLanes];
  store(floats, x);
  Lanes lanes;
  std::memcpy(lanes.at, floats, sizeof(floats));
  return lanes;
}
template <typename F>
inline Vec lanewise_int32(F f) {
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes.at[i] = uint32_t(f(i));
  float floats[kLanes];
  std::memcpy(floats, lanes.at, sizeof(floats));
  return load(floats);
}
template <typename F>
inline Vec lanewise_float(F f) {
  float floats[kLanes];
  for (int i = 0; i < kLanes; ++i) floats[i] = f(i);
  return load(floats);
}
inline Vec splat_int32(int32_t x) {
  return lanewise_int32([&](int) { return x; });
}
inline Vec add_int32(Vec a, Vec b) {
  const Lanes x = to_bits(a), y = to_bits(b);
  return lanewise_int32([&](int i) { return x.at[i] + y.at[i]; });
}
inline Vec and_bits(Vec a, Vec b) {
  const Lanes x = to_bits(a), y = to_bits(b);
  return lanewise_int32([&](int i) { return x.at[i] & y.at[i]; });
}
inline Vec shift_right_4(Vec a) {
  const Lanes x = to_bits(a);
  return lanewise_int32([&](int i) { return x.at[i] >> 4; });
}
inline Vec int32_to_float(Vec a) {
  const Lanes x = to_bits(a);
  return lanewise_float([&](int i) { return float(int32_t(x.at[i])); });
}
inline Vec float_to_int32(Vec a) {  // nearest even
  float floats[kLanes];
  store(floats, a);
  return lanewise_int32([&](int i) { return int32_t(std::nearbyint(floats[i])); });
}
inline Vec dot_int16_pairs(Vec a, Vec b, Vec c) {
  const Lanes x = to_bits(a), y = to_bits(b), z = to_bits(c);
  return lanewise_int32([&](int i) {
    const int32_t low = int16_t(x.at[i]) * int16_t(y.at[i]);
    const int32_t high = int16_t(x.at[i] >> 16) * int16_t(y.at[i] >> 16);
    return z.at[i] + uint32_t(low) + uint32_t(high);
  });
}
template <typename T>
inline Vec load_pairs(const T* p) {
  return lanewise_int32(
      [&](int i) { return uint16_t(p[2 * i]) | uint32_t(uint16_t(p[2 * i + 1])) << 16; });
}
inline Vec load(const int8_t* p) {
  return lanewise_float([&](int i) { return float(p[i]); });
}
inline Vec load_int32(const uint8_t* p) {
  return lanewise_int32([&](int i) { return p[i]; });
}
inline void store_int8(int8_t* p, Vec a) {
  const Lanes x = to_bits(a);
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x.at[i]);
}
inline Vec add_16_where(const uint8_t* bits, Vec a) {
  static_assert(kLanes == 4, "eight int16 have a byte of bits");
  const Lanes x = to_bits(a);
  return lanewise_int32([&](int i) {
    const uint32_t two = *bits >> (2 * i);
    return x.at[i] | (two & 1) << 4 | (two & 2) << 19;
  });
}
inline void interleave(Vec& even, Vec& odd) {
  float e[kLanes], o[kLanes], both[2 * kLanes];
  store(e, even);
  store(o, odd);
  for (int i = 0; i < kLanes; ++i) {
    both[2 * i] = e[i];
    both[2 * i + 1] = o[i];
  }
  even = load(both);
  odd = load(both + kLanes);
}

#endif

inline Vec load_first(const int8_t* p, int n) {
  int8_t lanes[kLanes] = {};
  std::memcpy(lanes, p, n);
  return load(lanes);
}

// The kLanes elements of even and of odd number among 2 * kLanes; those of an int4 cache less
// kValueZeroPoint.
#if defined(__AVX512F__)
inline void load_values(const bf16* p, Vec& even, Vec& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = from_bits(_mm512_slli_epi32(pairs, 16));
  odd = from_bits(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))));
}
#endif
constexpr float kValueZeroPoint = 8.0f;
inline void load_values(const Nibbles* p, Vec& even, Vec& odd) {
  const Vec both = load_int32(&p->bits);
#if defined(__AVX512F__)  // a table, of which VPERMPS reads the four lowest bits
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  even.v = _mm512_permutexvar_ps(to_bits(both), table);
  odd.v = _mm512_permutexvar_ps(to_bits(shift_right_4(both)), table);
#else
  even = int32_to_float(and_bits(both, splat_int32(15))) - splat(kValueZeroPoint);
  odd = int32_to_float(shift_right_4(both)) - splat(kValueZeroPoint);
#endif
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
