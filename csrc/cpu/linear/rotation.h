// Hadamard rotations: what is quantised in a group with one scale is turned first, for then a few
// large elements are spread over all of them. What it is multiplied with takes the inverse
// (QuaRot, arXiv:2404.00456).
#pragma once

#include "cpu/simd/vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The product of both is what makes q . k what it was.
enum Rotation { kKeyRotation, kQueryRotation };

// Sums and differences: blocks of x times a Hadamard matrix of ones; `half`: from this step on.
template <typename T>
inline void add_and_subtract(T* x, int64_t n, int64_t block, int64_t half = 1) {
  for (; half < block; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const T a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
}

#if defined(__AVX512F__)
// The lanes times the Hadamard matrix of their number.
inline Vec rotate_lanes(Vec x) {
  const auto exchange = [&](__mmask16 second, __m512 other) {  // a, b -> a + b, a - b
    x.v = _mm512_mask_sub_ps(_mm512_add_ps(other, x.v), second, other, x.v);
  };
  exchange(0xaaaa, _mm512_permute_ps(x.v, 0xb1));
  exchange(0xcccc, _mm512_permute_ps(x.v, 0x4e));
  exchange(0xf0f0, _mm512_shuffle_f32x4(x.v, x.v, 0xb1));
  exchange(0xff00, _mm512_shuffle_f32x4(x.v, x.v, 0x4e));
  return x;
}
#endif

// x times the Hadamard matrix of the greatest power of two that divides n, block by block, and a
// power of two. n is a multiple of 32.
inline void rotate(float* x, int64_t n, Rotation rotation) {
  const int64_t block = n & -n;
#if defined(__AVX512F__)
  for (int64_t j = 0; j < n; j += kLanes) store(x + j, rotate_lanes(load(x + j)));
  add_and_subtract(x, n, block, kLanes);
#else
  add_and_subtract(x, n, block);
#endif
  int64_t log2 = 0;
  while (int64_t(1) << log2 < block) ++log2;
  const int64_t halvings = rotation == kKeyRotation ? log2 / 2 : log2 - log2 / 2;
  const float factor = 1.0f / float(int64_t(1) << halvings);
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

// `rotate` of kVecs vectors that lie end to end, 64 elements: both rotations are one then, and its
// own inverse.
template <int kVecs>
inline void rotate(Vec (&x)[kVecs]) {
  static_assert(kVecs * kLanes == 64);
#if defined(__AVX512F__)
  for (Vec& v : x) v = rotate_lanes(v);
  add_and_subtract(x, kVecs, kVecs);
  for (Vec& v : x) v = v * splat(0.125f);
#else
  float lanes[64];
  for (int i = 0; i < kVecs; ++i) store(lanes + i * kLanes, x[i]);
  rotate(lanes, 64, kKeyRotation);
  for (int i = 0; i < kVecs; ++i) x[i] = load(lanes + i * kLanes);
#endif
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
