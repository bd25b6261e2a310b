// Vec (vec.h) in AVX-512: 16 lanes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/simd/scalar.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

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
// Nothing that uses `later` is computed before `earlier`: GCC would rather start what it can than
// keep to the registers there are.
inline void compute_after(Vec& earlier, Vec& later) { asm("" : "+v"(earlier.v), "+v"(later.v)); }
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
// In 128 bits q, the sum of the four quads of x[q]; then, there, of the lanes of a, b, c, d.
template <typename Add>
inline Vec sum_quads(const Vec (&x)[4], const Add& add) {
  const auto halves = [&](Vec a, Vec b) {
    return add(Vec{_mm512_shuffle_f32x4(a.v, b.v, 0x88)},
               Vec{_mm512_shuffle_f32x4(a.v, b.v, 0xdd)});
  };
  const Vec even_odd[2] = {halves(x[0], x[1]), halves(x[2], x[3])};
  return halves(even_odd[0], even_odd[1]);
}
template <typename Add>
inline Vec sum_lanes(Vec a, Vec b, Vec c, Vec d, const Add& add) {
  const auto halves = [&](Vec x, Vec y) {
    return _mm512_castps_pd(
        add(Vec{_mm512_unpacklo_ps(x.v, y.v)}, Vec{_mm512_unpackhi_ps(x.v, y.v)}).v);
  };
  const __m512d ab = halves(a, b), cd = halves(c, d);
  return add(Vec{_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd))},
             Vec{_mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd))});
}
// kCount elements as floats, again and again. One or two by VPBROADCASTD and Q, which only load:
// VBROADCASTSS and SD, which GCC takes for floats, use a port of the products as well (Zen 4: one
// beside each product lets 2.8 of these start in a nanosecond, not 3.7).
template <int kCount>
inline Vec spread(const float* p) {
  if constexpr (kCount == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
  if constexpr (kCount == 2) {
    int64_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return {_mm512_castsi512_ps(_mm512_set1_epi64(bits))};
  }
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return {_mm512_castsi512_ps(_mm512_set1_epi32(bits))};
}
template <int kCount>
inline Vec spread(const f16* p) {
  static_assert(kCount == 4);
  int64_t bits;
  std::memcpy(&bits, p, 8);
  return {_mm512_cvtph_ps(_mm256_set1_epi64x(bits))};
}
#if defined(__AVX512BF16__)
// c + the products of the two bfloat16 in each lane of a and b; subnormals count as zero.
inline Vec dot_bf16_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
