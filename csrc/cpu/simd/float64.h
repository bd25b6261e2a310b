// Float64 in blocks of 64, as plain loops that compilers turn into vectors of any length: every
// operation is rounded by itself, in one order, so all instruction sets give the same bits.
// Sources that include it are compiled with -ffp-contract=off (CMakeLists.txt).
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "cpu/runtime/task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kBlock = 64;
constexpr double kLog2E = 1.4426950408889634;

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// The upper half of 2 * kHalf elements is added to (compared with) the lower, until one is left.
template <int kHalf>
inline void add_halves(double* x) {
  for (int i = 0; i < kHalf; ++i) x[i] += x[i + kHalf];
  if constexpr (kHalf > 1) add_halves<kHalf / 2>(x);
}
template <int kHalf>
inline void max_halves(double* x) {
  for (int i = 0; i < kHalf; ++i) x[i] = x[i] > x[i + kHalf] ? x[i] : x[i + kHalf];
  if constexpr (kHalf > 1) max_halves<kHalf / 2>(x);
}

// Of 64 elements without NaN.
inline double block_maximum(const double* x) {
  constexpr int kHalf = kBlock / 2;
  double best[kHalf];
  for (int i = 0; i < kHalf; ++i) best[i] = x[i] > x[i + kHalf] ? x[i] : x[i + kHalf];
  max_halves<kHalf / 2>(best);
  return best[0];
}
inline double block_total(const double* x) {
  constexpr int kHalf = kBlock / 2;
  double sum[kHalf];
  for (int i = 0; i < kHalf; ++i) sum[i] = x[i] + x[i + kHalf];
  add_halves<kHalf / 2>(sum);
  return sum[0];
}

// Appends those of 64 elements that are in (over, most], in their order; returns their number.
// `out` has room for 64.
inline int64_t append_within(const double* x, double over, double most, double* out) {
  int64_t count = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kBlock; i += 8) {
    const __m512d values = _mm512_loadu_pd(x + i);
    const __mmask8 above = _mm512_cmp_pd_mask(values, _mm512_set1_pd(over), _CMP_GT_OQ);
    const __mmask8 within =
        _mm512_mask_cmp_pd_mask(above, values, _mm512_set1_pd(most), _CMP_LE_OQ);
    _mm512_storeu_pd(out + count, _mm512_maskz_compress_pd(within, values));
    count += __builtin_popcount(within);
  }
#else
  for (int i = 0; i < kBlock; ++i) {
    out[count] = x[i];
    count += int(x[i] > over) & int(x[i] <= most);
  }
#endif
  return count;
}

// An integer in the order of logits: -0 is 0, and every NaN is above infinity.
inline int32_t order_of(float x) {
  const float with_one_zero = x + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &with_one_zero, 4);
  const int32_t magnitude = bits & 0x7fffffff, sign = bits >> 31;
  const int32_t nan = (0x7f800000 - magnitude) >> 31;  // as a mask: a branch is not vectorised
  return (((magnitude ^ sign) - sign) & ~nan) | (nan & 0x7fffffff);
}

inline int32_t highest_order(const float* logits, int64_t count) {
  int32_t highest = -0x7fffffff;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t order = order_of(logits[i]);
    highest = highest > order ? highest : order;
  }
  return highest;
}

template <typename T>
inline int64_t first_equal(const T* values, int64_t size, T wanted) {
  int64_t i = 0;
  while (i < size && values[i] != wanted) ++i;
  return i;
}

inline bool is_finite(double x) { return x - x == 0; }

// The first of the highest logits; the first NaN, if there is one.
inline int64_t best_logit(const float* logits, int64_t size) {
  int32_t best = -0x7fffffff;
  int64_t block = 0;
  constexpr int64_t kStep = 16 * kBlock;
  for (int64_t begin = 0; begin < size; begin += kStep) {
    const int32_t highest = highest_order(logits + begin, smaller(kStep, size - begin));
    if (highest <= best) continue;
    best = highest;
    block = begin;
  }
  while (order_of(logits[block]) != best) ++block;
  return block;
}

// 2^x for x <= 0, within 2 units in the last place; 0 below -1021.
// 2^f = 1 + f q(f) for |f| <= 1/2; q interpolates at Chebyshev's nodes, 2e-17 from the quotient.
inline double exp2_nonpositive(double x) {
  const double bounded = x > -1021.0 ? x : -1021.0;
  const double shifted = bounded + 0x1.8p52;  // rounds to an integer, in the lowest bits
  const double f = bounded - (shifted - 0x1.8p52);
  const double f2 = f * f, f4 = f2 * f2, f8 = f4 * f4;
  const double low = (0.6931471805599453 + f * 0.24022650695910097) +
                     f2 * (0.0555041086648216 + f * 0.009618129107606888);
  const double middle = (0.0013333558146416936 + f * 0.0001540353044173605) +
                        f2 * (1.525273382983612e-05 + f * 1.321544258792169e-06);
  const double high =
      (1.0178062445845774e-07 + f * 7.072585949269223e-09) + f2 * 4.4549605981865186e-10;
  const double power = 1 + f * (low + f4 * middle + f8 * high);
  return x > -1021.0 ? from_bits(bits_of(power) + (bits_of(shifted) << 52)) : 0.0;
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
