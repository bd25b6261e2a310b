// linear, many tokens: out[t, n] = sum_k x[t, k] * weight[n, k], float weights
// Shapes   as linear's
// Traffic  a weight once for every 128 tokens, x once for every 128 rows
// Limit    arithmetic from some 200 tokens on
// Tiling   a block of 8 warps takes 128 rows x 128 tokens, a warp 32 x 64; chunks of 32 of k come
// by
//          cp.async, kStages deep, 16 KiB each; 12 reads of 512 bytes feed 32 products of a warp
// Numerics the very sums of linear.cu: eighths of k in turn, each by the same products in the same
//          order, so a token's bits do not depend on how many there are
#include "linear.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256, kBlock = 128, kChunk = 32, kStages = 4;
constexpr int kRowBytes = kChunk * 2, kSideBytes = kBlock * kRowBytes;
constexpr int kWarpRows = 32, kWarpTokens = 64;

template <typename T>
struct Tiles {
  const LinearParams& p;
  const WeightTile& tile;
  int64_t first_token;

  // Chunk number `chunk` of both sides; past the end of rows, tokens or k: anything or zeros.
  CLRT_DEVICE void request(unsigned char* stage, int64_t chunk) const {
    for (int i = threadIdx.x; i < 2 * kBlock * 4; i += kThreads) {
      const bool is_x = i >= kBlock * 4;
      const int64_t row = i / 4 % kBlock, at = chunk * kChunk + i % 4 * 8;
      unsigned char* to = stage + (is_x ? kSideBytes : 0) + row * kRowBytes + i % 4 * 16;
      const int64_t index = (is_x ? first_token : tile.index * kBlock) + row;
      if (at >= p.k || index >= (is_x ? p.num_tokens : tile.n)) {
        *reinterpret_cast<uint4*>(to) = uint4{};
        continue;
      }
      const T* from = is_x ? static_cast<const T*>(p.x) + index * p.x_stride
                           : static_cast<const T*>(tile.weight) + index * p.k;
      ptx::copy16_async(to, from + at);
    }
    ptx::commit_copies();
  }
};

constexpr int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;
using Sums = float[kRowTiles][kTokenTiles][4];

template <typename T>
CLRT_DEVICE void multiply(const unsigned char* stage, Sums& sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto piece = [&](int side, int row) {
    return *reinterpret_cast<const uint4*>(stage + side * kSideBytes +
                                           (row + lane / 4) * kRowBytes + lane % 4 * 16);
  };
  uint4 rows[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    for (int half = 0; half < 2; ++half) {
      rows[i][half] = piece(0, warp % 4 * kWarpRows + 16 * i + 8 * half);
    }
  }
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const uint4 x = piece(1, warp / 4 * kWarpTokens + 8 * j);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const uint4 &low = rows[i][0], &high = rows[i][1];
      const uint32_t first[4] = {low.x, high.x, low.y, high.y};
      const uint32_t second[4] = {low.z, high.z, low.w, high.w};
      ptx::mma<T>(sums[i][j], first, x.x, x.y);
      ptx::mma<T>(sums[i][j], second, x.z, x.w);
    }
  }
}

CLRT_DEVICE void end_slice(Sums& totals, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        totals[i][j][c] = __fadd_rn(totals[i][j][c], sums[i][j][c]);
        sums[i][j][c] = 0;
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    linear_many_kernel(const __grid_constant__ LinearParams p) {
  const WeightTile tile = find_tile(p, blockIdx.y, kBlock);
  const Tiles<T> tiles{p, tile, blockIdx.x * int64_t(kBlock)};
  unsigned char* memory = shared_memory();
  const int64_t chunks = (p.k + kChunk - 1) / kChunk;
  for (int i = 0; i < kStages - 1; ++i) tiles.request(memory + i * 2 * kSideBytes, i);
  Sums totals = {}, sums = {};
  int slice = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // the chunk is there for all, and all are done with the one before it
    tiles.request(memory + (chunk + kStages - 1) % kStages * 2 * kSideBytes, chunk + kStages - 1);
    multiply<T>(memory + chunk % kStages * 2 * kSideBytes, sums);
    for (; slice < kSlices && chunk + 1 >= chunks * (slice + 1) / kSlices; ++slice) {
      end_slice(totals, sums);
    }
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t row =
            tile.index * kBlock + warp % 4 * kWarpRows + 16 * i + lane / 4 + c / 2 * 8;
        const int64_t token =
            tiles.first_token + warp / 4 * kWarpTokens + 8 * j + lane % 4 * 2 + c % 2;
        if (row < tile.n && token < p.num_tokens) {
          store_result(p, token, tile.first_out + row, totals[i][j][c]);
        }
      }
    }
  }
}

}  // namespace

void linear_many(const LinearParams& p) {
  const dim3 grid(ceil_div(p.num_tokens, kBlock), count_tiles(p, kBlock));
  const auto kernel =
      p.x_dtype == DType::kBFloat16 ? linear_many_kernel<bf16> : linear_many_kernel<f16>;
  launch("linear", kernel, grid, kThreads, kStages * 2 * kSideBytes, p);
}

}  // namespace cuda
}  // namespace codellama_rt
