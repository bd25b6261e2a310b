// linear, many tokens: out[t, n] = sum_k x[t, k] * weight[n, k]
// Shapes   as linear's
// Traffic  a weight once for every 128 tokens, x once for every 128 rows
// Limit    arithmetic from some 200 tokens on
// Tiling   a block of 8 warps takes 128 rows x 128 tokens, a warp 32 x 64; chunks of 32 of k
//          (quantised: 64) come by cp.async, kStages deep; 12 reads of 512 bytes feed 32 products
//          of a warp. A quantised weight stays so until it is in registers: a warp makes 16 bits of
//          it once for 64 tokens, some 80 instructions beside 32 products. A dequantised copy in
//          memory would be rounded there: other bits than the decoding step's
// Numerics the very sums of linear.cu: eighths of k in turn, each by the same products in the same
//          order, so a token's bits do not depend on how many there are
#include "cuda/linear/linear.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256, kBlock = 128, kPart = 32, kStages = 4;
constexpr int kRowBytes = kPart * 2, kPartBytes = kBlock * kRowBytes;
constexpr int kWarpRows = 32, kWarpTokens = 64;
constexpr int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;
using Sums = float[kRowTiles][kTokenTiles][4];

// A block's share: rows of a weight and tokens.
struct Share {
  const LinearParams& p;
  WeightTile tile;
  int64_t first_token;
};

// kBlock rows of a matrix at elements [at, at + kPart); past its end or k's: zeros.
template <typename T>
CLRT_DEVICE void request_rows(unsigned char* to, const void* matrix, int64_t stride, int64_t first,
                              int64_t end, int64_t at, int64_t k) {
  for (int i = threadIdx.x; i < kBlock * 4; i += kThreads) {
    const int64_t row = first + i / 4, column = at + i % 4 * 8;
    if (column >= k || row >= end) {
      *reinterpret_cast<uint4*>(to + i * 16) = uint4{};
    } else {
      ptx::copy16_async(to + i * 16, static_cast<const T*>(matrix) + row * stride + column);
    }
  }
}
template <typename T>
CLRT_DEVICE void request_x(const Share& s, unsigned char* to, int64_t at) {
  request_rows<T>(to, s.p.x, s.p.x_stride, s.first_token, s.p.num_tokens, at, s.p.k);
}
// This lane's 16 bytes of a part's row `row` + its group of four.
CLRT_DEVICE uint4 read_row(const unsigned char* part, int row) {
  const int lane = threadIdx.x % kWarp;
  return *reinterpret_cast<const uint4*>(part + (row + lane / 4) * kRowBytes + lane % 4 * 16);
}
CLRT_DEVICE int warp_row() { return threadIdx.x / kWarp % 4 * kWarpRows; }
CLRT_DEVICE int warp_token() { return threadIdx.x / kWarp / 4 * kWarpTokens; }

// A stage: the weight's part, then x's.
template <typename T>
struct FloatSides {
  static constexpr int kChunk = kPart, kStageBytes = 2 * kPartBytes;

  CLRT_DEVICE static void request(const Share& s, unsigned char* stage, int64_t chunk) {
    const int64_t at = chunk * kChunk;
    request_rows<T>(stage, s.tile.weight, s.p.k, s.tile.index * kBlock, s.tile.n, at, s.p.k);
    request_x<T>(s, stage + kPartBytes, at);
  }
  CLRT_DEVICE static void multiply(const unsigned char* stage, Sums& sums) {
    uint4 rows[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      for (int half = 0; half < 2; ++half) {
        rows[i][half] = read_row(stage, warp_row() + 16 * i + 8 * half);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const uint4 x = read_row(stage + kPartBytes, warp_token() + 8 * j);
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
};

// A stage: two parts of x, then the tiles of kTileRows rows of the weight.
template <typename T, typename W>
struct QuantizedSides {
  static constexpr int kChunk = W::kChunk, kParts = kChunk / kPart, kTiles = kBlock / kTileRows;
  static constexpr int kStageBytes = kParts * kPartBytes + kTiles * int(W::kTileBytes);

  CLRT_DEVICE static void request(const Share& s, unsigned char* stage, int64_t chunk) {
    constexpr int kPieces = int(W::kTileBytes) / 16;
    for (int part = 0; part < kParts; ++part) {
      request_x<T>(s, stage + part * kPartBytes, chunk * kChunk + part * kPart);
    }
    const int64_t chunks = s.p.k / kChunk, tiles = (s.tile.n + kTileRows - 1) / kTileRows;
    if (chunk >= chunks) return;
    const auto* memory = static_cast<const unsigned char*>(s.tile.weight);
    for (int i = threadIdx.x; i < kTiles * kPieces; i += kThreads) {
      const int64_t tile = s.tile.index * kTiles + i / kPieces;
      if (tile >= tiles) return;  // nobody looks at what comes of them
      ptx::copy16_async(stage + kParts * kPartBytes + i * 16,
                        memory + (tile * chunks + chunk) * W::kTileBytes + i % kPieces * 16);
    }
  }
  CLRT_DEVICE static void multiply(const unsigned char* stage, Sums& sums) {
    const unsigned char* tiles =
        stage + kParts * kPartBytes + warp_row() / kTileRows * int(W::kTileBytes);
    typename W::Piece pieces[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) pieces[i] = W::read(tiles + i * int(W::kTileBytes));
#pragma unroll 1  // registers are short
    for (int part = 0; part < kParts; ++part) {
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        for (int step = 0; step < 2; ++step) W::fragment(pieces[i], 2 * part + step, a[i][step]);
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        uint32_t b[4];
        to_fragments<T, bf16>(read_row(stage + part * kPartBytes, warp_token() + 8 * j), b);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          float group[4] = {};
          ptx::mma<bf16>(group, a[i][0], b[0], b[1]);
          ptx::mma<bf16>(group, a[i][1], b[2], b[3]);
          for (int c = 0; c < 4; ++c) {
            sums[i][j][c] = __fmaf_rn(group[c], W::scale(pieces[i], c / 2, part), sums[i][j][c]);
          }
        }
      }
    }
  }
};

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

CLRT_DEVICE void store(const Share& s, const Sums& totals) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t row = s.tile.index * kBlock + warp_row() + 16 * i + lane / 4 + c / 2 * 8;
        const int64_t token = s.first_token + warp_token() + 8 * j + lane % 4 * 2 + c % 2;
        if (row < s.tile.n && token < s.p.num_tokens) {
          store_result(s.p, token, s.tile.first_out + row, totals[i][j][c]);
        }
      }
    }
  }
}

template <typename Sides>
__global__ void __launch_bounds__(kThreads, 1)
    linear_many_kernel(const __grid_constant__ LinearParams p) {
  const Share share{p, find_tile(p, blockIdx.y, kBlock), blockIdx.x * int64_t(kBlock)};
  unsigned char* memory = shared_memory();
  const auto request = [&](int64_t chunk) {
    Sides::request(share, memory + chunk % kStages * Sides::kStageBytes, chunk);
    ptx::commit_copies();
  };
  const int64_t chunks = (p.k + Sides::kChunk - 1) / Sides::kChunk;
  for (int i = 0; i < kStages - 1; ++i) request(i);
  Sums totals = {}, sums = {};
  int slice = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // the chunk is there for all, and all are done with the one before it
    request(chunk + kStages - 1);
    Sides::multiply(memory + chunk % kStages * Sides::kStageBytes, sums);
    for (; slice < kSlices && chunk + 1 >= chunks * (slice + 1) / kSlices; ++slice) {
      end_slice(totals, sums);
    }
  }
  store(share, totals);
}

template <typename Sides>
void launch_sides(const LinearParams& p) {
  const dim3 grid(ceil_div(p.num_tokens, kBlock), count_tiles(p, kBlock));
  launch("linear", linear_many_kernel<Sides>, grid, kThreads, kStages * Sides::kStageBytes, p);
}

template <typename T>
void launch_over(const LinearParams& p) {
  switch (p.weight_dtype) {
    case DType::kInt8Mma:
      return launch_sides<QuantizedSides<T, Int8Weight>>(p);
    case DType::kInt4Mma:
      return launch_sides<QuantizedSides<T, Int4Weight>>(p);
    default:
      return launch_sides<FloatSides<T>>(p);
  }
}

}  // namespace

void linear_many(const LinearParams& p) {
  p.x_dtype == DType::kBFloat16 ? launch_over<bf16>(p) : launch_over<f16>(p);
}

}  // namespace cuda
}  // namespace codellama_rt
