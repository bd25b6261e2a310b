// Element types of tensors. Storage only: arithmetic is float32, in vec.h.
#pragma once

#include <cstdint>

namespace codellama_rt {

// kOther: a dtype that no op takes; it is carried only so that a refusal can be given.
enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32, kOther };

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
    case DType::kOther:
      break;
  }
  return "another dtype";
}

}  // namespace codellama_rt
