// GGUF's quantised blocks, unpacked 16 rows at a time into the layout of the integer dot product.
//
// Blocks of 16 rows are loaded and transposed as 4 x 4 words, so that a lane is a row; nibbles and
// bits are then taken apart in all lanes at once. The formats are ggml's.
#pragma once

#include "cpu/linear/layouts.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- 16 rows of blocks ---------------------------------------------------------------------

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

constexpr uint32_t kNibbles = 0x0f0f0f0f;

// 16 bytes: element i in the low nibble of byte i, i + 16 in the high one.
inline void unpack_nibbles(const Rows& rows, int64_t offset, uint8_t* to) {
  Uint32x16 words[4];
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
      Uint32x16 words[4];
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
    Uint32x16 head[4];  // d and dmin, then the 12 bytes
    rows.load_four(at, head);
    Floats d, dmin;
    low_halves(head[0], d);
    low_halves(head[0] >> 16, dmin);
    for (int g = 0; g < kGroups; ++g) {
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

// 128 bytes of low nibbles, 64 of upper pairs of bits, 16 scales int8, d float16. Of each half of
// 128 elements, groups 0 and 1 have the low, 2 and 3 the high nibbles of its 64 bytes; group g the
// bits 2 g and 2 g + 1 of its 32 bytes of pairs. x = d * scale * (value - 32), a scale for 16.
struct Q6_K {
  using Layout = Unpacked<32, 2, false>;
  static constexpr int64_t kBlockBytes = 210, kGroups = 8;
  static inline void unpack(const Rows& rows, int64_t at, uint8_t* to) {
    alignas(64) float d[kWeightTile];
    rows.load_halves(at + 208, d);
    Uint32x16 scales[4];
    rows.load_four(at + 192, scales);
    for (int s = 0; s < 16; ++s) {
      const Int32x16 scale = (Int32x16)(scales[s / 4] << (24 - 8 * (s % 4))) >> 24;
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
    Uint32x16 even[4], odd[4], upper[4];
    rows.load_four(nibbles, even);
    rows.load_four(nibbles + 32, odd);
    rows.load_four(pairs, upper);
    for (int c = 0; c < 4; ++c) {
      for (int g = 0; g < 4; ++g) {
        const Uint32x16 low = (g % 2 ? odd[c] : even[c]) >> (g / 2 * 4) & kNibbles;
        put(low | (upper[c] >> (2 * g) & 0x03030303u) << 4, to + g * Layout::kBytes, quad + c);
      }
    }
  }
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
