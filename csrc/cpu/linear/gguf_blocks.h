// GGUF's quantised blocks, unpacked 16 rows at a time into the layout of the integer dot product.
//
// Blocks of 16 rows are loaded and transposed as 4 x 4 words, so that a lane is a row; nibbles and
// bits are then taken apart in all lanes at once. The formats are ggml's. Values without a minimum
// are stored with 128 added, whatever their own zero is, so that formats share layouts.
#pragma once

#include "cpu/linear/layouts.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- 16 rows of blocks, apart or in a tile
// ---------------------------------------------------------------------

typedef uint32_t Uint32x16 __attribute__((vector_size(64)));  // a lane is a row
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Int32x16 __attribute__((vector_size(64)));

struct Rows {
  const uint8_t* row[kWeightTile];

  // Words `offset / 4 .. + 4` of every row.
  inline void load_four(int64_t offset, Uint32x16 (&words)[4]) const {
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
    words[0] = (Uint32x16)_mm512_unpacklo_epi64(low01, low23);
    words[1] = (Uint32x16)_mm512_unpackhi_epi64(low01, low23);
    words[2] = (Uint32x16)_mm512_unpacklo_epi64(high01, high23);
    words[3] = (Uint32x16)_mm512_unpackhi_epi64(high01, high23);
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
#if defined(__AVX512F__)
    // Stores of 2 bytes and a load of 32 would wait for each other: inserted in registers.
    const auto eight = [&](int first) {
      const auto at = [&](int r) {
        int16_t half;
        std::memcpy(&half, row[first + r] + offset, 2);
        return half;
      };
      return _mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
    };
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_set_m128i(eight(8), eight(0))));
#else
    f16 halves[kWeightTile];
    for (int r = 0; r < kWeightTile; ++r) std::memcpy(&halves[r], row[r] + offset, 2);
    for (int i = 0; i < kWeightTile; i += kLanes) store(to + i, load(halves + i));
#endif
  }
};

inline void put(const Uint32x16& words, uint8_t* group, int quad) {
  std::memcpy(group + quad * kStepBytes, &words, kStepBytes);
}
// Words hold small integers.
inline void to_floats(const Uint32x16& words, Floats& floats) {
  floats = __builtin_convertvector((Int32x16)words, Floats);
}

// The float16 in the low half of each word.
inline void low_halves(const Uint32x16& words, Floats& floats) {
#if defined(__AVX512F__)
  floats = (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#else
  f16 halves[kWeightTile];
  for (int r = 0; r < kWeightTile; ++r) halves[r].bits = uint16_t(words[r]);
  for (int i = 0; i < kWeightTile; i += kLanes) {
    store(reinterpret_cast<float*>(&floats) + i, load(halves + i));
  }
#endif
}

// ---- formats: blocks of a row, and how they are unpacked -----------------------------------
//
// kGroups: of a layout's elements in a block. kHead: bytes of scales in front of its values, of the
// formats of 32 elements.

constexpr uint32_t kNibbles = 0x0f0f0f0f;
constexpr uint32_t kPairs = 0x03030303;
constexpr uint32_t kOnes = 0x01010101;

// 16 bytes: element i in the low nibble of byte i, i + 16 in the high one; plus `zero`.
inline void unpack_nibbles(const Rows& rows, int64_t offset, uint8_t* to, uint32_t zero = 0) {
  Uint32x16 words[4];
  rows.load_four(offset, words);
  for (int c = 0; c < 4; ++c) {
    put((words[c] & kNibbles) + zero * kOnes, to, c);
    put((words[c] >> 4 & kNibbles) + zero * kOnes, to, 4 + c);
  }
}

struct Q4_0 {
  using Layout = Unpacked<128, 1, false>;
  static constexpr int64_t kBlockBytes = 18, kGroups = 1, kHead = 2;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    unpack_nibbles(rows, at + 2, to, 128 - 8);
  }
};

struct Q4_1 {
  using Layout = Unpacked<0, 1, true>;
  static constexpr int64_t kBlockBytes = 20, kGroups = 1, kHead = 4;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    rows.load_halves(at + 2, Layout::floats(to, 1));
    unpack_nibbles(rows, at + 4, to);
  }
};

// A bit for each element in element order; becomes bit q of byte b of element 4 q + b.
inline void order_bits_by_quad(Uint32x16& words) {
  Uint32x16 ordered = {};
  for (int b = 0; b < 4; ++b) {  // every fourth bit, put together
    Uint32x16 bits = words >> b & 0x11111111;
    bits = (bits | bits >> 3) & 0x03030303;
    bits = (bits | bits >> 6) & 0x000f000f;
    ordered |= ((bits | bits >> 12) & 0xff) << (8 * b);
  }
  words = ordered;
}

// A word of fifth bits, then 16 bytes of nibbles.
inline void unpack_fives(const Rows& rows, int64_t offset, uint8_t* to, uint32_t zero = 0) {
  Uint32x16 words[4];
  rows.load_four(offset, words);
  Uint32x16 fifths = words[0];
  order_bits_by_quad(fifths);
  rows.load_four(offset + 4, words);
  for (int c = 0; c < 4; ++c) {
    const Uint32x16 low = (words[c] & kNibbles) | (fifths >> c & kOnes) << 4;
    const Uint32x16 high = (words[c] >> 4 & kNibbles) | (fifths >> (4 + c) & kOnes) << 4;
    put(low + zero * kOnes, to, c);
    put(high + zero * kOnes, to, 4 + c);
  }
}

struct Q5_0 {
  using Layout = Unpacked<128, 1, false>;
  static constexpr int64_t kBlockBytes = 22, kGroups = 1, kHead = 2;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    unpack_fives(rows, at + 2, to, 128 - 16);
  }
};

struct Q5_1 {
  using Layout = Unpacked<0, 1, true>;
  static constexpr int64_t kBlockBytes = 24, kGroups = 1, kHead = 4;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    rows.load_halves(at + 2, Layout::floats(to, 1));
    unpack_fives(rows, at + 4, to);
  }
};

struct Q8_0 {
  using Layout = Unpacked<128, 1, false>;
  static constexpr int64_t kBlockBytes = 34, kGroups = 1, kHead = 2;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    for (int half = 0; half < 2; ++half) {
      Uint32x16 words[4];
      rows.load_four(at + 2 + 16 * half, words);
      for (int c = 0; c < 4; ++c) put(words[c] ^ 0x80808080u, to, 4 * half + c);
    }
  }
};

// What a nibble of IQ4_NL stands for, plus 128.
alignas(16) constexpr uint8_t kIq4Values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                129, 141, 153, 166, 181, 197, 217, 241};

inline Bytes iq4_values(Bytes nibbles) {
#if defined(__AVX512F__)
  const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(kIq4Values));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
#elif defined(__AVX2__)
  const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(kIq4Values));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), nibbles);
#else
  for (uint8_t& byte : nibbles.v) byte = kIq4Values[byte];
  return nibbles;
#endif
}

struct IQ4_NL {
  using Layout = Unpacked<128, 1, false>;
  static constexpr int64_t kBlockBytes = 18, kGroups = 1, kHead = 2;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    rows.load_halves(at, Layout::floats(to, 0));
    unpack_nibbles(rows, at + 2, to);
    for (int i = 0; i < Layout::kValuesBytes; i += kPartBytes) {
      const Bytes values = iq4_values(load_bytes(to + i));
      std::memcpy(to + i, &values, kPartBytes);
    }
  }
};

// 16 bytes, of groups of 16: a scale in the low nibble, a minimum in the high one; 64 bytes of
// pairs of bits; d, dmin float16. Of each half of 128 elements, groups 2 j and 2 j + 1 have bits
// 2 j and 2 j + 1 of its 32 bytes. x = d * scale * value - dmin * minimum.
struct Q2_K {
  using Layout = Unpacked<0, 1, true, 16>;
  static constexpr int64_t kBlockBytes = 84, kGroups = 16;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    Floats d, dmin;
    rows.load_halves(at + 80, reinterpret_cast<float*>(&d));
    rows.load_halves(at + 82, reinterpret_cast<float*>(&dmin));
    Uint32x16 codes[4];
    rows.load_four(at, codes);
    for (int g = 0; g < kGroups; ++g) {
      const Uint32x16 both = codes[g / 4] >> (8 * (g % 4));
      Floats scales, minima;
      to_floats(both & 15, scales);
      to_floats(both >> 4 & 15, minima);
      scales *= d;
      minima *= -dmin;
      std::memcpy(Layout::floats(to + g * Layout::kBytes, 0), &scales, sizeof(scales));
      std::memcpy(Layout::floats(to + g * Layout::kBytes, 1), &minima, sizeof(minima));
    }
    for (int i = 0; i < 4; ++i) {  // 16 bytes: groups i % 2 + 2 j of half i / 2
      Uint32x16 words[4];
      rows.load_four(at + 16 + 16 * i, words);
      uint8_t* group = to + (i / 2 * 8 + i % 2) * Layout::kBytes;
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          put(words[c] >> (2 * j) & kPairs, group + 2 * j * Layout::kBytes, c);
        }
      }
    }
  }
};

// 32 bytes of third bits, 64 of pairs of bits, 16 scales of 6 bits in 12 bytes, d float16. Group g
// of a half of 128 elements has bits 2 g and 2 g + 1 of its 32 bytes of pairs; group g of the block
// bit g of the 32 bytes in front. x = d * (scale - 32) * (value - 4), a scale for 16.
struct Q3_K {
  using Layout = Unpacked<128, 2, false>;
  static constexpr int64_t kBlockBytes = 110, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    unpack_scales(rows, at, to);
    for (int i = 0; i < 4; ++i) {  // 16 elements of each group of a half of the block
      Uint32x16 thirds[4], words[4];
      rows.load_four(at + i % 2 * 16, thirds);
      rows.load_four(at + 32 + 16 * i, words);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int g = i / 2 * 4 + j;
          const Uint32x16 value = (words[c] >> (2 * j) & kPairs) | (thirds[c] >> g & kOnes) << 2;
          put(value + (128 - 4) * kOnes, to + g * Layout::kBytes, i % 2 * 4 + c);
        }
      }
    }
  }

 private:
  static inline void unpack_scales(const Rows& rows, int64_t at, uint8_t* to) {
    Floats d;
    rows.load_halves(at + 108, reinterpret_cast<float*>(&d));
    Uint32x16 words[4];  // the last three: low nibbles, then pairs of upper bits
    rows.load_four(at + 92, words);
    for (int s = 0; s < 16; ++s) {
      const int shift = 8 * (s % 4);
      const Uint32x16 low = words[1 + s / 4 % 2] >> (shift + s / 8 * 4) & 15;
      const Uint32x16 code = low | (words[3] >> (shift + s / 4 * 2) & 3) << 4;
      Floats factor;
      to_floats(code - 32, factor);
      factor *= d;
      std::memcpy(Layout::floats(to + s / 2 * Layout::kBytes, s % 2), &factor, sizeof(factor));
    }
  }
};

// The head of Q4_K and Q5_K. d, dmin float16; 8 scales and 8 minima of 6 bits in 12 bytes.
template <typename Layout>
inline void unpack_k_scales(const Rows& rows, int64_t at, uint8_t* to) {
  Uint32x16 head[4];  // d and dmin, then the 12 bytes
  rows.load_four(at, head);
  Floats d, dmin;
  low_halves(head[0], d);
  low_halves(head[0] >> 16, dmin);
  for (int g = 0; g < 8; ++g) {
    const int shift = 8 * (g % 4);
    Uint32x16 scale = head[1] >> shift & 63, minimum = head[2] >> shift & 63;
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
}

// The head, then 128 bytes of nibbles: groups 2 i and 2 i + 1 in the low and high nibbles of 32
// bytes. x = d * scale * value - dmin * minimum.
struct Q4_K {
  using Layout = Unpacked<0, 1, true>;
  static constexpr int64_t kBlockBytes = 144, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    unpack_k_scales<Layout>(rows, at, to);
    for (int i = 0; i < 8; ++i) {  // 16 bytes each
      Uint32x16 words[4];
      rows.load_four(at + 16 + 16 * i, words);
      uint8_t* low = to + i / 2 * 2 * Layout::kBytes;
      for (int c = 0; c < 4; ++c) {
        put(words[c] & kNibbles, low, i % 2 * 4 + c);
        put(words[c] >> 4 & kNibbles, low + Layout::kBytes, i % 2 * 4 + c);
      }
    }
  }
};

// The head, 32 bytes of fifth bits, of group g bit g; then as in Q4_K.
struct Q5_K {
  using Layout = Unpacked<0, 1, true>;
  static constexpr int64_t kBlockBytes = 176, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    unpack_k_scales<Layout>(rows, at, to);
    Uint32x16 fifths[2][4];
    for (int half = 0; half < 2; ++half) rows.load_four(at + 16 + 16 * half, fifths[half]);
    for (int i = 0; i < 8; ++i) {
      Uint32x16 words[4];
      rows.load_four(at + 48 + 16 * i, words);
      const int even = i / 2 * 2;  // group
      uint8_t* low = to + even * Layout::kBytes;
      for (int c = 0; c < 4; ++c) {
        const Uint32x16 fifth = fifths[i % 2][c] >> even;
        put((words[c] & kNibbles) | (fifth & kOnes) << 4, low, i % 2 * 4 + c);
        put((words[c] >> 4 & kNibbles) | (fifth >> 1 & kOnes) << 4, low + Layout::kBytes,
            i % 2 * 4 + c);
      }
    }
  }
};

// 128 bytes of low nibbles, 64 of upper pairs of bits, 16 scales int8, d float16. Of each half of
// 128 elements, groups 0 and 1 have the low, 2 and 3 the high nibbles of its 64 bytes; group g the
// bits 2 g and 2 g + 1 of its 32 bytes of pairs. x = d * scale * (value - 32), a scale for 16.
struct Q6_K {
  using Layout = Unpacked<128, 2, false>;
  static constexpr int64_t kBlockBytes = 210, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    Floats d;
    rows.load_halves(at + 208, reinterpret_cast<float*>(&d));
    Uint32x16 scales[4];
    rows.load_four(at + 192, scales);
    for (int s = 0; s < 16; ++s) {
      const Int32x16 scale = (Int32x16)(scales[s / 4] << (24 - 8 * (s % 4))) >> 24;
      const Floats factor = d * __builtin_convertvector(scale, Floats);
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
    Uint32x16 even[4], odd[4], upper[4];
    rows.load_four(nibbles, even);
    rows.load_four(nibbles + 32, odd);
    rows.load_four(pairs, upper);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const Uint32x16 low = (g % 2 ? odd[c] : even[c]) >> (g / 2 * 4) & kNibbles;
        const Uint32x16 value = low | (upper[c] >> (2 * g) & kPairs) << 4;
        put(value + (128 - 32) * kOnes, to + g * Layout::kBytes, quad + c);
      }
    }
  }
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
