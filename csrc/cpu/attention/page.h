// Where a token's row lies in the blocks of a cache, and how it is written there.
#pragma once

#include <type_traits>

#include "cpu/linear/quantize_row.h"
#include "cpu/runtime/task.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// As with_type, for the dtypes of a cache.
template <typename Body>
inline void with_cache_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kInt8:
      return body(int8_t{});
    case DType::kInt4:
      return body(Nibbles{});
    default:
      return with_type(dtype, body);
  }
}

// What PageRow::write works in, on its thread.
inline float* page_scratch(int64_t head_dim) {
  const int64_t floats = 2 * (head_dim + kCacheGroup);
  return static_cast<float*>(scratch(Scratch::kTask, floats * sizeof(float)));
}

// One token's row in one head's part of a block.
template <typename Cache>
class PageRow {
 public:
  PageRow(void* cache, const CacheStrides& strides, bool key, int64_t slot, int64_t head,
          int64_t block_size, int64_t head_dim)
      : key_(key), head_dim_(head_dim), row_(slot % block_size % kCacheGroup) {
    const int64_t group = slot % block_size / kCacheGroup;
    at_ = static_cast<char*>(cache) + slot / block_size * strides.block + head * strides.head +
          group * strides.group + row_ * strides.token;
  }

  static constexpr bool kQuantizes =
      std::is_same_v<Cache, int8_t> || std::is_same_v<Cache, Nibbles>;

  // Where floats of the cache's own dtype go: not for a quantised one.
  Cache* floats() const { return reinterpret_cast<Cache*>(at_); }

  // `scratch` may hold x, in float32, at its start.
  template <typename T>
  void write(const T* x, float* scratch) const {
    if constexpr (kQuantizes) {
      int8_t* values = reinterpret_cast<int8_t*>(scratch + head_dim_ + kCacheGroup);
      widen(x, head_dim_, scratch);
      if constexpr (std::is_same_v<Cache, int8_t>) {
        quantize_int8(scratch, values, head_dim_, at_, row_);
      } else {
        quantize_int4(scratch, values, head_dim_, key_, at_, row_);
      }
    } else {
      convert(x, floats(), head_dim_);
    }
  }

 private:
  char* at_;  // the row; in a quantised cache its group
  bool key_;
  int64_t head_dim_, row_;  // the latter within its group
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
