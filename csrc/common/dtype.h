// Element types of tensors. Storage only: arithmetic is float32, in vec.h.
#pragma once

#include <cstdint>

namespace codellama_rt {

// From kInt8 on: quantised, see quantized.h. kOther: a dtype that no op takes; it is carried only
// so that a refusal can be given.
enum class DType : int32_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt8,
  kInt4,
  kQ4_0,
  kQ4_1,
  kQ8_0,
  kQ4_K,
  kQ6_K,
  kFp8,
  kInt8Mma,
  kInt4Mma,
  kOther
};

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt8:
      return "int8";
    case DType::kInt4:
      return "int4";
    case DType::kQ4_0:
      return "q4_0";
    case DType::kQ4_1:
      return "q4_1";
    case DType::kQ8_0:
      return "q8_0";
    case DType::kQ4_K:
      return "q4_k";
    case DType::kQ6_K:
      return "q6_k";
    case DType::kFp8:
      return "fp8";
    case DType::kInt8Mma:
      return "int8_mma";
    case DType::kInt4Mma:
      return "int4_mma";
    case DType::kOther:
      break;
  }
  return "another dtype";
}

}  // namespace codellama_rt
