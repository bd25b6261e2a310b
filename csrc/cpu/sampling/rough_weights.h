// Float32 weights 2^x of 64 scores at a time, and how far they may be from the float64 ones: a
// draw that is further than that from the ends of a token's interval needs no float64 (sample.cc).
//
// Of a weight w = 2^x, in units of w 2^-24: x is rounded three times (difference, factor, product),
// which is 3 ln 2 |x| < 2.1 |x|; the polynomial is within 1.8; sums by halves round six times.
// These are the errors without fused multiply-add; with it they are smaller.
#pragma once

#include "cpu/simd/float64.h"
#include "cpu/simd/vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// Sums over tokens: of the weights, and of the weights by -x.
struct Rough {
  double weights = 0, exponents = 0;

  // The most by which sums over any of the tokens may differ from those in float64.
  double error() const { return (9 * weights + 2.2 * exponents) * 0x1p-24; }
};

// As weigh_block.
inline Rough weigh_roughly(const float* scores, float highest, float factor, float* weights,
                           uint64_t allowed) {
  constexpr int kVecs = kBlock / kLanes;
  Vec x[kVecs], weight[kVecs];
  for (int i = 0; i < kVecs; ++i) {
    x[i] = (load(scores + i * kLanes) - splat(highest)) * splat(factor);
    store(weights + i * kLanes, exp2_nonpositive(x[i]));
  }
  if (allowed != kAll) keep_allowed(allowed, 0.0f, weights);
  for (int i = 0; i < kVecs; ++i) {
    weight[i] = load(weights + i * kLanes);
    x[i] = max(splat(-126.0f), x[i]) * weight[i];  // finite where the weight is 0
  }
  for (int half = kVecs / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      weight[i] = weight[i] + weight[i + half];
      x[i] = x[i] + x[i + half];
    }
  }
  return {sum(weight[0]), -sum(x[0])};
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
