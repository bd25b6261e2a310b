// rms_norm: out = x / sqrt(mean(x^2) + eps) * weight       (arXiv:1910.07467)
// add_rms_norm: the same of x + residual, which it also returns
// Shapes   x, residual, out, residual_out (num_tokens, dim); weight (dim)
// Traffic  num_tokens * dim * itemsize bytes: 2 passes' worth for rms_norm, 4 for add_rms_norm
// Limit    memory; a row (16 KiB at dim 4096 in float32) stays in L1 between its two passes
// Tiling   rows in groups of 32 KiB; one row is never shared by two threads
// Numerics fp32 statistics in kLanes partial sums and one tree; the sum x + residual is rounded to
//          its dtype before it is squared, so that both outputs speak of the same numbers
#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// Adds the residual in place of x, where there is one, and returns the sum of squares.
template <typename T>
float sum_of_squares(const T* x, const T* residual, T* residual_out, int64_t dim) {
  Vec squares = splat(0.0f);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int n = int(smaller(kLanes, dim - i));
    Vec v = n == kLanes ? load(x + i) : load_first(x + i, n);
    if (residual) {
      T rounded[kLanes];
      store(rounded, v + (n == kLanes ? load(residual + i) : load_first(residual + i, n)));
      std::memcpy(residual_out + i, rounded, n * sizeof(T));
      v = load(rounded);
    }
    squares = fma(v, v, squares);
  }
  return sum(squares);
}

template <typename T, typename W, typename Out>
void normalize(const T* x, const W* weight, Out* out, int64_t dim, float scale) {
  const Vec scales = splat(scale);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    store(out + i, load(x + i) * scales * load(weight + i));
  }
  for (; i < dim; ++i) out[i] = from_float<Out>(to_float(x[i]) * scale * to_float(weight[i]));
}

template <typename T, typename W, typename Out>
void norm_row(const RmsNormParams& p, int64_t offset) {
  const T* x = static_cast<const T*>(p.x) + offset;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + offset : nullptr;
  T* residual_out = residual ? static_cast<T*>(p.residual_out) + offset : nullptr;
  const float squares = sum_of_squares(x, residual, residual_out, p.dim);
  normalize(residual ? residual_out : x, static_cast<const W*>(p.weight),
            static_cast<Out*>(p.out) + offset, p.dim,
            1.0f / std::sqrt(squares / float(p.dim) + p.eps));
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  with_type(p.dtype, [&](auto type) {
    with_type(p.weight_dtype, [&](auto weight_type) {
      with_type(p.out_dtype, [&](auto out_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        using Out = decltype(out_type);
        for_each_row(p.num_tokens, p.dim * item_size(p.dtype),
                     [&](int64_t t) { norm_row<T, W, Out>(p, t * p.dim); });
      });
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
