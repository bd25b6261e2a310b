// Quantised keys and values as the operands of VPDPBUSD, unsigned bytes times signed ones.
//
// A chunk is 64 elements of a row. Keys are unsigned: int8 plus 128, or the 5 bits of an int4 key.
// A query is two signed bytes an element, q = 256 * high + low, and a weight of the softmax two
// unsigned ones. Sums are those of the 16-bit numbers, exact in any order.
//
// A few rows multiply keys and values as they lie (byte_tile.h), others go in blocks of 8
// (byte_rows.h).
#pragma once

#include "cpu/attention/softmax.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kChunk = 64, kQuads = kTile / 4;
constexpr int kByteRows = 8;   // of a block: their two parts fill the lanes of a register
constexpr int kRowsApart = 3;  // up to this many a head, each row multiplies for itself

// Rows that queries have room for.
constexpr int64_t padded_rows(int64_t rows) {
  return rows <= kRowsApart ? rows : ceil_div(rows, kByteRows) * kByteRows;
}

// Row `row` of num_rows, `words` (dim int16), in bytes. Rows apart: dim high bytes, then dim low
// ones. Others: block by block, quad by quad of elements, row by row high and low bytes.
inline void split_query(const float* words, int64_t dim, int64_t row, int64_t num_rows,
                        int8_t* bytes) {
  const int16_t* from = reinterpret_cast<const int16_t*>(words);
  if (num_rows <= kRowsApart) {
    bytes += row * 2 * dim;
    for (int64_t d = 0; d < dim; ++d) {
      bytes[d] = int8_t((from[d] + 128) >> 8);
      bytes[dim + d] = int8_t(from[d]);  // in [-128, 127]
    }
    return;
  }
  typedef int16_t Words __attribute__((vector_size(8)));
  typedef int8_t Quad __attribute__((vector_size(4)));
  bytes += row / kByteRows * kByteRows * 2 * dim + row % kByteRows * 8;
  for (int64_t d = 0; d < dim; d += 4, bytes += kChunk) {
    Words quad;
    std::memcpy(&quad, from + d, sizeof(quad));
    const Quad parts[] = {__builtin_convertvector((quad + 128) >> 8, Quad),
                          __builtin_convertvector(quad, Quad)};
    std::memcpy(bytes, parts, sizeof(parts));
  }
}

// A row of a state, whose chunks interleave_rows has left in its order, in that of the elements.
// Of two parts one has the elements of even number, one the others.
inline void order_columns(float* row, int64_t dim, int parts) {
  float ordered[2 * kChunk];
  for (int64_t d = 0; d < dim; d += parts * kChunk) {
    for (int i = 0; i < parts * kChunk; i += 4) {
      const int quad = i / 4 % 16;
      std::memcpy(ordered + i, row + d + i / kChunk * kChunk + quad % 4 * 16 + quad / 4 * 4, 16);
    }
    if (parts == 1) std::memcpy(row + d, ordered, kChunk * sizeof(float));
    for (int i = 0; parts == 2 && i < kChunk; i += kLanes) {
      Vec even = load(ordered + i), odd = load(ordered + kChunk + i);
      interleave(even, odd);
      store(row + d + 2 * i, even);
      store(row + d + 2 * i + kLanes, odd);
    }
  }
}

#if defined(__AVX512VNNI__)

// Chunks that one load of a row gives: elements of even number, then those of odd number.
template <typename T>
constexpr int kParts = std::is_same_v<T, Nibbles> ? 2 : 1;

template <typename T>
constexpr DType kCacheType = std::is_same_v<T, int8_t> ? DType::kInt8 : DType::kInt4;

// body(0) ... body(n - 1), each as a constant: GCC 12 leaves arrays that a loop walks in memory.
template <int kCount, int kFirst = 0, typename Body>
inline __attribute__((always_inline)) void each(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>());
    each<kCount, kFirst + 1>(body);
  }
}

// sum += the products of four bytes in each lane; in place, as GCC 12 copies the intrinsic's sum.
template <typename Register>
inline __attribute__((always_inline)) void dot(Register& sum, Register unsigned_bytes,
                                               Register signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}
template <typename Register = __m512i>
inline __attribute__((always_inline)) Register spread_quad(const void* p) {
  Register quad;
  asm("vpbroadcastd %1, %0" : "=v"(quad) : "m"(*static_cast<const int32_t*>(p)));
  return quad;
}

// Up to 64 bytes, zero past `left` of them.
template <bool kWhole>
inline __m512i load_bytes(const void* p, int64_t left) {
  if (kWhole || left >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(left <= 0 ? 0 : (uint64_t(1) << left) - 1, p);
}

// Asks memory for one of `parts` parts of a group in one piece, a tile ahead and into L2. One query
// of 100,000 int8 keys takes 32 ms so; into L1 as early it takes 45, unasked 36 to 43 (Zen 4).
inline void ask(const void* group, int64_t group_bytes, int part, int parts) {
  const int64_t lines = ceil_div(group_bytes, 64), share = ceil_div(lines, parts);
  for (int64_t i = part * share; i < smaller((part + 1) * share, lines); ++i) {
    __builtin_prefetch(static_cast<const char*>(group) + i * 64, 0, 2);
  }
}

// A group of the next tile, its keys and its values, asked for line by line in so many steps.
class Ahead {
 public:
  Ahead() = default;
  template <typename T>
  Ahead(const Tile<T>& next, int group, int64_t head_dim, int64_t steps)
      : keys_(next.keys[group], cache_group_bytes(kCacheType<T>, head_dim, true), steps),
        values_(next.values[group], cache_group_bytes(kCacheType<T>, head_dim, false), steps) {}
  void step() {
    keys_.ask();
    values_.ask();
  }

 private:
  struct Stretch {
    const char *at = nullptr, *end = nullptr;
    Stretch() = default;
    Stretch(const void* begin, int64_t bytes, int64_t steps)
        : at(static_cast<const char*>(begin)), end(at + bytes) {
      while (end - at > 64 * steps) ask();
    }
    void ask() {
      if (at >= end) return;
      __builtin_prefetch(at, 0, 2);
      at += 64;
    }
  };
  Stretch keys_, values_;
};

// ---- keys ------------------------------------------------------------------------------------

template <bool kWhole>
inline __m512i key_chunk(const int8_t* row, int64_t chunk, int64_t head_dim) {
  return _mm512_xor_si512(load_bytes<kWhole>(row + chunk * kChunk, head_dim - chunk * kChunk),
                          _mm512_set1_epi8(char(0x80)));
}
template <bool kWhole>
inline __m512i key_chunk(const Qk<Nibbles>::Row& row, int64_t chunk, int64_t head_dim) {
  const int64_t at = chunk / 2 * kChunk, left = head_dim / 2 - at;
  __m512i low = load_bytes<kWhole>(row.low + at, left);
  if (chunk % 2) low = _mm512_srli_epi16(low, 4);
  low = _mm512_and_si512(low, _mm512_set1_epi8(15));
  uint64_t high = 0;
  std::memcpy(&high, (chunk % 2 ? row.odd : row.even) + at / 8,
              kWhole || left >= kChunk ? 8 : left / 8);
  return _mm512_mask_add_epi8(low, high, low, _mm512_set1_epi8(16));
}

// Four bytes of a key in all lanes, unsigned: an int8 key gets its offset in the same instruction.
template <typename T, typename Register>
inline __attribute__((always_inline)) Register spread_key(const void* p) {
  if constexpr (std::is_same_v<T, Nibbles>) {
    return spread_quad<Register>(p);
  } else if constexpr (sizeof(Register) == 64) {
    Register quad;
    asm("vpxord %1%{1to16%}, %2, %0"
        : "=v"(quad)
        : "m"(*static_cast<const int32_t*>(p)), "v"(_mm512_set1_epi8(char(0x80))));
    return quad;
  } else {
    Register quad;
    asm("vpxord %1%{1to8%}, %2, %0"
        : "=v"(quad)
        : "m"(*static_cast<const int32_t*>(p)), "v"(_mm256_set1_epi8(char(0x80))));
    return quad;
  }
}

// ---- values ----------------------------------------------------------------------------------

// 64 bytes of four rows, interleaved, columns 2 kHalf and 2 kHalf + 1 of 4: lane l of column j has
// those of byte 16 (l / 4) + 4 j + l % 4.
template <int kHalf>
inline __attribute__((always_inline)) void interleave_half(const __m512i (&r)[4],
                                                           __m512i* columns) {
  const auto bytes = [](__m512i a, __m512i b) __attribute__((always_inline)) {
    return kHalf ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
  };
  const __m512i first = bytes(r[0], r[1]), second = bytes(r[2], r[3]);
  columns[0] = _mm512_unpacklo_epi16(first, second);
  columns[1] = _mm512_unpackhi_epi16(first, second);
}

template <bool kWhole, typename T>
inline __attribute__((always_inline)) void load_rows(const T* rows, int64_t row_stride,
                                                     int64_t left, __m512i (&r)[4]) {
  each<4>([&](auto i) { r[i] = load_bytes<kWhole>(rows + i * row_stride, left); });
}

// The values of part `part` among interleaved bytes: int8 as they are, int4 less their zero point
// in the high half of a byte.
static_assert(kValueZeroPoint == 8.0f);
template <typename T>
constexpr float kValueUnit = std::is_same_v<T, Nibbles> ? 16.0f : 1.0f;
template <typename T>
inline __m512i value_part(__m512i bytes, int part) {
  if (std::is_same_v<T, int8_t>) return bytes;
  constexpr int kAndXor = 0x6a;  // (a & b) ^ c
  return _mm512_ternarylogic_epi32(part ? bytes : _mm512_slli_epi16(bytes, 4),
                                   _mm512_set1_epi8(char(0xf0)), _mm512_set1_epi8(char(0x80)),
                                   kAndXor);
}

// sums = 256 * high + low.
inline __attribute__((always_inline)) __m512i join_parts(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// 16 columns of a row's sums into its state.
inline __attribute__((always_inline)) void add_sums(__m512i sums, float keep, float take,
                                                    float* out) {
  const Vec tile = int32_to_float(from_bits(sums)) * splat(take);
  store(out, fma(load(out), splat(keep), tile));
}

// ---- softmax -----------------------------------------------------------------------------------

// A tile's value scales relative to the largest one of the first num_keys keys, which stands for
// kMostWeight; `largest` is what sums are multiplied by, in units of values (value_part) as well.
// NaN among them makes the largest NaN, and so the row.
constexpr float kMostWeight = 65535.0f;
struct ValueScales {
  Vec relative[kTile / kLanes];
  float largest;

  template <typename T>
  ValueScales(const Scales<T>& scales, int num_keys) {
    __m512i most = _mm512_setzero_si512();  // not negative: ordered as integers, and NaN on top
    for (int j = 0; j < kTile / kLanes; ++j) {
      relative[j] =
          select_first(num_keys - j * kLanes, scales.value_scale(j * kLanes), splat(0.0f));
      most = _mm512_max_epi32(most, to_bits(relative[j]));
    }
    const float greatest = bits_to_float(uint32_t(_mm512_reduce_max_epi32(most)));
    // Less belongs to rows of zeros (quantize_row.h), and has no inverse.
    const float inverse = greatest > kLeast / 128 ? kMostWeight / greatest : 0.0f;
    for (Vec& scale : relative) scale = scale * splat(inverse);
    largest = greatest / (kMostWeight * kValueUnit<T>);
  }
};

// The weights of a row's keys in a tile, relative to its greatest there. A quad of keys is four
// bytes, number 4 i + g that of keys 4 i to 4 i + 3 of group g.
struct ByteWeights {
  alignas(64) uint8_t high[kTile];
  uint8_t low[kTile];
  float keep, take;  // what the state so far, and the tile's sums, are multiplied by
};

// Scores, as int32 bits in the order of keys, into weights and into the state.
template <typename T>
__attribute__((noinline)) void weigh(const Scales<T>& scales, const ValueScales& values,
                                     const float* scores, int num_keys, QueryScale query,
                                     float scale, RowState state, ByteWeights& weights) {
  constexpr int kVecs = kTile / kLanes;
  const Vec factor = splat(scale * query.scale);
  Vec x[kVecs], greatest = splat(-3.4e38f);  // finite, so that weights below it are 0
  for (int j = 0; j < kVecs; ++j) {
    x[j] = scales.score(j * kLanes, load(scores + j * kLanes), query.sum) * factor;
    if (num_keys < kTile) x[j] = select_first(num_keys - j * kLanes, x[j], splat(-INFINITY));
    greatest = max(x[j], greatest);
  }
  const float top = max_lane(greatest), before = state.top();
  state.top() = top > before ? top : before;
  float factors[kLanes];
  store(factors, exp2_nonpositive(select_first(1, splat(before), splat(top)) - splat(state.top())));
  weights.keep = factors[0];
  weights.take = factors[1] * values.largest;
  const auto add_up = [&](const Vec(&parts)[kVecs], float* to) {
    const Vec total = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * splat(factors[1]);
    store(to, fma(load(to), splat(factors[0]), total));
  };
  __m512i rounded[kVecs];
  for (int j = 0; j < kVecs; ++j) {
    x[j] = exp2_nonpositive(x[j] - splat(top));
    rounded[j] = to_bits(float_to_int32(x[j] * values.relative[j]));
  }
  add_up(x, state.weights());
  const __m512i a = _mm512_packus_epi32(rounded[0], rounded[1]);
  const __m512i b = _mm512_packus_epi32(rounded[2], rounded[3]);
  const __m512i byte = _mm512_set1_epi16(255);
  _mm512_storeu_si512(weights.high,
                      _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
  _mm512_storeu_si512(weights.low,
                      _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
  if constexpr (std::is_same_v<T, Nibbles>) {
    for (int j = 0; j < kVecs; ++j) {
      x[j] = hold(scales.zero_point(j * kLanes, x[j]));
      if (num_keys < kTile) x[j] = select_first(num_keys - j * kLanes, x[j], splat(0.0f));
    }
    add_up(x, state.zero_points());
  }
}

#endif

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
