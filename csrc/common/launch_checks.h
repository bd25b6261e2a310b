// What several launchers check alike, and how they read a view's memory.
#pragma once

#include <cmath>
#include <string>

#include "common/check.h"

namespace codellama_rt {
namespace launch {

inline const int32_t* ints(const TensorView& t) { return static_cast<const int32_t*>(t.data); }
inline float* floats(const TensorView& t) { return static_cast<float*>(t.data); }

inline void check_eps(Check& check, float eps) {
  check.require(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative");
}

inline float usual_scale(int64_t head_dim) { return 1.0f / std::sqrt(float(head_dim)); }

// 0 stands for the usual one.
inline float attention_scale(Check& check, float scale, int64_t head_dim) {
  check.require(std::isfinite(scale) && scale >= 0, "scale must be finite and not negative");
  return scale == 0 ? usual_scale(head_dim) : scale;
}

inline void check_heads(Check& check, int64_t n_heads, int64_t n_kv_heads) {
  check.require(n_kv_heads > 0 && n_heads % n_kv_heads == 0,
                "n_heads=" + std::to_string(n_heads) +
                    " must be a multiple of n_kv_heads=" + std::to_string(n_kv_heads));
}

inline void check_block_size(Check& check, int64_t block_size) {
  check.require(block_size > 0 && block_size % 16 == 0,
                "block_size must be a multiple of 16, got " + std::to_string(block_size));
}

inline void check_even(Check& check, int64_t head_dim) {
  check.require(head_dim > 0 && head_dim % 2 == 0,
                "head_dim must be even, got " + std::to_string(head_dim));
}

// Each sequence's length covers its queries, fits its table, and its pages exist.
inline void check_pages(Check& check, const TensorView& block_tables, const TensorView& seq_lens,
                        const TensorView& cu_seqlens_q, int64_t num_blocks, int64_t block_size) {
  if (!kValuesAtHand) return;
  const int64_t max_blocks = block_tables.shape[1];
  for (int64_t s = 0; s < seq_lens.shape[0]; ++s) {
    const int64_t length = ints(seq_lens)[s];
    const int64_t queries = ints(cu_seqlens_q)[s + 1] - ints(cu_seqlens_q)[s];
    if (length < queries || length > max_blocks * block_size) {
      check.require(false, "seq_lens[" + std::to_string(s) + "]=" + std::to_string(length) +
                               " must be at least its queries (" + std::to_string(queries) +
                               ") and at most max_blocks * block_size = " +
                               std::to_string(max_blocks * block_size));
    }
    for (int64_t i = 0; i < (length + block_size - 1) / block_size; ++i) {
      const int64_t block = ints(block_tables)[s * max_blocks + i];
      if (block >= 0 && block < num_blocks) continue;
      check.require(false, "block_tables[" + std::to_string(s) + ", " + std::to_string(i) +
                               "]=" + std::to_string(block) +
                               " must be in [0, num_blocks=" + std::to_string(num_blocks) + ")");
    }
  }
}

}  // namespace launch
}  // namespace codellama_rt
