// A block of 8 query rows against a tile of a quantised cache, by integer products alone (bytes.h).
//
// A register's 16 lanes are the two parts of 8 queries: a dot multiplies a quad of a key's bytes,
// spread over the lanes, by that quad of all of them, and nothing is added across lanes. int8 keys
// are read as they lie, int4 ones are unpacked once for all blocks. In the softmax lanes 2 r and
// 2 r + 1 are row r with two neighbouring keys. Values are interleaved for every 4 rows anew, so
// that lanes are 16 columns: the shuffles run beside the products, on a port of their own.
//
// Limit    a tile of 8 rows takes 4,096 dots of 512 bits (head_dim 128), of which a core of Zen 4
//          starts one a cycle: one query of 100,000 keys, 64/8 heads, takes 6.9 ms on two cores of
//          3.7 GHz whatever memory gives, 7.7 to 7.8 with what else needs the ports of the dots
#pragma once

#include "cpu/attention/bytes.h"
#include "cpu/attention/work.h"

#if defined(__AVX512VNNI__)

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kPairs = kTile / 2, kGroupPairs = kGroup / 2;
constexpr int kValueByteRows = 4;  // rows that share interleaved values: 16 sums

inline Vec even_lanes(Vec x) { return {_mm512_moveldup_ps(x.v)}; }
inline Vec odd_lanes(Vec x) { return {_mm512_movehdup_ps(x.v)}; }
inline Vec swap_neighbours(Vec x) { return {_mm512_permute_ps(x.v, 0xb1)}; }
inline Vec select_even(Vec even, Vec odd) { return {_mm512_mask_mov_ps(even.v, 0xaaaa, odd.v)}; }

// ---- scores ------------------------------------------------------------------------------------

// int4 keys of a group as rows of dim unsigned bytes.
template <int kHeadDim>
inline void unpack_keys(const Nibbles* group, int64_t any_head_dim, int64_t any_dim, uint8_t* to) {
  const int64_t head_dim = kHeadDim ? kHeadDim : any_head_dim, dim = kHeadDim ? kHeadDim : any_dim;
#pragma GCC unroll 2
  for (int i = 0; i < kGroup; ++i) {
    const auto row = Qk<Nibbles>::key_row(group, i, head_dim / kPacked<Nibbles>);
#pragma GCC unroll 2
    for (int64_t c = 0; c * kChunk < dim; ++c) {
      _mm512_storeu_si512(to + i * dim + c * kChunk, key_chunk<(kHeadDim > 0)>(row, c, head_dim));
    }
  }
}

template <typename T>
struct QueryLanes {
  Vec factor, sum;
  __m512i start;  // of keys plus an offset

  QueryLanes(const QueryScale* queries, float scale) {
    const Vec both = load(&queries->scale);  // a row's scale, then its sum
    factor = splat(scale) * even_lanes(both);
    sum = odd_lanes(both);
    start = _mm512_sub_epi32(
        _mm512_setzero_si512(),
        _mm512_slli_epi32(_mm512_cvttps_epi32(sum.v), std::is_same_v<T, int8_t> ? 7 : 4));
  }
};

// The exact sums of a group's keys, `stride` bytes apart. kStride: 128, for it to be a constant, or
// 0. Register: __m512i, or __m256i for the block's first 4 rows.
template <typename T, int kStride, typename Register>
__attribute__((noinline, flatten)) void dot_group(const void* group, int64_t any_stride,
                                                  const int8_t* queries, int64_t quads, Ahead ahead,
                                                  __m512i (&pairs)[kGroupPairs]) {
  const int64_t stride = kStride ? kStride : any_stride;
  const char* keys = static_cast<const char*>(group);
  Register sums[kGroup];
  each<kGroup>([&](auto i) { sums[i] = Register{}; });
#pragma GCC unroll 1
  for (int64_t i = 0; i < quads; ++i, keys += 4, queries += kChunk) {
    Register quad;
    std::memcpy(&quad, queries, sizeof quad);
    ahead.step();
    each<kGroup>([&](auto key) __attribute__((always_inline)) {
      dot(sums[key], spread_key<T, Register>(keys + key * stride), quad);
    });
  }
  const auto floats = [](Register x) __attribute__((always_inline)) {
    if constexpr (sizeof(Register) == 64) {
      return _mm512_castsi512_ps(x);
    } else {
      return _mm512_castps256_ps512(_mm256_castsi256_ps(x));
    }
  };
  each<kGroupPairs>([&](auto j) {
    const __m512 a = floats(sums[2 * j]), b = floats(sums[2 * j + 1]);
    const Vec high{_mm512_mask_moveldup_ps(a, 0xaaaa, b)};
    const Vec low{_mm512_mask_movehdup_ps(b, 0x5555, a)};
    pairs[j] = join_parts(to_bits(high), to_bits(low));
  });
}

inline Vec score_pair(const Scales<int8_t>& scales, int key, Vec total, const QueryLanes<int8_t>&) {
  return int32_to_float(total) * spread<2>(scales.key_scales(key));
}
inline Vec score_pair(const Scales<Nibbles>& scales, int key, Vec total,
                      const QueryLanes<Nibbles>& query) {
  return fma(int32_to_float(total), spread<2>(scales.key_scales(key)),
             spread<2>(scales.key_minima(key)) * query.sum);
}

// ---- softmax -----------------------------------------------------------------------------------

// The weights of a block's rows in a tile, and what ByteWeights has of each row.
struct BlockWeights {
  alignas(64) uint8_t quads[kQuads][kByteRows][2][4];  // of each quad of keys: low bytes, high ones
  alignas(64) float factors[kByteRows][2];             // keep, take
};

// Low and high bytes of a quad of keys, from 16-bit weights of two pairs.
inline __m512i pack_quad(__m512i first, __m512i second) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15));
  return _mm512_shuffle_epi8(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)), order);
}

// Pairs of lanes of 8 vectors: row r of the result has pair r of each.
inline __attribute__((always_inline)) void transpose_pairs(Vec (&rows)[8]) {
  __m512d a[8], b[8];
  each<4>([&](auto i) __attribute__((always_inline)) {
    const __m512d x = _mm512_castps_pd(rows[2 * i].v), y = _mm512_castps_pd(rows[2 * i + 1].v);
    a[i] = _mm512_unpacklo_pd(x, y);      // pairs 0, 2, 4, 6 of both
    a[4 + i] = _mm512_unpackhi_pd(x, y);  // pairs 1, 3, 5, 7
  });
  each<4>([&](auto i) __attribute__((always_inline)) {
    constexpr int k = i / 2 * 4 + i % 2 * 2;
    b[i * 2] = _mm512_shuffle_f64x2(a[k], a[k + 1], 0x88);
    b[i * 2 + 1] = _mm512_shuffle_f64x2(a[k], a[k + 1], 0xdd);
  });
  each<2>([&](auto i) __attribute__((always_inline)) {  // even rows, odd rows
    const __m512d even = b[4 * i], odd = b[4 * i + 1], even2 = b[4 * i + 2], odd2 = b[4 * i + 3];
    rows[i].v = _mm512_castpd_ps(_mm512_shuffle_f64x2(even, even2, 0x88));
    rows[4 + i].v = _mm512_castpd_ps(_mm512_shuffle_f64x2(even, even2, 0xdd));
    rows[2 + i].v = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd, odd2, 0x88));
    rows[6 + i].v = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd, odd2, 0xdd));
  });
}

// Rows of a block that see keys of the tile, and their states.
struct BlockRows {
  const Block& block;
  float* states;
  int64_t row;     // the block's first
  int first, end;  // within the block

  RowState state(int r) const { return block.state(states, row + r); }
  Vec tops() const {
    float tops[kLanes] = {};
    for (int r = first; r < end; ++r) tops[2 * r] = tops[2 * r + 1] = state(r).top();
    return load(tops);
  }
};

// How many of the tile's keys each row sees, as a mask of a pair's lanes.
struct SeenLanes {
  __m512i seen;
  SeenLanes(const VisibleKeys& visible, const BlockRows& rows) {
    int32_t lanes[kLanes] = {};
    for (int r = rows.first; r < rows.end; ++r) {
      lanes[2 * r] = visible(rows.row + r);
      lanes[2 * r + 1] = lanes[2 * r] - 1;  // a pair's second key
    }
    seen = _mm512_loadu_si512(lanes);
  }
  __mmask16 operator()(int key) const {
    return _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(key));
  }
  Vec select(int key, Vec x, float otherwise) const {
    return {_mm512_mask_mov_ps(splat(otherwise).v, (*this)(key), x.v)};
  }
};

// The scales of values by which weights are multiplied, where all rows see the whole tile.
struct SharedScales {
  const float* relative;
  Vec largest;
  explicit SharedScales(const ValueScales& all)
      : relative(reinterpret_cast<const float*>(all.relative)), largest(splat(all.largest)) {}
  Vec operator()(int key) const { return spread<2>(relative + key); }
  Vec select(int, Vec x) const { return x; }
};

// Where each row has its own (ValueScales).
template <typename T>
struct OwnScales {
  const Scales<T>& scales;
  const SeenLanes& seen;
  Vec inverse, largest;
  OwnScales(const Scales<T>& s, const SeenLanes& seen_lanes) : scales(s), seen(seen_lanes) {
    __m512i most = _mm512_setzero_si512();
    for (int key = 0; key < kTile; key += 2) {
      const Vec scale = select(key, spread<2>(scales.value_scales(key)));
      most = _mm512_max_epi32(most, to_bits(scale));
    }
    const __m512i other = to_bits(swap_neighbours(from_bits(most)));
    const Vec greatest = from_bits(_mm512_max_epi32(most, other));
    const __mmask16 usable = _mm512_cmp_ps_mask(greatest.v, splat(kLeast / 128).v, _CMP_GT_OQ);
    inverse.v = _mm512_maskz_div_ps(usable, splat(kMostWeight).v, greatest.v);
    largest = greatest / splat(kMostWeight * kValueUnit<T>);
  }
  Vec operator()(int key) const {
    return select(key, spread<2>(scales.value_scales(key))) * inverse;
  }
  Vec select(int key, Vec x) const { return seen.select(key, x, 0.0f); }
};

// Scores, pair by pair of keys, into weights and into the states.
template <typename T, typename ValueScalesOfRows>
__attribute__((noinline)) void weigh_rows(const Scales<T>& scales, const ValueScalesOfRows& values,
                                          const float (*scores)[kLanes], Vec greatest,
                                          const BlockRows& rows, BlockWeights& weights) {
  constexpr bool kZeroPoints = std::is_same_v<T, Nibbles>;
  const Vec top = max(greatest, swap_neighbours(greatest)), before = rows.tops();
  const Vec now = max(top, before);
  const Vec factors = exp2_nonpositive(select_even(before, top) - now), mine = odd_lanes(factors);
  store(weights.factors[0], select_even(factors, factors * values.largest));
  Vec sums[kGroupPairs], zero_points[kGroupPairs];
  each<kGroup / 4>([&](auto quad) __attribute__((always_inline)) {
    __m512i rounded[kGroups][2];
    each<2>([&](auto half) __attribute__((always_inline)) {
      constexpr int j = 2 * quad + half;
      Vec x[kGroups];
      each<kGroups>([&](auto g) __attribute__((always_inline)) {
        constexpr int key = g * kGroup + 2 * j;
        x[g] = exp2_nonpositive(load(scores[key / 2]) - top);
        rounded[g][half] = to_bits(float_to_int32(x[g] * values(key)));
      });
      sums[j] = ((x[0] + x[1]) + (x[2] + x[3])) * mine;
      if constexpr (kZeroPoints) {
        each<kGroups>([&](auto g) __attribute__((always_inline)) {
          constexpr int key = g * kGroup + 2 * j;
          // Held, for it to be rounded as in `weigh`: not one instruction with the sum below.
          const Vec zero_point = hold(x[g] * spread<2>(scales.value_minima(key)));
          x[g] = values.select(key, zero_point);
        });
        zero_points[j] = ((x[0] + x[1]) + (x[2] + x[3])) * mine;
      }
    });
    each<kGroups>([&](auto g) __attribute__((always_inline)) {
      _mm512_store_si512(weights.quads[g * kGroup / 4 + quad],
                         pack_quad(rounded[g][0], rounded[g][1]));
    });
  });
  if constexpr (kZeroPoints) transpose_pairs(zero_points);
  transpose_pairs(sums);
  float tops[kLanes];
  store(tops, now);
  for (int r = rows.first; r < rows.end; ++r) {
    const RowState state = rows.state(r);
    const Vec keep = splat(weights.factors[r][0]);
    state.top() = tops[2 * r];
    store(state.weights(), fma(load(state.weights()), keep, sums[r]));
    if constexpr (kZeroPoints) {
      store(state.zero_points(), fma(load(state.zero_points()), keep, zero_points[r]));
    }
  }
}

// ---- values ------------------------------------------------------------------------------------

// A tile's values into the states of kRows rows, two columns of 16 at a time.
template <int kRows, int kHeadDim, typename T>
__attribute__((noinline, flatten)) void add_rows_values(const Tile<T>& tile, int64_t any_head_dim,
                                                        const BlockWeights& weights, int row,
                                                        float* const* outs) {
  const int64_t head_dim = kHeadDim ? kHeadDim : any_head_dim, stride = head_dim / kPacked<T>;
  for (int64_t at = 0; at < stride; at += kChunk) {
    each<2 * kParts<T>>([&](auto pair) __attribute__((always_inline)) {
      constexpr int half = pair % 2, part = pair / 2;
      __m512i high[kRows][2], low[kRows][2];
      each<kRows * 2>([&](auto i) { high[i / 2][i % 2] = low[i / 2][i % 2] = __m512i{}; });
      const uint8_t* quads = weights.quads[0][row][0];
      for (int g = 0; g < kGroups; ++g) {
        const T* rows = tile.values[g] + at;
#pragma GCC unroll 1
        for (int i = 0; i < kGroup / 4; ++i, rows += 4 * stride, quads += kByteRows * 8) {
          __m512i r[4], columns[2];
          load_rows<(kHeadDim > 0)>(rows, stride, stride - at, r);
          interleave_half<half>(r, columns);
          each<2>([&](auto j) { columns[j] = value_part<T>(columns[j], part); });
          each<kRows>([&](auto r) __attribute__((always_inline)) {
            const __m512i high_quad = spread_quad(quads + r * 8 + 4);
            const __m512i low_quad = spread_quad(quads + r * 8);
            each<2>([&](auto j) __attribute__((always_inline)) {
              dot(high[r][j], high_quad, columns[j]);
              dot(low[r][j], low_quad, columns[j]);
            });
          });
        }
      }
      const int64_t column = at * kParts<T> + part * kChunk + half * 2 * kLanes;
      each<kRows * 2>([&](auto i) {
        constexpr int r = i / 2, j = i % 2;
        add_sums(join_parts(high[r][j], low[r][j]), weights.factors[row + r][0],
                 weights.factors[row + r][1], outs[r] + column + j * kLanes);
      });
    });
  }
}

// ---- a tile ------------------------------------------------------------------------------------

// kHeadDim: 128, for strides and counts to be constants, or 0. `unpacked` has room for
// kTile * padded_dim bytes.
template <int kHeadDim, typename T>
void attend_rows(const Block& block, int64_t key, const Tile<T>& tile, const Tile<T>& next,
                 const int8_t* query, const QueryScale* query_scales, float scale,
                 uint8_t* unpacked, float* states) {
  const int64_t head_dim = block.a.head_dim, dim = block.a.padded_dim(), rows = block.num_rows;
  const VisibleKeys visible(block, key);
  const Scales<T> scales(tile);
  const ValueScales all(scales, visible(rows - 1));
  const void* keys[kGroups];
  const int64_t stride = std::is_same_v<T, Nibbles> ? dim : head_dim, quads = ceil_div(stride, 4);
  for (int g = 0; g < kGroups; ++g) {
    keys[g] = tile.keys[g];
    if constexpr (std::is_same_v<T, Nibbles>) {
      uint8_t* to = unpacked + g * kGroup * dim;
      unpack_keys<kHeadDim>(tile.keys[g], head_dim, dim, to);
      keys[g] = to;
    }
  }
  int64_t first = 0;
  while (visible(first) == 0) ++first;
  const int64_t first_block = first / kByteRows * kByteRows;
  for (int64_t row = first_block; row < rows; row += kByteRows) {
    const BlockRows part{block, states, row, int(larger(first - row, 0)),
                         int(smaller(rows - row, kByteRows))};
    const QueryLanes<T> lanes(query_scales + row, scale);
    const bool masked = visible(row) < kTile;
    const SeenLanes seen(visible, part);
    alignas(64) float scores[kPairs][kLanes];
    BlockWeights weights;
    Vec greatest = splat(-3.4e38f);  // finite, so that weights below it are 0
    for (int g = 0; g < kGroups; ++g) {
      const Ahead ahead = row == first_block ? Ahead(next, g, head_dim, quads) : Ahead();
      __m512i pairs[kGroupPairs];
      const auto multiply = part.end > kByteRows / 2 ? dot_group<T, kHeadDim, __m512i>
                                                     : dot_group<T, kHeadDim, __m256i>;
      multiply(keys[g], stride, query + row * 2 * dim, quads, ahead, pairs);
      each<kGroupPairs>([&](auto j) {
        const int first_key = g * kGroup + 2 * j;
        Vec x = score_pair(scales, first_key, from_bits(_mm512_add_epi32(pairs[j], lanes.start)),
                           lanes) *
                lanes.factor;
        if (masked) x = seen.select(first_key, x, -INFINITY);
        greatest = max(x, greatest);
        store(scores[first_key / 2], x);
      });
    }
    const auto weigh = [&](const auto& value_scales) {
      weigh_rows(scales, value_scales, scores, greatest, part, weights);
    };
    masked ? weigh(OwnScales<T>(scales, seen)) : weigh(SharedScales(all));
    for_rows<kValueByteRows>(part.first, part.end, [&](int64_t r, auto num_rows) {
      constexpr int n = decltype(num_rows)::value;
      float* outs[n];
      for (int i = 0; i < n; ++i) outs[i] = part.state(r + i).out;
      add_rows_values<n, kHeadDim>(tile, head_dim, weights, r, outs);
    });
  }
}

template <typename T>
void attend_rows_bytes(const Block& block, int64_t key, const Tile<T>& tile, const Tile<T>& next,
                       const int8_t* query, const QueryScale* query_scales, float scale,
                       uint8_t* unpacked, float* states) {
  const auto attend = [&](auto known) {
    attend_rows<decltype(known)::value>(block, key, tile, next, query, query_scales, scale,
                                        unpacked, states);
  };
  if (block.a.head_dim == 128) return attend(std::integral_constant<int, 128>());
  attend(std::integral_constant<int, 0>());
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt

#endif
