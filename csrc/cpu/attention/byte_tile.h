// A tile of a quantised cache against query rows, by integer products alone (bytes.h).
//
// Per row and tile: exact scores, weights of 16 bits relative to the row's greatest score and the
// largest scale of a value that the row sees in the tile, exact sums of values; then one step of
// the row's state in float32. How rows share the work reaches none of these.
#pragma once

#include "cpu/attention/bytes.h"
#include "cpu/attention/plan.h"

#if defined(__AVX512VNNI__)

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kByteRows = 6;  // that share a load of a turned tile: 24 sums

// sums = 256 * high + low.
inline __attribute__((always_inline)) __m512i join_parts(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// 16 columns of a row's sums into its state.
template <typename T>
inline __attribute__((always_inline)) void add_sums(__m512i sums, const ByteWeights& weights,
                                                    float* out) {
  if (std::is_same_v<T, Nibbles>) {  // values of 0 to 15 were summed
    sums = _mm512_sub_epi32(sums, _mm512_set1_epi32(int(kValueZeroPoint) * weights.sum));
  }
  const Vec tile = int32_to_float(from_bits(sums)) * splat(weights.take);
  store(out, fma(load(out), splat(weights.keep), tile));
}

// ---- one row, over keys and values as they lie ----------------------------------------------

// kHeadDim: 128, for offsets and counts to be constants, or 0.
template <typename T, int kHeadDim>
__attribute__((noinline, flatten)) void score_row_bytes(const Tile<T>& tile, const Tile<T>& next,
                                                        const int8_t* query, int num_keys,
                                                        int64_t any_head_dim, float* scores) {
  constexpr DType kType = std::is_same_v<T, int8_t> ? DType::kInt8 : DType::kInt4;
  constexpr int kKnown = kHeadDim / kChunk;
  const int64_t head_dim = kHeadDim ? kHeadDim : any_head_dim, stride = head_dim / kPacked<T>;
  const int64_t dim = padded_dim(kType, head_dim), bytes = cache_group_bytes(kType, head_dim, true);
  __m512i high[kKnown + 1], low[kKnown + 1];
  each<kKnown>([&](auto c) {
    high[c] = _mm512_loadu_si512(query + c * kChunk);
    low[c] = _mm512_loadu_si512(query + dim + c * kChunk);
  });
  const auto dot_key = [&](const T* group, int i) __attribute__((always_inline)) {
    const auto row = Qk<T>::key_row(group, i, stride);
    __m512i sum = _mm512_setzero_si512();
    if constexpr (kKnown > 0) {
      __m512i keys[kKnown];
      each<kKnown>([&](auto c) {
        keys[c] = key_chunk<true>(row, c, head_dim);
        dot(sum, keys[c], high[c]);
      });
      sum = _mm512_slli_epi32(sum, 8);
      each<kKnown>([&](auto c) { dot(sum, keys[c], low[c]); });
    } else {
      __m512i low_sum = sum;
      for (int64_t c = 0; c * kChunk < dim; ++c) {
        const __m512i keys = key_chunk<false>(row, c, head_dim);
        dot(sum, keys, _mm512_loadu_si512(query + c * kChunk));
        dot(low_sum, keys, _mm512_loadu_si512(query + dim + c * kChunk));
      }
      sum = join_parts(sum, low_sum);
    }
    return from_bits(sum);
  };
  for (int g = 0; g * kGroup < num_keys; ++g) {
    const T* group = tile.keys[g];
    Vec lanes[4];
    each<4>([&](auto i) {
      Vec keys[4];
      each<4>([&](auto q) {
        ask(next.keys[g], bytes, 4 * i + q, kGroup);
        keys[q] = dot_key(group, 4 * q + i);
      });
      lanes[i] = sum_quads(keys, add_int32);
    });
    store(scores + g * kGroup, sum_lanes(lanes[0], lanes[1], lanes[2], lanes[3], add_int32));
  }
}

template <typename T, int kHeadDim>
__attribute__((noinline, flatten)) void add_row_values(const Tile<T>& tile, const Tile<T>& next,
                                                       const ByteWeights& weights, int num_keys,
                                                       int64_t any_head_dim, float* out) {
  constexpr DType kType = std::is_same_v<T, int8_t> ? DType::kInt8 : DType::kInt4;
  constexpr int kColumns = 4 * kParts<T>;
  const int64_t head_dim = kHeadDim ? kHeadDim : any_head_dim, stride = head_dim / kPacked<T>;
  const int64_t bytes = cache_group_bytes(kType, head_dim, false);
  for (int64_t at = 0; at < stride; at += kChunk, out += kColumns * kLanes) {
    __m512i high[kColumns], low[kColumns];
    each<kColumns>([&](auto j) { high[j] = low[j] = _mm512_setzero_si512(); });
    for (int g = 0; g * kGroup < num_keys; ++g) {
      const T* group = tile.values[g] + at;
      each<4>([&](auto i) {
        ask(next.values[g], bytes, 4 * (at / kChunk) + i, 4 * ceil_div(stride, kChunk));
        const int quad = 4 * i + g;
        const __m512i high_quad = spread_quad(weights.high + quad * 4);
        const __m512i low_quad = spread_quad(weights.low + quad * 4);
        __m512i columns[4];
        interleave_rows<(kHeadDim > 0)>(group + 4 * i * stride, stride, stride - at, columns);
        each<kColumns>([&](auto j) {
          const __m512i values = value_part<T>(columns[j % 4], j / 4);
          dot(high[j], high_quad, values);
          dot(low[j], low_quad, values);
        });
      });
    }
    each<kColumns>(
        [&](auto j) { add_sums<T>(join_parts(high[j], low[j]), weights, out + j * kLanes); });
  }
}

template <typename T>
void attend_row_bytes(const Tile<T>& tile, const Tile<T>& next, int num_keys, const int8_t* query,
                      QueryScale query_scale, float scale, int64_t head_dim, RowState state) {
  alignas(64) float scores[kTile];
  ByteWeights weights;
  const auto attend = [&](auto known) {
    constexpr int kHeadDim = decltype(known)::value;
    score_row_bytes<T, kHeadDim>(tile, next, query, num_keys, head_dim, scores);
    const Scales<T> scales(tile);
    weigh(scales, ValueScales(scales, num_keys), scores, num_keys, query_scale, scale, state,
          weights);
    add_row_values<T, kHeadDim>(tile, next, weights, num_keys, head_dim, state.out);
  };
  if (head_dim == 128) return attend(std::integral_constant<int, 128>());
  attend(std::integral_constant<int, 0>());
}

// ---- many rows, over a turned tile ------------------------------------------------------------

// A tile as turn_keys and turn_values leave it.
struct TurnedTile {
  const uint8_t *keys, *values;
  int64_t dim;
};

template <int kRows>
__attribute__((flatten)) inline void score_rows_bytes(const TurnedTile& tile, const int8_t* queries,
                                                      float (*scores)[kTile]) {
  const int64_t dim = tile.dim, group_bytes = kGroup * dim;
  __m512i sums[kRows][kGroups];
  each<kRows * kGroups>([&](auto i) { sums[i / kGroups][i % kGroups] = _mm512_setzero_si512(); });
  const auto multiply = [&](const int8_t* part) __attribute__((always_inline)) {
    const uint8_t* at = tile.keys;
#pragma GCC unroll 1
    for (int64_t d = 0; d < dim; d += 4, at += kChunk) {
      __m512i keys[kGroups];
      each<kGroups>([&](auto g) { keys[g] = _mm512_loadu_si512(at + g * group_bytes); });
      each<kRows>([&](auto r) {
        const __m512i quad = spread_quad(part + r * 2 * dim + d);
        each<kGroups>([&](auto g) { dot(sums[r][g], keys[g], quad); });
      });
    }
  };
  multiply(queries);
  each<kRows * kGroups>([&](auto i) {
    __m512i& sum = sums[i / kGroups][i % kGroups];
    sum = _mm512_slli_epi32(sum, 8);
  });
  multiply(queries + dim);
  each<kRows * kGroups>([&](auto i) {
    _mm512_storeu_si512(scores[i / kGroups] + i % kGroups * kLanes, sums[i / kGroups][i % kGroups]);
  });
}

template <typename T, int kRows>
__attribute__((flatten)) inline void add_rows_values(const TurnedTile& tile,
                                                     const ByteWeights* weights,
                                                     float* const* outs) {
  for (int64_t column = 0; column < tile.dim; column += kChunk) {
    __m512i sums[kRows][4];
    each<kRows * 4>([&](auto i) { sums[i / 4][i % 4] = _mm512_setzero_si512(); });
    const auto multiply = [&](const uint8_t* part) __attribute__((always_inline)) {
      const uint8_t* at = tile.values + column * 4;
#pragma GCC unroll 1
      for (int quad = 0; quad < kQuads; ++quad, at += tile.dim * 4) {
        __m512i values[4];
        each<4>([&](auto j) { values[j] = _mm512_loadu_si512(at + j * kChunk); });
        each<kRows>([&](auto r) {
          const __m512i p = spread_quad(part + r * sizeof(ByteWeights) + quad * 4);
          each<4>([&](auto j) { dot(sums[r][j], p, values[j]); });
        });
      }
    };
    multiply(weights->high);
    each<kRows * 4>([&](auto i) {
      __m512i& sum = sums[i / 4][i % 4];
      sum = _mm512_slli_epi32(sum, 8);
    });
    multiply(weights->low);
    each<kRows * 4>([&](auto i) {
      add_sums<T>(sums[i / 4][i % 4], weights[i / 4], outs[i / 4] + column + i % 4 * kLanes);
    });
  }
}

// One tile for a block's rows, whose states begin at `states`. Many rows turn it into `keys` and
// `values`, kTile * padded_dim bytes each.
template <typename T>
void attend_tile_bytes(const Block& block, int64_t key, const Tile<T>& tile, const Tile<T>& next,
                       const int8_t* query, const QueryScale* query_scales, uint8_t* keys,
                       uint8_t* values, float* states) {
  const Attention& a = block.a;
  const int64_t head_dim = a.head_dim, dim = a.padded_dim(), rows = block.num_rows;
  const float scale = a.scale * 1.44269504f;  // log2(e)
  const VisibleKeys visible(block, key);
  const Tile<T>& ahead = next.num_keys > 0 ? next : tile;
  if (rows == 1) {
    return attend_row_bytes(tile, ahead, visible(0), query, *query_scales, scale, head_dim,
                            block.state(states, 0));
  }
  const Scales<T> scales(tile);
  const auto turn = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    turn_keys<T, kWhole>(tile, ahead, head_dim, dim / kChunk, keys);
    turn_values<T, kWhole>(tile, ahead, head_dim, dim / kChunk, values);
  };
  head_dim == dim ? turn(std::true_type()) : turn(std::false_type());
  const TurnedTile turned{keys, values, dim};
  const int most = visible(rows - 1);
  const ValueScales all(scales, most);
  int64_t first = 0;
  while (visible(first) == 0) ++first;
  const auto attend = [&](int64_t row, auto num_rows) {
    constexpr int n = decltype(num_rows)::value;
    alignas(64) float scores[n][kTile];
    ByteWeights weights[n];
    float* outs[n];
    score_rows_bytes<n>(turned, query + row * 2 * dim, scores);
    for (int r = 0; r < n; ++r) {
      const RowState state = block.state(states, row + r);
      const int seen = visible(row + r);
      outs[r] = state.out;
      weigh(scales, seen == most ? all : ValueScales(scales, seen), scores[r], seen,
            query_scales[row + r], scale, state, weights[r]);
    }
    add_rows_values<T, n>(turned, weights, outs);
  };
  rows - first == 8 ? for_rows<4>(first, rows, attend) : for_rows<kByteRows>(first, rows, attend);
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt

#endif
