// The conversions that common.cuh has instructions for; it includes this inside its namespace.
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = rest < 0x400 ? float(rest) * 0x1p-24f : bits_float((rest << 13) + 0x38000000);
  return bits_float(sign | float_bits(size));
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000, magnitude = float_bits(x) & 0x7fffffff;
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and more
  if (magnitude < 0x38800000) {                                   // below 2^-14: steps of 2^-24
    return {uint16_t(sign | uint32_t(std::nearbyint(std::fabs(x) * 0x1p24f)))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
  return {uint16_t(sign | rounded >> 13)};
}
