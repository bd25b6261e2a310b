// A tile of a quantised cache against query rows, by integer products alone (bytes.h).
//
// Per row and tile: exact scores, weights of 16 bits relative to the row's greatest score and the
// largest scale of a value that the row sees in the tile, exact sums of values; then one step of
// the row's state in float32. How rows share the work reaches none of these.
#pragma once

#include "cpu/attention/byte_rows.h"
#include "cpu/attention/work.h"

#if defined(__AVX512VNNI__)

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- one row, over keys and values as they lie ----------------------------------------------

// kHeadDim: 128, for offsets and counts to be constants, or 0.
template <typename T, int kHeadDim>
__attribute__((noinline, flatten)) void score_row_bytes(const Tile<T>& tile, const Tile<T>& next,
                                                        const int8_t* query, int num_keys,
                                                        int64_t any_head_dim, float* scores) {
  constexpr int kKnown = kHeadDim / kChunk;
  const int64_t head_dim = kHeadDim ? kHeadDim : any_head_dim, stride = head_dim / kPacked<T>;
  const int64_t dim = padded_dim(kCacheType<T>, head_dim);
  const int64_t bytes = cache_group_bytes(kCacheType<T>, head_dim, true);
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
    each<4>([&](auto i) {  // in the order of memory, which hardware prefetches
      Vec keys[4];
      each<4>([&](auto q) {
        ask(next.keys[g], bytes, 4 * i + q, kGroup);
        keys[q] = dot_key(group, 4 * i + q);
      });
      lanes[i] = sum_quads(keys, add_int32);
    });
    const Vec turned = sum_lanes(lanes[0], lanes[1], lanes[2], lanes[3], add_int32);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(scores + g * kGroup, Vec{_mm512_permutexvar_ps(order, turned.v)});
  }
}

template <typename T, int kHeadDim>
__attribute__((noinline, flatten)) void add_row_values(const Tile<T>& tile, const Tile<T>& next,
                                                       const ByteWeights& weights, int num_keys,
                                                       int64_t any_head_dim, float* out) {
  constexpr int kStretch = kHeadDim ? kHeadDim / kPacked<T> / kChunk : 1;  // chunks at a time
  constexpr int kStretchColumns = 4 * kParts<T>, kColumns = kStretchColumns * kStretch;
  const int64_t head_dim = kHeadDim ? kHeadDim : any_head_dim, stride = head_dim / kPacked<T>;
  const int64_t bytes = cache_group_bytes(kCacheType<T>, head_dim, false);
  for (int64_t at = 0; at < stride; at += kStretch * kChunk, out += kColumns * kLanes) {
    __m512i high[kColumns], low[kColumns];
    each<kColumns>([&](auto j) { high[j] = low[j] = _mm512_setzero_si512(); });
    for (int g = 0; g * kGroup < num_keys; ++g) {
      const T* group = tile.values[g] + at;
      each<4>([&](auto i) {
        ask(next.values[g], bytes, 4 * (at / kChunk) + i, 4 * ceil_div(stride, kStretch * kChunk));
        const int quad = 4 * i + g;
        const __m512i high_quad = spread_quad(weights.high + quad * 4);
        const __m512i low_quad = spread_quad(weights.low + quad * 4);
        each<kStretch>([&](auto c) {
          __m512i r[4], columns[4];
          load_rows<(kHeadDim > 0)>(group + 4 * i * stride + c * kChunk, stride, stride - at, r);
          interleave_half<0>(r, columns);
          interleave_half<1>(r, columns + 2);
          each<kStretchColumns>([&](auto j) {
            const __m512i values = value_part<T>(columns[j % 4], j / 4);
            dot(high[c * kStretchColumns + j], high_quad, values);
            dot(low[c * kStretchColumns + j], low_quad, values);
          });
        });
      });
    }
    each<kColumns>([&](auto j) {
      add_sums(join_parts(high[j], low[j]), weights.keep, weights.take, out + j * kLanes);
    });
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

// One tile for a block's rows, whose states begin at `states`. More than kRowsApart unpack its keys
// to `keys`, kTile * padded_dim bytes.
template <typename T>
void attend_tile_bytes(const Block& block, int64_t key, const Tile<T>& tile, const Tile<T>& next,
                       const int8_t* query, const QueryScale* query_scales, uint8_t* keys,
                       float* states) {
  const Attention& a = block.a;
  const float scale = a.scale * 1.44269504f;  // log2(e)
  const Tile<T>& ahead = next.num_keys > 0 ? next : tile;
  if (block.num_rows > kRowsApart) {
    attend_rows_bytes(block, key, tile, ahead, query, query_scales, scale, keys, states);
    return;
  }
  const VisibleKeys visible(block, key);
  for (int64_t row = 0; row < block.num_rows; ++row, query += 2 * a.padded_dim()) {
    if (visible(row) == 0) continue;
    attend_row_bytes(tile, ahead, visible(row), query, query_scales[row], scale, a.head_dim,
                     block.state(states, row));
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt

#endif
