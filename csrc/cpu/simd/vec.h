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

#if defined(__AVX512F__)
#include "cpu/simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/vec_avx2.h"
#elif defined(__aarch64__)
#include "cpu/simd/vec_neon.h"
#else
#include "cpu/simd/vec_any.h"
#endif

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

#if !defined(__AVX512F__)
inline void compute_after(Vec&, Vec&) {}
inline float max_lane(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  float m = lanes[0];
  for (float lane : lanes) m = lane > m ? lane : m;
  return m;
}
#endif

#if !defined(__AVX2__)  // 4 lanes
template <typename Add>
inline Vec sum_quads(const Vec (&x)[1], const Add&) {
  return x[0];
}
template <typename Add>
inline Vec sum_lanes(Vec a, Vec b, Vec c, Vec d, const Add& add) {
  Vec rows[kLanes] = {a, b, c, d};
  transpose(rows);
  return add(add(rows[0], rows[2]), add(rows[1], rows[3]));
}
template <int kCount>
inline Vec spread(const float* p) {
  if constexpr (kCount == 4) return load(p);
  return splat(*p);
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

// x * sigmoid(x)                                            (arXiv:1702.03118)
inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

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