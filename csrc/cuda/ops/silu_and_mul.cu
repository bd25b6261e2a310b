// silu_and_mul: out = gate / (1 + e^-gate) * up             (SwiGLU, arXiv:2002.05202)
// Shapes   gate_up (num_tokens, 2 * hidden_dim): gate, then up; out (num_tokens, hidden_dim)
// Traffic  3 * num_tokens * hidden_dim * itemsize bytes, once each
// Limit    memory in prefill, the launch in decoding
// Tiling   16 bytes of each a thread; a block within one token
// Numerics fp32, rounded once; e^-gate may overflow to infinity, which gives the right 0
#include "cuda/runtime/common.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kCount>
__global__ void silu_and_mul_kernel(const __grid_constant__ SiluAndMulParams p) {
  using Piece = Vector<T, kCount>;
  const unsigned blocks = unsigned((p.hidden_dim + kThreads * kCount - 1) / (kThreads * kCount));
  const int64_t token = blockIdx.x / blocks;  // 32 bits: a division of 64 takes a hundred more
  const int64_t at = (int64_t(blockIdx.x % blocks) * kThreads + threadIdx.x) * kCount;
  if (at >= p.hidden_dim) return;
  const T* gate = static_cast<const T*>(p.gate_up) + token * 2 * p.hidden_dim + at;
  Piece piece = *reinterpret_cast<const Piece*>(gate);
  const Piece up = *reinterpret_cast<const Piece*>(gate + p.hidden_dim);
  for (int j = 0; j < kCount; ++j) {
    const float g = to_float(piece.elements[j]);
    const float silu = g / __fadd_rn(1.0f, expf(-g));
    piece.elements[j] = from_float<T>(__fmul_rn(silu, to_float(up.elements[j])));
  }
  *reinterpret_cast<Piece*>(static_cast<T*>(p.out) + token * p.hidden_dim + at) = piece;
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kCount = kVectorOf<T>;
    const bool aligned =
        p.hidden_dim % kCount == 0 && is_aligned(p.gate_up, 16) && is_aligned(p.out, 16);
    const int64_t blocks = ceil_div(p.hidden_dim, kThreads * (aligned ? kCount : 1));
    launch("silu_and_mul", aligned ? silu_and_mul_kernel<T, kCount> : silu_and_mul_kernel<T, 1>,
           dim3(blocks * p.num_tokens), kThreads, 0, p);
  });
}

}  // namespace cuda
}  // namespace codellama_rt
