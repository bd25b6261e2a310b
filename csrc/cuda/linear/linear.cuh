// What the kernels of linear share: where a tile of rows lies, the order of sums, how results go
// out.
#pragma once

#include "cuda/linear/formats.cuh"

namespace codellama_rt {
namespace cuda {

constexpr int kSlices = 8;      // eighths of k, summed one after another whoever computes them
constexpr int kFewTokens = 32;  // up to this many a weight's tile is met by all tokens at once

// `rows` rows of one of the weights.
struct WeightTile {
  const void* weight;
  int64_t n, index, first_out;  // rows of the weight; number of the tile in it; its first column
};

CLRT_DEVICE WeightTile find_tile(const LinearParams& p, int64_t index, int rows) {
  WeightTile tile{p.weights[0], p.n[0], index, 0};
  for (int i = 0; i + 1 < p.num_weights; ++i) {
    const int64_t tiles = (tile.n + rows - 1) / rows;
    if (tile.index < tiles) break;
    tile.index -= tiles;
    tile.first_out += tile.n;
    tile.weight = p.weights[i + 1];
    tile.n = p.n[i + 1];
  }
  return tile;
}

inline int64_t count_tiles(const LinearParams& p, int rows) {
  int64_t tiles = 0;
  for (int i = 0; i < p.num_weights; ++i) tiles += ceil_div(p.n[i], rows);
  return tiles;
}

CLRT_DEVICE void store_result(const LinearParams& p, int64_t token, int64_t column, float value) {
  const int64_t at = token * p.out_stride + column;
  switch (p.out_dtype) {
    case DType::kBFloat16:
      static_cast<bf16*>(p.out)[at] = from_float<bf16>(value);
      break;
    case DType::kFloat16:
      static_cast<f16*>(p.out)[at] = from_float<f16>(value);
      break;
    default:
      static_cast<float*>(p.out)[at] = value;
  }
}

// 8 elements of a token, of every 32, as two steps of a product take them.
template <typename T, typename Math>
CLRT_DEVICE void to_fragments(const uint4& x, uint32_t (&b)[4]) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  for (int i = 0; i < 4; ++i) {
    b[i] = words[i];
    if constexpr (!std::is_same_v<T, Math>) {
      b[i] = pack<Math>(to_float(T{uint16_t(words[i])}), to_float(T{uint16_t(words[i] >> 16)}));
    }
  }
}

void linear_many(const LinearParams& p);  // linear_many.cu: any number of tokens

}  // namespace cuda
}  // namespace codellama_rt
