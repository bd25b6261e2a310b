// merge_attention: attention over two sets of keys from the results over each of them
//                  out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b)   (arXiv:2501.01005)
// Shapes   out_a, out_b, out (num_tokens, n_heads, head_dim); lse_a, lse_b, lse (num_tokens,
//          n_heads)
// Traffic  3 * num_tokens * n_heads * (head_dim * itemsize + 4) bytes, once each
// Limit    memory; the launch below some hundred rows
// Tiling   a warp a (token, head)
// Numerics fp32, the weights from float64; the greater lse is subtracted; a side without keys
//          (lse = -inf) is not read
#include "cuda/runtime/common.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void merge_attention_kernel(const __grid_constant__ MergeAttentionParams p) {
  const int64_t row = blockIdx.x * int64_t(kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.num_tokens * p.n_heads) return;
  const T* a = static_cast<const T*>(p.out_a) + row * p.head_dim;
  const T* b = static_cast<const T*>(p.out_b) + row * p.head_dim;
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
  const bool only_b = lse_a == -INFINITY, only_a = !only_b && lse_b == -INFINITY;
  const double ratio = only_a || only_b ? 0.0 : exp(-fabs(double(lse_a) - lse_b));
  const bool a_greater = only_a || (!only_b && lse_a > lse_b);
  const float greater = float(1 / (1 + ratio)), lesser = float(ratio / (1 + ratio));
  const float weight_a = a_greater ? greater : lesser, weight_b = a_greater ? lesser : greater;
  for (int64_t d = threadIdx.x % kWarp; d < p.head_dim; d += kWarp) {
    if (only_a || only_b) {
      out[d] = only_a ? a[d] : b[d];
    } else {
      out[d] =
          from_float<T>(__fmaf_rn(to_float(b[d]), weight_b, __fmul_rn(to_float(a[d]), weight_a)));
    }
  }
  __syncwarp();  // lse may be lse_a or lse_b: it is written when every lane has read both
  if (threadIdx.x % kWarp != 0) return;
  const float top = a_greater ? lse_a : lse_b;
  p.lse[row] = only_a || only_b ? top : float(top + log1p(ratio));
}

}  // namespace

void merge_attention(const MergeAttentionParams& p) {
  const dim3 grid(ceil_div(p.num_tokens * p.n_heads, kThreads / kWarp));
  with_type(p.dtype, [&](auto type) {
    launch("merge_attention", merge_attention_kernel<decltype(type)>, grid, kThreads, 0, p);
  });
}

}  // namespace cuda
}  // namespace codellama_rt
