// Where the values and scales of a quantised tensor lie. Its memory is plain bytes; the shape that
// an op sees is that of the float tensor it stands for. codellama_rt/ops/quantized.py says the
// same.
//
// Cache, kInt8 and kInt4: a page of a head is block_size / 16 groups of 16 tokens, each group its
// rows of values, then its scales. So a group is one piece, whatever block_size is.
//   int8         rows of head_dim int8; a float32 scale a token. x = value * scale.
//   int4 values  rows of head_dim / 2 bytes, element 2 i in the low half of byte i; a float16 scale
//                a token, then a float16 minimum a token. x = value * scale + minimum.
//   int4 keys    the rotated row (cpu/linear/quantize_row.h), 5 bits an element: the low four as
//   above,
//                then rows of head_dim / 8 bytes with bit 4 of the elements of even number, then of
//                odd number; scales and minimums as above.
// Weight, (n, k):
//   int8, int4        made by ops.quantize: tiles of 16 rows, groups of 64 (int4: 32) along k, in
//                     the order that VPDPBUSD takes: 4 elements of row 0, of row 1, ... of row 15;
//                     4 more. int8: a group is 1024 values, plus 128, then 16 scales in bfloat16;
//                     it is the rotated group (cpu/linear/rotation.h), and linear rotates x
//                     int4: a tile begins with 16 + 16 float32, the rows' units of scales and of
//                     minima; a group is 256 bytes, elements 0 to 15 in low and 16 to 31 in high
//                     nibbles, then 16 + 16 bytes, its scales and minima in those units
//   q4_0 ... q6_k     rows of GGUF blocks as they lie in the file
//   q4_0_tiled ...    made of them by ops.repack: tiles of 16 rows, the last filled up with its
//                     last row. A group of 32 (q2_k: 16) along k has its values, as unsigned
//                     integers in the order above: nibbles, elements 0 to 15 in the low ones; then
//                     words of 4 bytes a row: pairs of bits, of elements 16 i + 4 j + b in bits 2 j
//                     of byte b of word i; single bits, of element 4 q + b in bit q of byte b. (5
//                     bits: nibbles and the fifth; 3: a pair and the third; 6: a nibble and a pair;
//                     8: a byte, plus 128.) q4_0 to iq4_nl: before them 16 float16 scales, and
//                     minima. K-quants: after a tile's groups the blocks' scales, last block first:
//                     d (and dmin) of the 16 rows, then their words or bytes of scales as in the
//                     file
// On cuda: a cache in int8 as above, or in fp8 (e4m3), which lies like int8; a weight in int8_mma
// or int4_mma, see cuda/linear/formats.cuh.
#pragma once

#include <cstring>

#include "common/dtype.h"

namespace codellama_rt {

constexpr int64_t kCacheGroup = 16;   // tokens
constexpr int64_t kInt4Step = 32;     // head_dim is a multiple of this in an int4 cache
constexpr int64_t kWeightTile = 16;   // rows
constexpr int64_t kWeightGroup = 32;  // of k, with one scale
constexpr int64_t kInt8Group = 64;    // the same of int8

constexpr bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}
constexpr bool is_cache_dtype(DType dtype) {
#ifdef CLRT_CUDA
  return is_float(dtype) || dtype == DType::kInt8 || dtype == DType::kFp8;
#else
  return is_float(dtype) || dtype == DType::kInt8 || dtype == DType::kInt4;
#endif
}
constexpr bool is_weight_dtype(DType dtype) {
#ifdef CLRT_CUDA
  return is_float(dtype) || dtype == DType::kInt8Mma || dtype == DType::kInt4Mma;
#else
  return is_float(dtype) || (dtype >= DType::kInt8 && dtype < DType::kFp8);
#endif
}

// Bytes of kCacheGroup tokens of one head, of keys or of values.
constexpr int64_t cache_group_bytes(DType dtype, int64_t head_dim, bool key) {
  switch (dtype) {
    case DType::kInt8:
    case DType::kFp8:
      return kCacheGroup * (head_dim + 4);
    case DType::kInt4:
      return kCacheGroup * (head_dim / 2 + (key ? head_dim / 8 : 0) + 4);
    default:
      return kCacheGroup * head_dim * item_size(dtype);
  }
}

// kOther if there is none of that name.
inline DType quantized_dtype(const char* name) {
  int dtype = int(DType::kInt8);
  while (DType(dtype) != DType::kOther && std::strcmp(name, dtype_name(DType(dtype))) != 0) ++dtype;
  return DType(dtype);
}

struct GgufBlock {
  int64_t elements, bytes;
};

// Of a GGUF format, in rows or in tiles.
constexpr GgufBlock gguf_block(DType dtype) {
  switch (is_gguf_tiled(dtype) ? DType(int(dtype) - kNumGgufFormats) : dtype) {
#define CLRT_FORMAT(format, name, elements, bytes) \
  case DType::k##format:                           \
    return {elements, bytes};
    CLRT_GGUF_FORMATS(CLRT_FORMAT)
#undef CLRT_FORMAT
    default:
      return {1, 0};
  }
}

// Bytes of a weight of n rows of k, k being a multiple of what a block holds.
constexpr int64_t weight_bytes(DType dtype, int64_t n, int64_t k) {
  const int64_t tiles = (n + kWeightTile - 1) / kWeightTile;
  const int64_t groups = (k + kWeightGroup - 1) / kWeightGroup;
  const GgufBlock block = gguf_block(dtype);
  if (is_gguf(dtype)) return n * (k / block.elements) * block.bytes;
  if (is_gguf_tiled(dtype)) return tiles * kWeightTile * (k / block.elements) * block.bytes;
  switch (dtype) {
    case DType::kInt8:
      return tiles * kWeightTile * ((k + kInt8Group - 1) / kInt8Group) * (kInt8Group + 2);
    case DType::kInt8Mma:
      return tiles * kWeightTile * groups * (kWeightGroup + 2);
    case DType::kInt4:
      return tiles * kWeightTile * (8 + groups * (kWeightGroup / 2 + 2));
    case DType::kInt4Mma:
      return tiles * kWeightTile * groups * (kWeightGroup / 2 + 2);
    default:
      return n * k * item_size(dtype);
  }
}

// Elements of k that a block of the format holds: k is a multiple of it.
constexpr int64_t weight_block(DType dtype) {
  if (dtype == DType::kInt8Mma || dtype == DType::kInt4Mma) return 64;
  return gguf_block(dtype).elements;
}

}  // namespace codellama_rt
