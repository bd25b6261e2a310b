// Element types of tensors. Storage only: arithmetic is float32, in vec.h.
#pragma once

#include <cstdint>

namespace codellama_rt {

// GGUF's formats: name here and there, elements of a block, bytes of it.
#define CLRT_GGUF_FORMATS(FORMAT)  \
  FORMAT(Q4_0, "q4_0", 32, 18)     \
  FORMAT(Q4_1, "q4_1", 32, 20)     \
  FORMAT(Q5_0, "q5_0", 32, 22)     \
  FORMAT(Q5_1, "q5_1", 32, 24)     \
  FORMAT(Q8_0, "q8_0", 32, 34)     \
  FORMAT(IQ4_NL, "iq4_nl", 32, 18) \
  FORMAT(Q2_K, "q2_k", 256, 84)    \
  FORMAT(Q3_K, "q3_k", 256, 110)   \
  FORMAT(Q4_K, "q4_k", 256, 144)   \
  FORMAT(Q5_K, "q5_k", 256, 176)   \
  FORMAT(Q6_K, "q6_k", 256, 210)

// From kInt8 on: quantised, see quantized.h; GGUF's as rows of blocks, then each in tiles. kOther:
// a dtype that no op takes; it is carried only so that a refusal can be given.
enum class DType : int32_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt8,
  kInt4,
#define CLRT_FORMAT(format, name, elements, bytes) k##format,
  CLRT_GGUF_FORMATS(CLRT_FORMAT)
#undef CLRT_FORMAT
#define CLRT_FORMAT(format, name, elements, bytes) k##format##Tiled,
      CLRT_GGUF_FORMATS(CLRT_FORMAT)
#undef CLRT_FORMAT
          kFp8,
  kInt8Mma,
  kInt4Mma,
  kOther
};

constexpr bool is_gguf(DType dtype) { return dtype >= DType::kQ4_0 && dtype < DType::kQ4_0Tiled; }
constexpr bool is_gguf_tiled(DType dtype) {
  return dtype >= DType::kQ4_0Tiled && dtype < DType::kFp8;
}
constexpr int kNumGgufFormats = int(DType::kQ4_0Tiled) - int(DType::kQ4_0);

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
#define CLRT_FORMAT(format, name, elements, bytes) \
  case DType::k##format:                           \
    return name;                                   \
  case DType::k##format##Tiled:                    \
    return name "_tiled";
      CLRT_GGUF_FORMATS(CLRT_FORMAT)
#undef CLRT_FORMAT
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
