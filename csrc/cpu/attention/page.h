// Where a token's row lies in the head-major pages of a cache, and how it is written there.
#pragma once

#include <type_traits>

#include "cpu/linear/quantize_row.h"
#include "cpu/runtime/task.h"

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

// One token's row in one head's page of a cache (num_blocks, n_kv_heads, block_size, head_dim).
template <typename Cache>
class PageRow {
 public:
  PageRow(void* cache, bool key, int64_t slot, int64_t head, int64_t n_kv_heads, int64_t block_size,
          int64_t head_dim)
      : cache_(cache),
        key_(key),
        head_dim_(head_dim),
        row_((slot / block_size * n_kv_heads + head) * block_size + slot % block_size) {}

  static constexpr bool kQuantizes =
      std::is_same_v<Cache, int8_t> || std::is_same_v<Cache, Nibbles>;

  // Where floats of the cache's own dtype go: not for a quantised one.
  Cache* floats() const { return static_cast<Cache*>(cache_) + row_ * head_dim_; }

  // `scratch` may hold x, in float32, at its start.
  template <typename T>
  void write(const T* x, float* scratch) const {
    if constexpr (kQuantizes) {
      constexpr DType dtype = std::is_same_v<Cache, int8_t> ? DType::kInt8 : DType::kInt4;
      char* group = static_cast<char*>(cache_) +
                    row_ / kCacheGroup * cache_group_bytes(dtype, head_dim_, key_);
      int8_t* values = reinterpret_cast<int8_t*>(scratch + head_dim_ + kCacheGroup);
      widen(x, head_dim_, scratch);
      if constexpr (dtype == DType::kInt8) {
        quantize_int8(scratch, values, head_dim_, group, row_ % kCacheGroup);
      } else {
        quantize_int4(scratch, values, head_dim_, key_, group, row_ % kCacheGroup);
      }
    } else {
      convert(x, floats(), head_dim_);
    }
  }

 private:
  void* cache_;
  bool key_;
  int64_t head_dim_, row_;
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
