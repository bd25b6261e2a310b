// apply_rotary_pos_emb: rotates every head of query and key by its token's position, in place
//                                                           (RoFormer, arXiv:2104.09864)
// Shapes   query (num_tokens, n_heads, head_dim), key (num_tokens, n_kv_heads, head_dim);
//          cos, sin (num_positions, head_dim / 2); positions (num_tokens)
// Traffic  2 * num_tokens * (n_heads + n_kv_heads) * head_dim * itemsize bytes, and a row of the
//          tables a token
// Limit    memory
// Tiling   tokens in groups of 32 KiB
// Numerics fp32; the tables come from float64 angles, exact to position 131,072 and beyond
#include "cpu/ops/rotary.h"
#include "cpu/runtime/task.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void apply_rotary_pos_emb(const RotaryParams& p) {
  const int64_t half = p.head_dim / 2, query_row = p.n_heads * p.head_dim,
                key_row = p.n_kv_heads * p.head_dim;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_row(p.num_tokens, 2 * (query_row + key_row) * item_size(p.dtype), [&](int64_t t) {
      const float* cos = p.cos + p.positions[t] * half;
      const float* sin = p.sin + p.positions[t] * half;
      for (int64_t h = 0; h < p.n_heads; ++h) {
        T* x = static_cast<T*>(p.query) + t * p.query_stride + h * p.head_dim;
        rotate_head(x, cos, sin, x, half, p.interleaved);
      }
      for (int64_t h = 0; h < p.n_kv_heads; ++h) {
        T* x = static_cast<T*>(p.key) + t * p.key_stride + h * p.head_dim;
        rotate_head(x, cos, sin, x, half, p.interleaved);
      }
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
