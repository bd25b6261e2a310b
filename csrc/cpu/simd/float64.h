// Float64 in blocks of 64, as plain loops that compilers turn into vectors of any length: every
// operation is rounded by itself, in one order, so all instruction sets give the same bits.
// Sources that include it are compiled with -ffp-contract=off (CMakeLists.txt).
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <limits>

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
template <int kHalf, typename T>
inline void add_halves(T* x) {
  for (int i = 0; i < kHalf; ++i) x[i] += x[i + kHalf];
  if constexpr (kHalf > 1) add_halves<kHalf / 2>(x);
}
template <int kHalf, typename T>
inline void max_halves(T* x) {
  for (int i = 0; i < kHalf; ++i) x[i] = x[i] > x[i + kHalf] ? x[i] : x[i + kHalf];
  if constexpr (kHalf > 1) max_halves<kHalf / 2>(x);
}

constexpr uint64_t kAll = ~uint64_t{0};

// Of 64 elements, those whose bits are not set become `other`.
template <typename T>
inline void keep_allowed(uint64_t allowed, T other, T* x) {
  for (int i = 0; i < kBlock; ++i) x[i] = allowed >> i & 1 ? x[i] : other;
}
#if defined(__AVX512F__)
inline void keep_allowed(uint64_t allowed, float other, float* x) {
  for (int i = 0; i < kBlock; i += 16) {
    const __m512 others = _mm512_set1_ps(other);
    _mm512_storeu_ps(x + i, _mm512_mask_loadu_ps(others, __mmask16(allowed >> i), x + i));
  }
}
#endif

// Of 64 elements without NaN.
template <typename T>
inline T block_maximum(const T* x) {
  constexpr int kHalf = kBlock / 2;
  T best[kHalf];
  for (int i = 0; i < kHalf; ++i) best[i] = x[i] > x[i + kHalf] ? x[i] : x[i + kHalf];
  max_halves<kHalf / 2>(best);
  return best[0];
}
// Of those elements whose bits are set.
inline float block_maximum(const float* x, uint64_t allowed) {
#if defined(__AVX512F__)
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const auto part = [&](int i) {
    return _mm512_mask_loadu_ps(none, __mmask16(allowed >> 16 * i), x + 16 * i);
  };
  return _mm512_reduce_max_ps(
      _mm512_max_ps(_mm512_max_ps(part(0), part(1)), _mm512_max_ps(part(2), part(3))));
#else
  if (allowed == kAll) return block_maximum(x);
  float kept[kBlock];
  std::memcpy(kept, x, sizeof(kept));
  keep_allowed(allowed, -std::numeric_limits<float>::infinity(), kept);
  return block_maximum(kept);
#endif
}
template <typename T>
inline T block_total(const T* x) {
  constexpr int kHalf = kBlock / 2;
  T sum[kHalf];
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

// The highest of some logits, and whether one of them is NaN, over which comparisons pass.
struct Highest {
  float value;
  bool has_nan;
};
#if defined(__AVX512F__)
// Of whole blocks.
inline Highest highest_of_blocks(const float* logits, int64_t count) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 best[4] = {none, none, none, none};
  __mmask16 has_nan = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(logits + begin + 16 * i);
    for (int i = 0; i < 4; ++i) best[i] = _mm512_max_ps(x[i], best[i]);  // of NaN: the latter
    has_nan |= _mm512_cmp_ps_mask(x[0], x[1], _CMP_UNORD_Q);
    has_nan |= _mm512_cmp_ps_mask(x[2], x[3], _CMP_UNORD_Q);
  }
  best[0] = _mm512_max_ps(_mm512_max_ps(best[0], best[1]), _mm512_max_ps(best[2], best[3]));
  return {_mm512_reduce_max_ps(best[0]), has_nan != 0};
}
#else
inline Highest highest_of_blocks(const float* logits, int64_t count) {
  float best[kBlock];
  int32_t most[kBlock];  // bits without sign: above those of infinity for NaN alone
  for (int i = 0; i < kBlock; ++i) best[i] = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < kBlock; ++i) most[i] = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      const float x = logits[begin + i];
      best[i] = x > best[i] ? x : best[i];
    }
    for (int i = 0; i < kBlock; ++i) {
      int32_t bits;
      std::memcpy(&bits, logits + begin + i, 4);
      bits &= 0x7fffffff;
      most[i] = bits > most[i] ? bits : most[i];
    }
  }
  max_halves<kBlock / 2>(best);
  max_halves<kBlock / 2>(most);
  return {best[0], most[0] > 0x7f800000};
}
#endif
inline Highest highest_of(const float* logits, int64_t count) {
  const int64_t whole = count / kBlock * kBlock;
  Highest highest = highest_of_blocks(logits, whole);
  for (int64_t i = whole; i < count; ++i) {
    highest.value = logits[i] > highest.value ? logits[i] : highest.value;
    highest.has_nan |= logits[i] != logits[i];
  }
  return highest;
}

// The first of the highest logits; the first NaN, if there is one.
inline int64_t best_logit(const float* logits, int64_t size) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t place = 0;
  constexpr int64_t kStep = 16 * kBlock;
  for (int64_t begin = 0; begin < size; begin += kStep) {
    const Highest highest = highest_of(logits + begin, smaller(kStep, size - begin));
    if (highest.has_nan) {
      place = begin;
      while (logits[place] == logits[place]) ++place;
      return place;
    }
    if (!(highest.value > best)) continue;
    best = highest.value;
    place = begin;
  }
  const auto is_in_block = [&](int64_t begin) {
    int32_t count = 0;
    for (int i = 0; i < kBlock; ++i) count += logits[begin + i] == best;
    return count > 0;
  };
  while (place + kBlock <= size && !is_in_block(place)) place += kBlock;
  while (logits[place] != best) ++place;
  return place;
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

#if defined(__AVX512F__)
// The same for several times eight, by the same operations in the same order. Step by step for all
// of them: one after another, a chain of 60 cycles each would wait for its own results.
constexpr int kTogether = 4;
inline void exp2_nonpositive(__m512d (&x)[kTogether]) {
  const auto number = [](double value) { return _mm512_set1_pd(value); };
  const auto each = [](const auto& body) {
    for (int i = 0; i < kTogether; ++i) body(i);
  };
  __mmask8 in_range[kTogether];
  __m512d shifted[kTogether], f[kTogether], f2[kTogether], f4[kTogether], f8[kTogether];
  each([&](int i) { in_range[i] = _mm512_cmp_pd_mask(x[i], number(-1021.0), _CMP_GT_OQ); });
  each([&](int i) { x[i] = _mm512_max_pd(x[i], number(-1021.0)); });
  each([&](int i) { shifted[i] = _mm512_add_pd(x[i], number(0x1.8p52)); });
  each([&](int i) { f[i] = _mm512_sub_pd(x[i], _mm512_sub_pd(shifted[i], number(0x1.8p52))); });
  each([&](int i) { f2[i] = _mm512_mul_pd(f[i], f[i]); });
  each([&](int i) { f4[i] = _mm512_mul_pd(f2[i], f2[i]); });
  each([&](int i) { f8[i] = _mm512_mul_pd(f4[i], f4[i]); });
  const auto pair = [&](int i, double a, double b) {
    return _mm512_add_pd(number(a), _mm512_mul_pd(f[i], number(b)));
  };
  const auto sum = [](__m512d a, __m512d factor, __m512d b) {
    return _mm512_add_pd(a, _mm512_mul_pd(factor, b));
  };
  __m512d low[kTogether], middle[kTogether], high[kTogether];
  each([&](int i) {
    low[i] = sum(pair(i, 0.6931471805599453, 0.24022650695910097), f2[i],
                 pair(i, 0.0555041086648216, 0.009618129107606888));
  });
  each([&](int i) {
    middle[i] = sum(pair(i, 0.0013333558146416936, 0.0001540353044173605), f2[i],
                    pair(i, 1.525273382983612e-05, 1.321544258792169e-06));
  });
  each([&](int i) {
    high[i] = sum(pair(i, 1.0178062445845774e-07, 7.072585949269223e-09), f2[i],
                  number(4.4549605981865186e-10));
  });
  each([&](int i) { low[i] = sum(low[i], f4[i], middle[i]); });
  each([&](int i) { low[i] = sum(low[i], f8[i], high[i]); });
  each([&](int i) { low[i] = sum(number(1), f[i], low[i]); });
  each([&](int i) {
    const __m512i power = _mm512_slli_epi64(_mm512_castpd_si512(shifted[i]), 52);
    const __m512i scaled = _mm512_add_epi64(_mm512_castpd_si512(low[i]), power);
    x[i] = _mm512_maskz_mov_pd(in_range[i], _mm512_castsi512_pd(scaled));
  });
}

// block_total of eight times eight elements.
inline double block_total(const __m512d (&x)[8]) {
  __m512d sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = _mm512_add_pd(x[i], x[i + 4]);
  const __m512d eight = _mm512_add_pd(_mm512_add_pd(sum[0], sum[2]), _mm512_add_pd(sum[1], sum[3]));
  const __m256d four =
      _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
#endif

#if defined(__AVX512F__)
inline __m512d eight_scores(const float* scores) {
  return _mm512_cvtps_pd(_mm256_loadu_ps(scores));
}
inline __m512d eight_scores(const double* scores) { return _mm512_loadu_pd(scores); }
#endif

// The weights 2^((score - highest) * factor) of 64 scores; where bit i of `allowed` is not set,
// score i has the weight 0, and none of the others is above the highest. Returns their sum.
template <typename T>
inline double weigh_block(const T* scores, double highest, double factor, double* weights,
                          uint64_t allowed = kAll) {
#if defined(__AVX512F__)
  __m512d all[8];
  const __m512d most = _mm512_set1_pd(highest), by = _mm512_set1_pd(factor);
  for (int begin = 0; begin < 8; begin += kTogether) {
    __m512d x[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const __m512d distance = _mm512_sub_pd(eight_scores(scores + 8 * (begin + i)), most);
      x[i] = _mm512_mul_pd(distance, by);
    }
    exp2_nonpositive(x);
    for (int i = 0; i < kTogether; ++i) {
      all[begin + i] = _mm512_maskz_mov_pd(__mmask8(allowed >> 8 * (begin + i)), x[i]);
      _mm512_storeu_pd(weights + 8 * (begin + i), all[begin + i]);
    }
  }
  return block_total(all);
#else
  for (int i = 0; i < kBlock; ++i) weights[i] = exp2_nonpositive((scores[i] - highest) * factor);
  if (allowed != kAll) keep_allowed(allowed, 0.0, weights);
  return block_total(weights);
#endif
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
