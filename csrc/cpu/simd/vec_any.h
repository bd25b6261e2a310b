// Vec (vec.h) on any CPU with IEEE floats: 4 lanes.
#pragma once

#include <cmath>

#include "cpu/simd/scalar.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

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

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
