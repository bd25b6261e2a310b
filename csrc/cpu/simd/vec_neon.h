// Vec (vec.h) in NEON, which is part of aarch64: 4 lanes.
#pragma once

#include <arm_neon.h>

#include <cmath>

#include "cpu/simd/scalar.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kLanes = 4;
struct Vec {
  float32x4_t v;
};
template <typename F>
inline Vec lanewise(F f) {
  return {float32x4_t{f(0), f(1), f(2), f(3)}};
}
inline Vec splat(float x) { return {vdupq_n_f32(x)}; }
inline Vec hold(Vec x) {
  asm("" : "+w"(x.v));
  return x;
}
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const bf16* p) {
  const uint16x4_t raw = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(raw, 16))};
}
inline Vec load(const f16* p) {
  const uint16x4_t raw = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vcvt_f32_f16(vreinterpret_f16_u16(raw))};
}
inline void store(float* p, Vec x) { vst1q_f32(p, x.v); }
inline void store(f16* p, Vec x) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}
inline void store(bf16* p, Vec x) {  // BFCVT is an extension of ARMv8.6
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t result = vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(result, 16));
}
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// FMAX and FMIN give NaN where unordered; here it is b.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec times_power_of_2(Vec a, Vec n) {  // n whole, in [-126, 127]
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
inline Vec zero_where_less(Vec x, float bound, Vec y) {
  const uint32x4_t less = vcltq_f32(x.v, vdupq_n_f32(bound));
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y.v), less))};
}
inline float sum(Vec x) {
  const float32x2_t pairs = vadd_f32(vget_low_f32(x.v), vget_high_f32(x.v));
  return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
}
inline Vec select_first(int n, Vec x, Vec y) {
  const int32x4_t lane = {0, 1, 2, 3};
  return {vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n)), x.v, y.v)};
}
inline void transpose(Vec (&rows)[kLanes]) {
  const float32x4x2_t low = vtrnq_f32(rows[0].v, rows[1].v);
  const float32x4x2_t high = vtrnq_f32(rows[2].v, rows[3].v);
  for (int i = 0; i < 2; ++i) {
    rows[i].v = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
    rows[2 + i].v = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
