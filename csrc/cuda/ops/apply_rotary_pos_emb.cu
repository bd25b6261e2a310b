// apply_rotary_pos_emb: RoPE of queries and keys, in place               (arXiv:2104.09864)
// Shapes   query (num_tokens, n_heads, head_dim), key (num_tokens, n_kv_heads, head_dim); tables
//          and positions as in ops.h
// Traffic  2 * num_tokens * (n_heads + n_kv_heads) * head_dim * itemsize bytes
// Limit    memory; the launch below about 100 tokens
// Tiling   a warp a (token, head), which reads the whole head before it writes any of it
// Numerics fp32, rounded once
#include "cuda/ops/rotary.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kEach>
__global__ void rotary_kernel(const __grid_constant__ RotaryParams p) {
  const int64_t num_heads = p.n_heads + p.n_kv_heads;
  const int64_t row = blockIdx.x * int64_t(kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.num_tokens * num_heads) return;
  const int64_t token = row / num_heads, head = row % num_heads;
  T* x = head < p.n_heads
             ? static_cast<T*>(p.query) + (token * p.n_heads + head) * p.head_dim
             : static_cast<T*>(p.key) + (token * p.n_kv_heads + head - p.n_heads) * p.head_dim;
  const int first = threadIdx.x % kWarp * kEach, half = int(p.head_dim / 2);
  float out[kEach] = {}, other[kEach] = {};
  if (first < p.head_dim) {
    const Angles<kEach> angles(p.cos, p.sin, p.positions[token] * int64_t(half), first, half,
                               p.interleaved);
    load_piece(x + first, out);
    if (!p.interleaved) load_piece(x + other_half(first, half), other);
    angles.rotate(out, other);
  }
  __syncwarp();
  if (first < p.head_dim) store_piece(x + first, out);
}

}  // namespace

void apply_rotary_pos_emb(const RotaryParams& p) {
  require_head_dim("apply_rotary_pos_emb", p.head_dim);
  const dim3 grid(ceil_div(p.num_tokens * (p.n_heads + p.n_kv_heads), kThreads / kWarp));
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = p.head_dim <= kWarp * kSmallPiece ? rotary_kernel<T, kSmallPiece>
                                                          : rotary_kernel<T, kLargePiece>;
    launch("apply_rotary_pos_emb", kernel, grid, kThreads, 0, p);
  });
}

}  // namespace cuda
}  // namespace codellama_rt
