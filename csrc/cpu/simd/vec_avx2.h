// Vec (vec.h) in AVX2: 8 lanes.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

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
template <typename Add>
inline Vec sum_quads(const Vec (&x)[2], const Add& add) {
  return add(Vec{_mm256_permute2f128_ps(x[0].v, x[1].v, 0x20)},
             Vec{_mm256_permute2f128_ps(x[0].v, x[1].v, 0x31)});
}
template <typename Add>
inline Vec sum_lanes(Vec a, Vec b, Vec c, Vec d, const Add& add) {
  const auto halves = [&](Vec x, Vec y) {
    return _mm256_castps_pd(
        add(Vec{_mm256_unpacklo_ps(x.v, y.v)}, Vec{_mm256_unpackhi_ps(x.v, y.v)}).v);
  };
  const __m256d ab = halves(a, b), cd = halves(c, d);
  return add(Vec{_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd))},
             Vec{_mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd))});
}
template <int kCount>
inline Vec spread(const float* p) {
  if constexpr (kCount == 4) return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
  return splat(*p);
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
