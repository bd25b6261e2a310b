// Float32 weights 2^x of 64 scores at a time, and how far they may be from the float64 ones: a
// draw that is further than that from the ends of a token's interval needs no float64 (sample.cc).
//
// Of a weight w = 2^x, in units of w 2^-24: x is rounded three times (difference, factor, product),
// which is 3 ln 2 |x| < 2.1 |x|; the polynomial is within 1.6; sums by halves round six times. Not
// fused, as all that includes float64.h; fused, the errors would be smaller.
#pragma once

#include "cpu/simd/float64.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// Sums over tokens: of the weights, and of the weights by -x.
struct Rough {
  double weights = 0, exponents = 0;

  // The most by which sums over any of the tokens may differ from those in float64.
  double error() const { return (9 * weights + 2.2 * exponents) * 0x1p-24; }
};

// Coefficients of 2^f = 1 + f (c0 + c1 f + ...) for |f| <= 1/2.
constexpr float kExp2[] = {0.6931472f,   0.24022651f,   0.05550357f,
                           0.009618083f, 0.0013390863f, 0.00015453163f};
constexpr float kLeastExponent = -125;  // weights below its power are 0

#if defined(__AVX512F__)
// As weigh_block.
inline Rough weigh_roughly(const float* scores, float highest, float factor, float* weights,
                           uint64_t allowed) {
  __m512 all[4], products[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 distance =
        _mm512_sub_ps(_mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(highest));
    const __m512 x = _mm512_mul_ps(distance, _mm512_set1_ps(factor));
    const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(kExp2[5]);
    for (int c = 4; c >= 0; --c) power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(kExp2[c]));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(1));
    const __mmask16 some = _mm512_mask_cmp_ps_mask(__mmask16(allowed >> 16 * i), x,
                                                   _mm512_set1_ps(kLeastExponent), _CMP_GT_OQ);
    all[i] = _mm512_maskz_scalef_ps(some, power, whole);
    products[i] = _mm512_maskz_mul_ps(some, all[i], x);
    _mm512_storeu_ps(weights + 16 * i, all[i]);
  }
  const auto total = [](const __m512(&v)[4]) {
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(v[0], v[1]), _mm512_add_ps(v[2], v[3])));
  };
  return {total(all), -total(products)};
}
#else
// 2^x for x from kLeastExponent to 1.
inline float exp2_rough(float x) {
  const float shifted = x + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);  // as in exp2_nonpositive
  float power = kExp2[5];
  for (int c = 4; c >= 0; --c) power = kExp2[c] + f * power;
  power = 1 + f * power;
  int32_t bits, exponent;
  std::memcpy(&bits, &power, 4);
  std::memcpy(&exponent, &shifted, 4);
  bits += int32_t(uint32_t(exponent) << 23);
  std::memcpy(&power, &bits, 4);
  return power;
}

inline Rough weigh_roughly(const float* scores, float highest, float factor, float* weights,
                           uint64_t allowed) {
  float x[kBlock], products[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float exact = (scores[i] - highest) * factor;
    x[i] = exact > kLeastExponent ? exact : kLeastExponent;
  }
  for (int i = 0; i < kBlock; ++i) weights[i] = exp2_rough(x[i]);
  for (int i = 0; i < kBlock; ++i) weights[i] = x[i] > kLeastExponent ? weights[i] : 0;
  if (allowed != kAll) keep_allowed(allowed, 0.0f, weights);
  for (int i = 0; i < kBlock; ++i) products[i] = -x[i] * weights[i];
  return {block_total(weights), block_total(products)};
}
#endif

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
