// One float vector a instruction set: what the kernels are written in.
//
// Compiled once an instruction set, inside its namespace (CLRT_ISA), so that no inline function of
// one set can stand in for another's. `kLanes` floats a Vec: 4 (baseline, which is NEON on
// aarch64), 8 (AVX2), 16 (AVX-512). Reductions are one fixed tree: a sum depends on the lanes'
// values alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- scalar conversions -------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // A half's exponent and mantissa moved into place are the value times 2^-112, subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {  // round to nearest even
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (rest < 0x38800000) {  // subnormal: the adder rounds at the right bit
    return {uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | (rest + 0xc8000fff + (rest >> 13 & 1)) >> 13)};
}

// ---- the vector ---------------------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
// x, held in a register: keeps GCC from loading it anew for each use, two loads being a cycle's
// all.
inline Vec hold(Vec x) {
  asm("" : "+v"(x.v));
  return x;
}
inline Vec load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(f16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(bf16* p, Vec x) {  // VCVTNEPS2BF16 flushes subnormals: rounded by hand
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where unordered
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where unordered
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline Vec times_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec zero_where_less(Vec x, float bound, Vec y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_NLT_UQ), y.v)};
}
inline float sum(Vec x) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float max_lane(Vec x) { return _mm512_reduce_max_ps(x.v); }
inline Vec select_first(int n, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, n >= kLanes ? 0xffff : n <= 0 ? 0 : (1 << n) - 1, x.v)};
}
inline void transpose(Vec (&rows)[kLanes]) {
  __m512d pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i].v, rows[i + 1].v));
    pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i].v, rows[i + 1].v));
  }
  __m512 quads[16];  // quads[4 g + c]: column c of each 128-bit lane, of rows 4 g to 4 g + 3
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i], pairs[i + 2]));
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i], pairs[i + 2]));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + 1], pairs[i + 3]));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + 1], pairs[i + 3]));
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[4 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[12 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}
// Of pairs of T in 32 bits: those of even number, and the odd ones.
template <typename T>
inline void split_pairs(Vec& pairs, Vec& odd) {
  const __m512i bits = _mm512_castps_si512(pairs.v);
  if constexpr (std::is_same_v<T, bf16>) {
    pairs.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int32_t(0xffff0000))));
  } else {
    pairs.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
    odd.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
}
// columns[i] = words i of 16 rows. Loads put the rows' quarters in their lanes, for they take other
// ports than shuffles, of which half are left.
inline void load_columns(const void* const (&rows)[16], int64_t offset, Vec (&columns)[16]) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512 row[4];  // row[i]: rows i, 4 + i, 8 + i, 12 + i
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int lane) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(
            static_cast<const char*>(rows[4 * lane + i]) + offset + 16 * quarter));
      };
      row[i] = _mm512_castps128_ps512(at(0));
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0x00f0, at(1));
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0x0f00, at(2));
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0xf000, at(3));
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(row[0], row[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(row[0], row[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(row[2], row[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(row[2], row[3]));
    Vec* to = columns + 4 * quarter;
    to[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    to[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    to[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    to[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
}
#if defined(__AVX512BF16__)
// c + the products of the two bfloat16 in each lane of a and b; subnormals count as zero.
inline Vec dot_bf16_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

#elif defined(__AVX2__)

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec hold(Vec x) {
  asm("" : "+x"(x.v));
  return x;
}
inline Vec load(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
inline Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(f16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(bf16* p, Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<bf16>(lanes[i]);
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where unordered
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where unordered
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, 0)}; }
inline Vec times_power_of_2(Vec a, Vec n) {  // n whole, in [-126, 127]
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
inline Vec zero_where_less(Vec x, float bound, Vec y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(bound), _CMP_NLT_UQ), y.v)};
}
inline float sum(Vec x) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline Vec select_first(int n, Vec x, Vec y) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  return {_mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(first))};
}
inline void transpose(Vec (&rows)[kLanes]) {
  __m256 quads[8];  // quads[4 g + c]: column c of each 128-bit lane, of rows 4 g to 4 g + 3
  for (int i = 0; i < 8; i += 4) {
    const __m256 low01 = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    const __m256 high01 = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m256 low23 = _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m256 high23 = _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    quads[i] = _mm256_shuffle_ps(low01, low23, 0x44);
    quads[i + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
    quads[i + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
    quads[i + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c].v = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
    rows[4 + c].v = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
  }
}

#elif defined(__aarch64__)  // NEON is part of it

constexpr int kLanes = 4;
struct Vec {
  float32x4_t v;
};
template <typename F>
inline Vec lanewise(F f) {
  return {float32x4_t{f(0), f(1), f(2), f(3)}};
}
inline Vec splat(float x) { return {vdupq_n_f32(x)}; }
inline Vec hold(Vec x) {
  asm("" : "+w"(x.v));
  return x;
}
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const bf16* p) {
  const uint16x4_t raw = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(raw, 16))};
}
inline Vec load(const f16* p) {
  const uint16x4_t raw = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vcvt_f32_f16(vreinterpret_f16_u16(raw))};
}
inline void store(float* p, Vec x) { vst1q_f32(p, x.v); }
inline void store(f16* p, Vec x) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}
inline void store(bf16* p, Vec x) {  // BFCVT is an extension of ARMv8.6
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t result = vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(result, 16));
}
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// FMAX and FMIN give NaN where unordered; here it is b.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec times_power_of_2(Vec a, Vec n) {  // n whole, in [-126, 127]
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
inline Vec zero_where_less(Vec x, float bound, Vec y) {
  const uint32x4_t less = vcltq_f32(x.v, vdupq_n_f32(bound));
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y.v), less))};
}
inline float sum(Vec x) {
  const float32x2_t pairs = vadd_f32(vget_low_f32(x.v), vget_high_f32(x.v));
  return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
}
inline Vec select_first(int n, Vec x, Vec y) {
  const int32x4_t lane = {0, 1, 2, 3};
  return {vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n)), x.v, y.v)};
}
inline void transpose(Vec (&rows)[kLanes]) {
  const float32x4x2_t low = vtrnq_f32(rows[0].v, rows[1].v);
  const float32x4x2_t high = vtrnq_f32(rows[2].v, rows[3].v);
  for (int i = 0; i < 2; ++i) {
    rows[i].v = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
    rows[2 + i].v = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
  }
}

#else  // any CPU with IEEE floats

constexpr int kLanes = 4;
struct Vec {
  float v[kLanes];
};
template <typename F>
inline Vec lanewise(F f) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}
inline Vec splat(float x) { return {{x, x, x, x}}; }
inline Vec hold(Vec x) { return x; }
template <typename T>
inline Vec load(const T* p) {
  return lanewise([&](int i) { return to_float(p[i]); });
}
template <typename T>
inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(x.v[i]);
}
inline Vec operator+(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) {  // b where unordered
  return lanewise([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {  // b where unordered
  return lanewise([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec round(Vec a) {
  return lanewise([&](int i) { return std::nearbyint(a.v[i]); });
}
inline Vec times_power_of_2(Vec a, Vec n) {  // n whole, in [-126, 127]
  return lanewise([&](int i) {
    const int32_t exponent = n.v[i] == n.v[i] ? int32_t(n.v[i]) : 0;
    return a.v[i] * bits_to_float(uint32_t(exponent + 127) << 23);
  });
}
inline Vec zero_where_less(Vec x, float bound, Vec y) {
  return lanewise([&](int i) { return x.v[i] < bound ? 0.0f : y.v[i]; });
}
inline float sum(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
inline Vec select_first(int n, Vec x, Vec y) {
  return lanewise([&](int i) { return i < n ? x.v[i] : y.v[i]; });
}
inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float below = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = below;
    }
  }
}

#endif

#if !defined(__AVX512F__)
inline float max_lane(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  float m = lanes[0];
  for (float lane : lanes) m = lane > m ? lane : m;
  return m;
}
#endif

// The first n of kLanes elements; the rest is zero (load) or left alone (store).
template <typename T>
inline Vec load_first(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_first(T* p, Vec x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// n elements of one dtype to another.
template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from_float<To>(to_float(from[i]));
}

// e^x within 2 units in the last place; 0 below -87, held at e^88 above 88; NaN stays NaN.
// Cody-Waite reduction to |r| <= ln(2) / 2, then the minimax polynomial of Cephes' expf.
inline Vec exp(Vec x) {
  const Vec bounded = min(splat(88.0f), max(splat(-87.0f), x));
  const Vec n = round(bounded * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r + splat(1.0f));
  return zero_where_less(x, -87.0f, times_power_of_2(p, n));
}

// 2^x for x <= 0, within 2 units in the last place; 0 below -126; NaN stays NaN.
// The polynomial is that of Cephes' exp2f, for |r| <= 1/2.
inline Vec exp2_nonpositive(Vec x) {
  const Vec bounded = max(splat(-126.0f), x);
  const Vec n = round(bounded);
  const Vec r = bounded - n;
  Vec p = splat(1.535336188319500e-4f);
  p = fma(p, r, splat(1.339887440266574e-3f));
  p = fma(p, r, splat(9.618437357674640e-3f));
  p = fma(p, r, splat(5.550332471162809e-2f));
  p = fma(p, r, splat(2.402264791363012e-1f));
  p = fma(p, r, splat(6.931472028550421e-1f));
  p = fma(p, r, splat(1.0f));
  return zero_where_less(x, -126.0f, times_power_of_2(p, n));
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
