// A row of keys or values in a page: where it lies, and how it is quantised as it is written.
//
// int8 and fp8 (e4m3): groups of kCacheGroup rows, each row head_dim bytes, then the group's
// scales, one float32 a row: x = value * scale. See quantized.h.
#pragma once

#include "cuda/runtime/common.cuh"

namespace codellama_rt {
namespace cuda {

struct int8_row {};  // tags beside f16, bf16 and float
struct fp8_row {};

template <typename Cache>
constexpr bool kIsQuantized = false;
template <>
constexpr bool kIsQuantized<int8_row> = true;
template <>
constexpr bool kIsQuantized<fp8_row> = true;

// Greatest magnitude of a stored value.
template <typename Cache>
constexpr float kLargest = 127;
template <>
constexpr float kLargest<fp8_row> = 448;

// Row number (over all pages and heads) of token `slot % block_size` of page `slot / block_size`.
CLRT_DEVICE int64_t page_row(int64_t slot, int64_t head, int64_t n_kv_heads, int64_t block_size) {
  return (slot / block_size * n_kv_heads + head) * block_size + slot % block_size;
}

// Bytes from the first page to the row's values, and to its scale; block_size is a multiple of
// kCacheGroup, so groups are counted over all pages.
CLRT_DEVICE int64_t quantized_row_offset(int64_t row, int64_t head_dim) {
  return row / kCacheGroup * kCacheGroup * (head_dim + 4) + row % kCacheGroup * head_dim;
}
CLRT_DEVICE int64_t quantized_scale_offset(int64_t row, int64_t head_dim) {
  return row / kCacheGroup * kCacheGroup * (head_dim + 4) + kCacheGroup * head_dim +
         row % kCacheGroup * 4;
}

// Nearest e4m3 of |x| <= 448, ties to even. By hand, so that the CPU and every GPU agree.
CLRT_DEVICE uint8_t to_e4m3(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x3c800000) {  // below 2^-6: steps of 2^-9, which adding 2^14 rounds to
    const float shifted = __fadd_rn(bits_float(magnitude), 16384.0f);
    return uint8_t(sign | (float_bits(shifted) - 0x46800000));
  }
  const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);  // to 3 bits of mantissa
  const uint32_t code = (rounded - 0x3c000000) >> 20;                    // bias 127 - 7 = 120
  return uint8_t(sign | (code > 0x7e ? 0x7e : code));
}

template <typename Cache>
CLRT_DEVICE uint8_t quantize(float x, float inverse_scale);
template <>
CLRT_DEVICE uint8_t quantize<int8_row>(float x, float inverse_scale) {
  return uint8_t(int8_t(rintf(__fmul_rn(x, inverse_scale))));
}
template <>
CLRT_DEVICE uint8_t quantize<fp8_row>(float x, float inverse_scale) {
  return to_e4m3(fminf(fmaxf(__fmul_rn(x, inverse_scale), -448.0f), 448.0f));
}

// Writes kEach consecutive elements a lane of row `row`; the lanes of a warp hold the whole row
// (head_dim <= 32 * kEach; lanes beyond it bring zeros and write nothing).
template <typename Cache, int kEach>
CLRT_DEVICE void store_row(void* cache, int64_t row, int64_t head_dim, const float (&x)[kEach]) {
  const int lane = threadIdx.x % kWarp, first = lane * kEach;
  if constexpr (kIsQuantized<Cache>) {
    float largest = 0;
    for (int i = 0; i < kEach; ++i) largest = fmaxf(largest, fabsf(x[i]));
    for (int step = kWarp / 2; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    const float scale = largest / kLargest<Cache>, inverse = scale > 0 ? 1 / scale : 0;
    auto* bytes = static_cast<uint8_t*>(cache);
    if (lane == 0) {
      *reinterpret_cast<float*>(bytes + quantized_scale_offset(row, head_dim)) = scale;
    }
    if (first >= head_dim) return;
    Vector<uint8_t, kEach> values;
    for (int i = 0; i < kEach; ++i) values.elements[i] = quantize<Cache>(x[i], inverse);
    *reinterpret_cast<Vector<uint8_t, kEach>*>(bytes + quantized_row_offset(row, head_dim) +
                                               first) = values;
  } else {
    if (first >= head_dim) return;
    Vector<Cache, kEach> values;
    for (int i = 0; i < kEach; ++i) values.elements[i] = from_float<Cache>(x[i]);
    *reinterpret_cast<Vector<Cache, kEach>*>(static_cast<Cache*>(cache) + row * head_dim + first) =
        values;
  }
}

// Calls body with a value of the cache's storage type or tag.
template <typename Body>
void with_cache_type(const char* op, DType dtype, const Body& body) {
  if (dtype == DType::kInt8) return body(int8_row{});
  if (dtype == DType::kFp8) return body(fp8_row{});
  if (!is_float(dtype)) refuse(op, std::string("no cache in ") + dtype_name(dtype));
  with_type(dtype, body);
}

}  // namespace cuda
}  // namespace codellama_rt
