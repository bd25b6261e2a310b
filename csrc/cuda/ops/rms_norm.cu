// rms_norm: out = x / sqrt(mean(x^2) + eps) * weight       (arXiv:1910.07467)
// add_rms_norm: the same of x + residual, which it also returns
// Shapes   x, residual, out, residual_out (num_tokens, dim); weight (dim)
// Traffic  num_tokens * dim * itemsize bytes: 2 passes' worth for rms_norm, 4 for add_rms_norm; the
//          second reading of a row (8 KiB at dim 4096 in bf16) comes from L1
// Limit    memory in prefill; the launch in decoding: one block a token, 2 us
// Tiling   a block a row, 16 bytes a thread at a time
// Numerics fp32 statistics: a sum a thread in ascending order, then one tree; x + residual is
//          rounded to its dtype before it is squared, so both outputs speak of the same numbers
#include "cuda/runtime/common.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Adds the residual in place of x, where there is one; returns this thread's sum of squares.
template <typename T, int kCount>
CLRT_DEVICE float add_and_square(const T* x, const T* residual, T* residual_out, int64_t dim) {
  using Piece = Vector<T, kCount>;
  float squares = 0;
  for (int64_t i = threadIdx.x * kCount; i < dim; i += kThreads * kCount) {
    Piece piece = *reinterpret_cast<const Piece*>(x + i);
    if (residual) {
      const Piece added = *reinterpret_cast<const Piece*>(residual + i);
      for (int j = 0; j < kCount; ++j) {
        piece.elements[j] =
            from_float<T>(__fadd_rn(to_float(piece.elements[j]), to_float(added.elements[j])));
      }
      *reinterpret_cast<Piece*>(residual_out + i) = piece;
    }
    for (int j = 0; j < kCount; ++j) {
      const float v = to_float(piece.elements[j]);
      squares = __fmaf_rn(v, v, squares);
    }
  }
  return squares;
}

template <typename T, typename W, int kCount>
__global__ void rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x * p.dim;
  const T* x = static_cast<const T*>(p.x) + row;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row : nullptr;
  T* sum = p.residual ? static_cast<T*>(p.residual_out) + row : nullptr;
  const float squares =
      block_sum<kThreads>(add_and_square<T, kCount>(x, residual, sum, p.dim), scratch);
  const float scale = 1.0f / sqrtf(squares / float(p.dim) + p.eps);
  const T* normed = sum ? sum : x;  // a thread reads back what it wrote itself
  const W* weight = static_cast<const W*>(p.weight);
  T* out = static_cast<T*>(p.out) + row;
  for (int64_t i = threadIdx.x * kCount; i < p.dim; i += kThreads * kCount) {
    auto piece = *reinterpret_cast<const Vector<T, kCount>*>(normed + i);
    const auto weights = *reinterpret_cast<const Vector<W, kCount>*>(weight + i);
    for (int j = 0; j < kCount; ++j) {
      const float v = __fmul_rn(to_float(piece.elements[j]), scale);
      piece.elements[j] = from_float<T>(__fmul_rn(v, to_float(weights.elements[j])));
    }
    *reinterpret_cast<Vector<T, kCount>*>(out + i) = piece;
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  with_type(p.dtype, [&](auto type) {
    with_type(p.weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      using W = decltype(weight_type);
      constexpr int kCount = kVectorOf<T>;
      bool aligned = p.dim % kCount == 0 && is_aligned(p.weight, kCount * sizeof(W));
      for (const void* memory :
           {p.x, p.residual, (const void*)p.out, (const void*)p.residual_out}) {
        aligned = aligned && is_aligned(memory, 16);
      }
      const auto kernel = aligned ? rms_norm_kernel<T, W, kCount> : rms_norm_kernel<T, W, 1>;
      launch("rms_norm", kernel, dim3(p.num_tokens), kThreads, kThreads / kWarp * sizeof(float), p);
    });
  });
}

}  // namespace cuda
}  // namespace codellama_rt
