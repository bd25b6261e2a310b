// The rotation of one head by one position: RoPE (arXiv:2104.09864), shared by both ops that do it.
#pragma once

#include "cpu/simd/vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + half) or, interleaved, (2i, 2i+1).
template <typename From, typename To>
inline void rotate_head(const From* x, const float* cos, const float* sin, To* out, int64_t half,
                        bool interleaved) {
  int64_t i = 0;
  if (interleaved) {
    for (; i < half; ++i) {
      const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
      out[2 * i] = from_float<To>(a * cos[i] - b * sin[i]);
      out[2 * i + 1] = from_float<To>(b * cos[i] + a * sin[i]);
    }
    return;
  }
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, a * c - b * s);
    store(out + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[half + i]);
    out[i] = from_float<To>(a * cos[i] - b * sin[i]);
    out[half + i] = from_float<To>(b * cos[i] + a * sin[i]);
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
