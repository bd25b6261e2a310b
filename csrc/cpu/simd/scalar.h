// Conversions of one element. Compiled inside an instruction set's namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // A half's exponent and mantissa moved into place are the value times 2^-112, subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {  // round to nearest even
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (rest < 0x38800000) {  // subnormal: the adder rounds at the right bit
    return {uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | (rest + 0xc8000fff + (rest >> 13 & 1)) >> 13)};
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
