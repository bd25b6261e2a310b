// embedding: rows of a table
// Shapes   token_ids (num_tokens); table (vocab_size, dim); out (num_tokens, dim)
// Traffic  num_tokens * dim * (table itemsize + out itemsize) bytes, once each
// Limit    the launch in decoding, memory in prefill
// Tiling   a block a token; 8 elements a thread at a time where memory is aligned for it
// Numerics exact where out's dtype is the table's or float32; rounded once otherwise
#include "cuda/runtime/common.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256, kCount = 8;

template <typename T, typename Out, int kEach>
__global__ void embedding_kernel(const __grid_constant__ EmbeddingParams p) {
  const T* row = static_cast<const T*>(p.table) + p.token_ids[blockIdx.x] * p.dim;
  Out* out = static_cast<Out*>(p.out) + blockIdx.x * p.dim;
  for (int64_t i = threadIdx.x * kEach; i < p.dim; i += kThreads * kEach) {
    for (int j = 0; j < kEach; ++j) out[i + j] = from_float<Out>(to_float(row[i + j]));
  }
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  with_type(p.table_dtype, [&](auto type) {
    with_type(p.out_dtype, [&](auto out_type) {
      using T = decltype(type);
      using Out = decltype(out_type);
      const auto kernel =
          p.dim % kCount == 0 ? embedding_kernel<T, Out, kCount> : embedding_kernel<T, Out, 1>;
      launch("embedding", kernel, dim3(p.num_tokens), kThreads, 0, p);
    });
  });
}

}  // namespace cuda
}  // namespace codellama_rt
