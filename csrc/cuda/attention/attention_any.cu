// attention of any head_dim up to 256 and any storage types: the shapes that have no kernels by
//           matrix instructions (float32, small heads, mixed dtypes)
// Shapes   as in ops.h
// Traffic  keys and values are read once a row, by a lane a key: many times what must be
// Limit    latency; none of Code Llama's shapes comes here in bf16 or fp16
// Tiling   a warp a (token, head); 32 keys at a time, ascending, a key a lane, then an element a
// lane Numerics fp32; keys that a row does not see are not read
#include "cuda/attention/attention.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 128, kMostElements = 256 / kWarp;

template <typename Cache>
CLRT_DEVICE float cache_element(const void* cache, int64_t row, int dim, int d) {
  if constexpr (kIsQuantized<Cache>) {
    const auto* bytes = static_cast<const unsigned char*>(cache);
    const uint32_t code = bytes[quantized_row_offset(row, dim) + d];
    const float scale = *reinterpret_cast<const float*>(bytes + quantized_scale_offset(row, dim));
    if constexpr (std::is_same_v<Cache, int8_row>) return float(int8_t(code)) * scale;
    const float magnitude = bits_float((code & 0x7f) << 20) * 0x1p120f;
    return (code & 0x80 ? -magnitude : magnitude) * scale;
  } else {
    return to_float(static_cast<const Cache*>(cache)[row * dim + d]);
  }
}

struct AnyParams {
  Attention a;
  int head_dim;
};

CLRT_DEVICE Segment row_segment(const Attention& a, int64_t row, int* row_in_head) {
  const int token = int(row / a.n_heads), head = int(row % a.n_heads), group = group_size(a);
  int seq = 0;
  while (a.cu_seqlens_q[seq + 1] <= token) ++seq;
  *row_in_head = (token - a.cu_seqlens_q[seq]) * group + head % group;
  return {seq, head / group, 0, 0, 0, visible_keys(a, seq, *row_in_head)};
}

template <typename T, typename Cache>
__global__ void attend_any_kernel(const __grid_constant__ AnyParams p) {
  const Attention& a = p.a;
  const int lane = threadIdx.x % kWarp, dim = p.head_dim;
  const int64_t row = blockIdx.x * int64_t(kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= int64_t(a.num_tokens) * a.n_heads) return;
  int row_in_head;
  const Segment s = row_segment(a, row, &row_in_head);
  const T* query = static_cast<const T*>(a.query) + row * dim;
  // Of a contiguous matrix, a row is (key, kv head).
  const auto cache_row = [&](int key) {
    const int64_t at = key_row(a, s.seq, s.kv_head, key);
    return a.block_tables ? at : at * a.n_kv_heads + s.kv_head;
  };
  float m = -INFINITY, l = 0, o[kMostElements] = {};
  for (int first = 0; first < s.end_key; first += kWarp) {
    const int count = s.end_key - first < kWarp ? s.end_key - first : kWarp;
    float score = -INFINITY;
    if (lane < count) {
      const int64_t at = cache_row(first + lane);
      score = 0;
      for (int d = 0; d < dim; ++d) {
        score = __fmaf_rn(to_float(query[d]), cache_element<Cache>(a.key, at, dim, d), score);
      }
      score = __fmul_rn(score, a.scale_log2);
    }
    float top = score;
    for (int step = kWarp / 2; step > 0; step /= 2) {
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    }
    top = fmaxf(top, m);
    const float weight = lane < count ? exp2f(score - top) : 0, before = exp2f(m - top);
    m = top;
    l = __fmaf_rn(l, before, warp_sum(weight));
    for (float& x : o) x = __fmul_rn(x, before);
    for (int key = 0; key < count; ++key) {
      const float w = __shfl_sync(kAllLanes, weight, key);
      const int64_t at = cache_row(first + key);
#pragma unroll
      for (int i = 0; i < kMostElements; ++i) {
        const int d = lane + i * kWarp;
        if (d < dim) o[i] = __fmaf_rn(w, cache_element<Cache>(a.value, at, dim, d), o[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMostElements; ++i) {
    const int d = lane + i * kWarp;
    if (d < dim) static_cast<T*>(a.out)[row * dim + d] = from_float<T>(l == 0 ? 0.0f : o[i] / l);
  }
  if (lane == 0) a.lse[row] = l == 0 ? -INFINITY : __fmaf_rn(m, 0.693147180559945f, logf(l));
}

}  // namespace

void attend_any(const Attention& a, const AttentionShape& shape) {
  const dim3 grid(ceil_div(int64_t(a.num_tokens) * a.n_heads, kThreads / kWarp));
  with_type(shape.dtype, [&](auto type) {
    with_cache_type("attention", shape.cache_dtype, [&](auto cache_type) {
      launch("attention", attend_any_kernel<decltype(type), decltype(cache_type)>, grid, kThreads,
             0, AnyParams{a, int(shape.head_dim)});
    });
  });
}

}  // namespace cuda
}  // namespace codellama_rt
