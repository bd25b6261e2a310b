// Quantised weight formats: how 16 rows of a group of 32 along k lie for the integer dot product.
//
// A group of a tile is 8 vectors of 16 rows x 4 unsigned bytes, then scales. Own formats lie in the
// file like this (a layout reads them in place); blocks of a GGUF file, rows of them, are unpacked
// into it, several groups at once, to be read from cache by all tokens.
// A row's element is (value - kBias) * scale + minimum.
#pragma once

#include <type_traits>

#include "int_dot.h"
#include "task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- layouts: where a group's values and scales lie ----------------------------------------

inline float bf16_at(const uint8_t* p) {
  bf16 x;
  std::memcpy(&x, p, 2);
  return to_float(x);
}

struct Int8Layout {
  static constexpr int64_t kHeadBytes = 0;  // of a tile, before its groups
  static constexpr int64_t kBytes = kValuesBytes + 2 * kWeightTile;
  static constexpr int kHalves = 1;  // scales along k
  static constexpr bool kHasMinimum = false;
  static constexpr int kBias = 128;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return load_bytes(group + quad * kStepBytes + part * kPartBytes);
  }
  static inline Vec scales(const uint8_t*, const uint8_t* group, int, int part) {
    return load(reinterpret_cast<const bf16*>(group + kValuesBytes) + part * kLanes);
  }
  static inline Vec minima(const uint8_t*, const uint8_t*, int) { return splat(0.0f); }
  // Of one row: element i, its scale.
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return group[i / 4 * kStepBytes + row * 4 + i % 4];
  }
  static inline float scale(const uint8_t*, const uint8_t* group, int, int row) {
    return bf16_at(group + kValuesBytes + 2 * row);
  }
  static inline float minimum(const uint8_t*, const uint8_t*, int) { return 0.0f; }
};

// Before a tile's groups: a float32 a row, the unit of its steps, then one of its minima. After
// the nibbles of a group: a byte a row, its step in those units, then its minimum.
struct Int4Layout {
  static constexpr int64_t kHeadBytes = 2 * 4 * kWeightTile;
  static constexpr int64_t kCodes = kValuesBytes / 2;
  static constexpr int64_t kBytes = kCodes + 2 * kWeightTile;
  static constexpr int kHalves = 1;
  static constexpr bool kHasMinimum = true;
  static constexpr int kBias = 0;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    constexpr int kPairs = kQuads / 2;  // step q in the low nibbles, q + 4 in the high ones
    const Bytes both = load_bytes(group + quad % kPairs * kStepBytes + part * kPartBytes);
    return quad < kPairs ? low_nibbles(both) : high_nibbles(both);
  }
  static inline Vec scales(const uint8_t* head, const uint8_t* group, int, int part) {
    return load_codes(group + kCodes + part * kLanes) * load(floats(head) + part * kLanes);
  }
  static inline Vec minima(const uint8_t* head, const uint8_t* group, int part) {
    return load_codes(group + kCodes + kWeightTile + part * kLanes) *
           load(floats(head) + kWeightTile + part * kLanes);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    const uint8_t both = group[i / 4 % (kQuads / 2) * kStepBytes + row * 4 + i % 4];
    return i < kWeightGroup / 2 ? both & 15 : both >> 4;
  }
  static inline float scale(const uint8_t* head, const uint8_t* group, int, int row) {
    return float(group[kCodes + row]) * floats(head)[row];
  }
  static inline float minimum(const uint8_t* head, const uint8_t* group, int row) {
    return float(group[kCodes + kWeightTile + row]) * floats(head)[kWeightTile + row];
  }

 private:
  static inline const float* floats(const uint8_t* head) {
    return reinterpret_cast<const float*>(head);
  }
};

// What GGUF blocks are unpacked into.
template <int kBiasOf, int kHalvesOf, bool kHasMinimumOf>
struct Unpacked {
  static constexpr int kHalves = kHalvesOf;
  static constexpr bool kHasMinimum = kHasMinimumOf;
  static constexpr int kBias = kBiasOf;
  static constexpr int64_t kBytes = kValuesBytes + (kHalves + kHasMinimum) * 4 * kWeightTile;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return load_bytes(group + quad * kStepBytes + part * kPartBytes);
  }
  static inline Vec scales(const uint8_t*, const uint8_t* group, int half, int part) {
    return load(floats(group, half) + part * kLanes);
  }
  static inline Vec minima(const uint8_t*, const uint8_t* group, int part) {
    return load(floats(group, kHalves) + part * kLanes);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return group[i / 4 * kStepBytes + row * 4 + i % 4];
  }
  static inline float scale(const uint8_t*, const uint8_t* group, int half, int row) {
    return floats(group, half)[row];
  }
  static inline float minimum(const uint8_t*, const uint8_t* group, int row) {
    return floats(group, kHalves)[row];
  }
  template <typename Group>  // row of floats after the values: scales of a half, or minima
  static inline auto floats(Group* group, int i) {
    using Float = std::conditional_t<std::is_const_v<Group>, const float, float>;
    return reinterpret_cast<Float*>(group + kValuesBytes) + i * kWeightTile;
  }
};

// ---- 16 rows of blocks ---------------------------------------------------------------------

typedef uint32_t Words __attribute__((vector_size(64)));  // a lane is a row
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t SignedWords __attribute__((vector_size(64)));

struct Rows {
  const uint8_t* row[kWeightTile];

  // Words `offset / 4 .. + 4` of every row.
  inline void load_four(int64_t offset, Words (&words)[4]) const {
#if defined(__AVX512F__)
    __m512i quads[4];  // quads[c], 128-bit lane l: row 4 l + c
    for (int c = 0; c < 4; ++c) {
      const auto at = [&](int l) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[4 * l + c] + offset));
      };
      quads[c] = _mm512_castsi128_si512(at(0));
      quads[c] = _mm512_inserti32x4(quads[c], at(1), 1);
      quads[c] = _mm512_inserti32x4(quads[c], at(2), 2);
      quads[c] = _mm512_inserti32x4(quads[c], at(3), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(quads[0], quads[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(quads[2], quads[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(quads[0], quads[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(quads[2], quads[3]);
    words[0] = (Words)_mm512_unpacklo_epi64(low01, low23);
    words[1] = (Words)_mm512_unpackhi_epi64(low01, low23);
    words[2] = (Words)_mm512_unpacklo_epi64(high01, high23);
    words[3] = (Words)_mm512_unpackhi_epi64(high01, high23);
#else
    for (int r = 0; r < kWeightTile; ++r) {
      uint32_t four[4];
      std::memcpy(four, row[r] + offset, 16);
      for (int c = 0; c < 4; ++c) words[c][r] = four[c];
    }
#endif
  }
  // The float16 at `offset` of every row.
  inline void load_halves(int64_t offset, float* to) const {
    f16 halves[kWeightTile];
    for (int r = 0; r < kWeightTile; ++r) std::memcpy(&halves[r], row[r] + offset, 2);
    for (int i = 0; i < kWeightTile; i += kLanes) store(to + i, load(halves + i));
  }
};

inline void put(const Words& words, uint8_t* group, int quad) {
  std::memcpy(group + quad * kStepBytes, &words, kStepBytes);
}
// Words hold small integers.
inline void to_floats(const Words& words, Floats& floats) {
  floats = __builtin_convertvector((SignedWords)words, Floats);
}

// The float16 in the low half of each word.
inline void low_halves(const Words& words, Floats& floats) {
  f16 halves[kWeightTile];
  for (int r = 0; r < kWeightTile; ++r) halves[r].bits = uint16_t(words[r]);
  for (int i = 0; i < kWeightTile; i += kLanes) {
    store(reinterpret_cast<float*>(&floats) + i, load(halves + i));
  }
}

// ---- formats: blocks of a row, and how they are unpacked -----------------------------------

constexpr uint32_t kNibbles = 0x0f0f0f0f;

// 16 bytes: element i in the low nibble of byte i, i + 16 in the high one.
inline void unpack_nibbles(const Rows& rows, int64_t offset, uint8_t* to) {
  Words words[4];
  rows.load_four(offset, words);
  for (int c = 0; c < 4; ++c) {
    put(words[c] & kNibbles, to, c);
    put(words[c] >> 4 & kNibbles, to, 4 + c);
  }
}

struct Q4_0 {
  using Layout = Unpacked<8, 1, false>;
  static constexpr int64_t kBlockBytes = 18, kGroups = 1;  // of 32 in a block
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    unpack_nibbles(rows, at + 2, to);
  }
};

struct Q4_1 {
  using Layout = Unpacked<0, 1, true>;
  static constexpr int64_t kBlockBytes = 20, kGroups = 1;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    rows.load_halves(at + 2, Layout::floats(to, 1));
    unpack_nibbles(rows, at + 4, to);
  }
};

struct Q8_0 {
  using Layout = Unpacked<128, 1, false>;
  static constexpr int64_t kBlockBytes = 34, kGroups = 1;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    for (int half = 0; half < 2; ++half) {
      Words words[4];
      rows.load_four(at + 2 + 16 * half, words);
      for (int c = 0; c < 4; ++c) put(words[c] ^ 0x80808080u, to, 4 * half + c);
    }
  }
};

// d, dmin float16; 8 scales and 8 minima of 6 bits in 12 bytes; 128 bytes of nibbles: groups 2 i
// and 2 i + 1 in the low and high nibbles of 32 bytes. x = d * scale * value - dmin * minimum.
struct Q4_K {
  using Layout = Unpacked<0, 1, true>;
  static constexpr int64_t kBlockBytes = 144, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    Words head[4];  // d and dmin, then the 12 bytes
    rows.load_four(at, head);
    Floats d, dmin;
    low_halves(head[0], d);
    low_halves(head[0] >> 16, dmin);
    for (int g = 0; g < kGroups; ++g) {
      const int shift = 8 * (g % 4);
      Words scale = head[1] >> shift & 63, minimum = head[2] >> shift & 63;
      if (g >= 4) {  // 4 bits each in the last word, their upper 2 above those of group g - 4
        scale = (head[3] >> shift & 15) | (head[1] >> (shift + 6) & 3) << 4;
        minimum = (head[3] >> (shift + 4) & 15) | (head[2] >> (shift + 6) & 3) << 4;
      }
      Floats scales, minima;
      to_floats(scale, scales);
      to_floats(minimum, minima);
      scales *= d;
      minima *= -dmin;
      std::memcpy(Layout::floats(to + g * Layout::kBytes, 0), &scales, sizeof(scales));
      std::memcpy(Layout::floats(to + g * Layout::kBytes, 1), &minima, sizeof(minima));
    }
    for (int i = 0; i < 8; ++i) {  // 16 bytes each
      Words words[4];
      rows.load_four(at + 16 + 16 * i, words);
      uint8_t* low = to + i / 2 * 2 * Layout::kBytes;
      for (int c = 0; c < 4; ++c) {
        put(words[c] & kNibbles, low, i % 2 * 4 + c);
        put(words[c] >> 4 & kNibbles, low + Layout::kBytes, i % 2 * 4 + c);
      }
    }
  }
};

// 128 bytes of low nibbles, 64 of upper pairs of bits, 16 scales int8, d float16. Of each half of
// 128 elements, groups 0 and 1 have the low, 2 and 3 the high nibbles of its 64 bytes; group g the
// bits 2 g and 2 g + 1 of its 32 bytes of pairs. x = d * scale * (value - 32), a scale for 16.
struct Q6_K {
  using Layout = Unpacked<32, 2, false>;
  static constexpr int64_t kBlockBytes = 210, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    alignas(64) float d[kWeightTile];
    rows.load_halves(at + 208, d);
    Words scales[4];
    rows.load_four(at + 192, scales);
    for (int s = 0; s < 16; ++s) {
      const SignedWords scale = (SignedWords)(scales[s / 4] << (24 - 8 * (s % 4))) >> 24;
      Floats factor;
      std::memcpy(&factor, d, sizeof(d));
      factor *= __builtin_convertvector(scale, Floats);
      std::memcpy(Layout::floats(to + s / 2 * Layout::kBytes, s % 2), &factor, sizeof(factor));
    }
    for (int i = 0; i < 4; ++i) {  // 16 elements of each group of a half of the block
      unpack_sixteen(rows, at + i / 2 * 64 + i % 2 * 16, at + 128 + 16 * i,
                     to + i / 2 * 4 * Layout::kBytes, i % 2 * 4);
    }
  }

 private:
  static inline void unpack_sixteen(const Rows& rows, int64_t nibbles, int64_t pairs, uint8_t* to,
                                    int quad) {
    Words even[4], odd[4], upper[4];
    rows.load_four(nibbles, even);
    rows.load_four(nibbles + 32, odd);
    rows.load_four(pairs, upper);
    for (int c = 0; c < 4; ++c) {
      for (int g = 0; g < 4; ++g) {
        const Words low = (g % 2 ? odd[c] : even[c]) >> (g / 2 * 4) & kNibbles;
        put(low | (upper[c] >> (2 * g) & 0x03030303u) << 4, to + g * Layout::kBytes, quad + c);
      }
    }
  }
};

// ---- a format of either kind ---------------------------------------------------------------

// Own formats: read in place.
template <typename LayoutOf>
struct Own {
  using Layout = LayoutOf;
  static constexpr bool kInPlace = true;
};
// GGUF's: unpacked first.
template <typename BlockOf>
struct Gguf {
  using Block = BlockOf;
  using Layout = typename Block::Layout;
  static constexpr bool kInPlace = false;
};

template <typename Body>
inline void with_format(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kInt8:
      return body(Own<Int8Layout>{});
    case DType::kInt4:
      return body(Own<Int4Layout>{});
    case DType::kQ4_0:
      return body(Gguf<Q4_0>{});
    case DType::kQ4_1:
      return body(Gguf<Q4_1>{});
    case DType::kQ8_0:
      return body(Gguf<Q8_0>{});
    case DType::kQ4_K:
      return body(Gguf<Q4_K>{});
    default:
      return body(Gguf<Q6_K>{});
  }
}

// ---- tiles ---------------------------------------------------------------------------------

inline int64_t num_groups(int64_t k) { return ceil_div(k, kWeightGroup); }

struct Tile {
  const uint8_t* weight;
  int64_t first_row, num_rows;  // at most 16
};

// What a layout in place has before a tile's groups.
template <typename Format>
inline const uint8_t* head_of(const Tile& tile, int64_t k) {
  using Layout = typename Format::Layout;
  if constexpr (!Format::kInPlace)
    return nullptr;
  else {
    const int64_t tile_bytes = Layout::kHeadBytes + num_groups(k) * Layout::kBytes;
    return tile.weight + tile.first_row / kWeightTile * tile_bytes;
  }
}

// Groups [g, g + count) of a tile in the layout; `to` takes what has to be unpacked.
template <typename Format>
const uint8_t* groups_of(const Tile& tile, int64_t k, int64_t g, int64_t count, uint8_t* to) {
  using Layout = typename Format::Layout;
  if constexpr (Format::kInPlace) {
    return head_of<Format>(tile, k) + Layout::kHeadBytes + g * Layout::kBytes;
  } else {
    using Block = typename Format::Block;
    const int64_t row_bytes = num_groups(k) / Block::kGroups * Block::kBlockBytes;
    Rows rows;
    for (int64_t i = 0; i < kWeightTile; ++i) {  // the last row stands in for those past it
      rows.row[i] = tile.weight + (tile.first_row + smaller(i, tile.num_rows - 1)) * row_bytes;
    }
    for (int64_t at = 0; at < count; at += Block::kGroups) {
      Block::unpack(rows, (g + at) / Block::kGroups * Block::kBlockBytes, to + at * Layout::kBytes);
    }
    return to;
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
