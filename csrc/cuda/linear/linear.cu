// linear: out[t, n] = sum_k x[t, k] * weight[n, k]; up to three weights as one
// Shapes   x (num_tokens, k); weights (n[i], k); out (num_tokens, sum(n))
// Traffic  weights once for up to 32 tokens, once for every 128 from 33 on
// Limit    memory read up to 32 tokens (32 FLOP/byte in bf16); arithmetic beyond 100 or so
// Tiling   few tokens: a block of 8 warps takes 16 rows of the weight, each warp an eighth of k,
//          and keeps 4 chunks (4 KiB) a warp in flight; more: linear_many.cu
// Numerics products of 16-bit numbers, sums in fp32: eighths of k, each ascending, added in
//          ascending order, whatever the number of tokens; quantised weights exactly to bf16, a sum
//          of 32 times its scale; x in the weight's type, over a quantised weight in bf16
#include "cuda/linear/linear.cuh"
#include "cuda/runtime/launchers.h"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = kSlices * kWarp, kAhead = 4;

// One warp's share of k for 16 rows of the weight and 8 * kTokenTiles tokens.
template <typename T, typename W, int kTokenTiles>
CLRT_DEVICE void multiply(const LinearParams& p, const WeightTile& tile, int64_t first_token,
                          int64_t begin, int64_t end, float (&sums)[kTokenTiles][4]) {
  // Unrolled; of many tokens, registers are short.
  [[maybe_unused]] constexpr int kParts = kTokenTiles == 1 ? W::kSteps / 2 : 1;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  typename W::Piece ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) ahead[i] = W::load(tile.weight, tile.n, p.k, tile.index, begin + i);
  }
  for (int64_t base = begin; base < end; base += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t chunk = base + i;
      if (chunk >= end) break;
      const typename W::Piece piece = ahead[i];
      if (chunk + kAhead < end) {
        ahead[i] = W::load(tile.weight, tile.n, p.k, tile.index, chunk + kAhead);
      }
#pragma unroll kParts
      for (int part = 0; part < W::kSteps / 2; ++part) {
        uint32_t a[2][4];
        for (int step = 0; step < 2; ++step) W::fragment(piece, 2 * part + step, a[step]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int64_t token = first_token + 8 * j + g, at = chunk * W::kChunk + 32 * part + 8 * t;
          const T* x = static_cast<const T*>(p.x) + token * p.x_stride + at;
          const bool inside = token < p.num_tokens && at < p.k;
          uint32_t b[4];
          to_fragments<T, typename W::Math>(inside ? *reinterpret_cast<const uint4*>(x) : uint4{},
                                            b);
          float group[4] = {};
          float (&into)[4] = W::kScaled ? group : sums[j];
          ptx::mma<typename W::Math>(into, a[0], b[0], b[1]);
          ptx::mma<typename W::Math>(into, a[1], b[2], b[3]);
          if constexpr (W::kScaled) {
            for (int c = 0; c < 4; ++c) {
              sums[j][c] = __fmaf_rn(group[c], W::scale(piece, c / 2, part), sums[j][c]);
            }
          }
        }
      }
    }
  }
}

template <typename T, typename W, int kTokenTiles>
__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ LinearParams p) {
  const WeightTile tile = find_tile(p, blockIdx.x, kTileRows);
  const int64_t first_token = blockIdx.y * int64_t(8 * kTokenTiles);
  const int slice = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t chunks = (p.k + W::kChunk - 1) / W::kChunk;
  float sums[kTokenTiles][4] = {};
  multiply<T, W, kTokenTiles>(p, tile, first_token, chunks * slice / kSlices,
                              chunks * (slice + 1) / kSlices, sums);
  // (slice, token, row); a row more than 16 apart, so that a warp's writes meet few banks twice
  constexpr int kTokens = 8 * kTokenTiles, kStride = kTileRows + 1;
  float* parts = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    for (int c = 0; c < 4; ++c) {
      const int token = 8 * j + lane % 4 * 2 + c % 2, row = lane / 4 + c / 2 * 8;
      parts[(slice * kTokens + token) * kStride + row] = sums[j][c];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kTileRows; i += kThreads) {
    const int token = i / kTileRows, row = i % kTileRows;
    if (first_token + token >= p.num_tokens || tile.index * kTileRows + row >= tile.n) continue;
    float total = 0;
    for (int s = 0; s < kSlices; ++s) {
      total = __fadd_rn(total, parts[(s * kTokens + token) * kStride + row]);
    }
    store_result(p, first_token + token, tile.first_out + tile.index * kTileRows + row, total);
  }
}

template <typename T, typename W, int kTokenTiles>
void launch_few(const LinearParams& p) {
  constexpr size_t kBytes = kSlices * 8 * kTokenTiles * (kTileRows + 1) * sizeof(float);
  launch("linear", linear_kernel<T, W, kTokenTiles>,
         dim3(count_tiles(p, kTileRows), ceil_div(p.num_tokens, 8 * kTokenTiles)), kThreads, kBytes,
         p);
}

template <typename T, typename W>
void launch_linear(const LinearParams& p) {
  if (p.num_tokens <= 8) return launch_few<T, W, 1>(p);
  launch_few<T, W, kFewTokens / 8>(p);
}

void check_supported(const LinearParams& p) {
  if (p.x_dtype == DType::kFloat32 || p.weight_dtype == DType::kFloat32) {
    refuse("linear",
           "x and weight must be float16 or bfloat16, or the weight int8_mma or int4_mma; "
           "load the model with dtype='bfloat16'");
  }
  if (is_float(p.weight_dtype) && p.weight_dtype != p.x_dtype) {
    refuse("linear", std::string("x must be in the weight's dtype, ") + dtype_name(p.weight_dtype));
  }
  bool aligned = p.k % 8 == 0 && p.x_stride % 8 == 0 && is_aligned(p.x, 16);
  for (int i = 0; i < p.num_weights; ++i) aligned = aligned && is_aligned(p.weights[i], 16);
  if (!aligned) refuse("linear", "rows of x and weight must begin at multiples of 16 bytes");
}

}  // namespace

void linear(const LinearParams& p) {
  check_supported(p);
  if (p.num_tokens == 0) return;
  if (p.num_tokens > kFewTokens) return linear_many(p);
  const bool is_bf16 = p.x_dtype == DType::kBFloat16;
  switch (p.weight_dtype) {
    case DType::kInt8Mma:
      return is_bf16 ? launch_linear<bf16, Int8Weight>(p) : launch_linear<f16, Int8Weight>(p);
    case DType::kInt4Mma:
      return is_bf16 ? launch_linear<bf16, Int4Weight>(p) : launch_linear<f16, Int4Weight>(p);
    default:
      return is_bf16 ? launch_linear<bf16, FloatWeight<bf16>>(p)
                     : launch_linear<f16, FloatWeight<f16>>(p);
  }
}

}  // namespace cuda
}  // namespace codellama_rt
