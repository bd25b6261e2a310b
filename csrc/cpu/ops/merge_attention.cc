// merge_attention: attention over two sets of keys from the results over each of them
//                  out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b)   (arXiv:2501.01005)
// Shapes   out_a, out_b, out (num_tokens, n_heads, head_dim); lse_a, lse_b, lse (num_tokens,
//          n_heads)
// Traffic  3 * num_tokens * n_heads * (head_dim * itemsize + 4) bytes, once each
// Limit    memory
// Tiling   rows of one (token, head) in groups of 32 KiB
// Numerics fp32; the greater lse is subtracted; a side without keys (lse = -inf) is not read
#include <cmath>

#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

template <typename T>
void merge_row(const T* a, float weight_a, const T* b, float weight_b, T* out, int64_t head_dim) {
  const Vec wa = splat(weight_a), wb = splat(weight_b);
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    store(out + d, fma(load(b + d), wb, load(a + d) * wa));
  }
  if (d < head_dim) {
    const int left = int(head_dim - d);
    store_first(out + d, fma(load_first(b + d, left), wb, load_first(a + d, left) * wa), left);
  }
}

template <typename T>
void merge_head(const MergeAttentionParams& p, int64_t row) {
  const T* a = static_cast<const T*>(p.out_a) + row * p.head_dim;
  const T* b = static_cast<const T*>(p.out_b) + row * p.head_dim;
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
  if (lse_a == -INFINITY || lse_b == -INFINITY) {
    const bool take_b = lse_a == -INFINITY;
    std::memmove(out, take_b ? b : a, p.head_dim * sizeof(T));
    p.lse[row] = take_b ? lse_b : lse_a;
    return;
  }
  const double ratio = std::exp(-std::fabs(double(lse_a) - lse_b));  // the lesser over the greater
  const float lesser = float(ratio / (1 + ratio)), greater = float(1 / (1 + ratio));
  const bool a_greater = lse_a > lse_b;
  merge_row(a, a_greater ? greater : lesser, b, a_greater ? lesser : greater, out, p.head_dim);
  p.lse[row] = float((a_greater ? lse_a : lse_b) + std::log1p(ratio));
}

}  // namespace

void merge_attention(const MergeAttentionParams& p) {
  const int64_t row_bytes = 3 * p.head_dim * item_size(p.dtype);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_row(p.num_tokens * p.n_heads, row_bytes, [&](int64_t row) { merge_head<T>(p, row); });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
