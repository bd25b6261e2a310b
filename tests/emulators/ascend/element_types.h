// half and bfloat16_t of the device: storage and conversions, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace ascend_emu {

inline float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

}  // namespace ascend_emu

struct half {
  uint16_t bits;

  half() = default;
  explicit half(float x) {
    using namespace ascend_emu;
    const uint32_t all = bits_of_float(x), sign = all >> 16 & 0x8000, rest = all & 0x7fffffff;
    if (rest > 0x7f800000) {
      bits = uint16_t(sign | 0x7e00);
    } else if (rest >= 0x477ff000) {
      bits = uint16_t(sign | 0x7c00);
    } else if (rest < 0x38800000) {  // subnormal: the adder rounds at the right bit
      bits = uint16_t(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000));
    } else {
      bits = uint16_t(sign | (rest + 0xc8000fff + (rest >> 13 & 1)) >> 13);
    }
  }
  explicit operator float() const {
    using namespace ascend_emu;
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));
  }
};

struct bfloat16_t {
  uint16_t bits;

  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    const uint32_t all = ascend_emu::bits_of_float(x);
    const bool nan = (all & 0x7fffffff) > 0x7f800000;
    bits = nan ? uint16_t(all >> 16 | 0x40) : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return ascend_emu::float_of_bits(uint32_t(bits) << 16); }
};
