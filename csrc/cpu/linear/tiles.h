// GGUF's formats in tiles (quantized.h): multiplied where they lie.
//
// A group's values are unsigned integers of a few bits: nibbles, then pairs of bits, then single
// bits. The scales are those of the blocks, to the bit. One token over (11008, 4096), two cores of
// an AMD EPYC (Zen 4) that read 63 GB/s: q4_0 to iq4_nl 61 to 79 % of it (rows of blocks: 25 to
// 30), q4_k and q5_k 50 (30, 29), q6_k 45 (19), q3_k 37 (16), q2_k 22 (17): K-quants are bound by
// the arithmetic of their scales.
#pragma once

#include "cpu/linear/gguf_blocks.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- values of a group ---------------------------------------------------------------------

// Bits from `from` on of every byte, so many as `mask` has, moved to bit `to`.
inline Bytes bits_of(Bytes bytes, int from, uint32_t mask, int to) {
#if defined(__AVX2__)
  typedef uint32_t Words __attribute__((vector_size(sizeof(Bytes))));
  const Words words = (Words)bytes;
  const Words moved = to >= from ? words << (to - from) : words >> (from - to);
  return (Bytes)(moved & (mask << to) * kOnes);
#else
  for (uint8_t& byte : bytes.v) byte = uint8_t((byte >> from & mask) << to);
  return bytes;
#endif
}
inline Bytes join(Bytes a, Bytes b) {
#if defined(__AVX2__)
  return a | b;
#else
  for (int i = 0; i < kPartBytes; ++i) a.v[i] |= b.v[i];
  return a;
#endif
}

template <int kBits, int kGroupOf>
struct Packed {
  static constexpr int kQuads = kGroupOf / 4;
  static constexpr bool kHasNibbles = kBits == 4 || kBits == 5 || kBits == 6;
  static constexpr bool kHasPairs = kBits == 2 || kBits == 3 || kBits == 6;
  static constexpr bool kHasOnes = kBits == 3 || kBits == 5;
  static constexpr int kPairsTo = kHasNibbles ? 4 : 0;  // bit of a value
  static constexpr int kPairsAt = kHasNibbles ? kQuads / 2 * kStepBytes : 0;
  static constexpr int kOnesAt = kPairsAt + (kHasPairs ? kQuads / 4 * kStepBytes : 0);
  static constexpr int64_t kBytes = kQuads * kStepBytes * kBits / 8;

  // Quad q is in the low nibbles of word q, from the middle on in the high ones; in bits 2 (q % 4)
  // of word q / 4 of pairs; in bit q of the word of ones.
  static inline Bytes values(const uint8_t* packed, int quad, int part) {
    const uint8_t* at = packed + part * kPartBytes;
    if constexpr (kBits == 8) return load_bytes(at + quad * kStepBytes);
    Bytes value{};
    if constexpr (kHasNibbles) {
      const Bytes both = load_bytes(at + quad % (kQuads / 2) * kStepBytes);
      value = quad < kQuads / 2 ? low_nibbles(both) : high_nibbles(both);
    }
    if constexpr (kHasPairs) {
      const Bytes pairs = load_bytes(at + kPairsAt + quad / 4 * kStepBytes);
      value = join(value, bits_of(pairs, 2 * (quad % 4), 3, kPairsTo));
    }
    if constexpr (kHasOnes) {
      value = join(value, bits_of(load_bytes(at + kOnesAt), quad, 1, kBits - 1));
    }
    return value;
  }
  static inline uint8_t value(const uint8_t* packed, int i, int row) {
    const int quad = i / 4;
    const uint8_t* at = packed + row * 4 + i % 4;
    if constexpr (kBits == 8) return at[quad * kStepBytes];
    int value = 0;
    if constexpr (kHasNibbles) {
      value = at[quad % (kQuads / 2) * kStepBytes] >> quad / (kQuads / 2) * 4 & 15;
    }
    if constexpr (kHasPairs) {
      value |= (at[kPairsAt + quad / 4 * kStepBytes] >> quad % 4 * 2 & 3) << kPairsTo;
    }
    if constexpr (kHasOnes) value |= (at[kOnesAt] >> quad & 1) << (kBits - 1);
    return uint8_t(value);
  }
  // From words of bytes, as a quad has them.
  static inline void pack(const Uint32x16 (&quads)[kQuads], uint8_t* packed) {
    if constexpr (kBits == 8) return (void)std::memcpy(packed, &quads, sizeof(quads));
    if constexpr (kHasNibbles) {
      for (int q = 0; q < kQuads / 2; ++q) {
        put((quads[q] & kNibbles) | (quads[q + kQuads / 2] & kNibbles) << 4, packed, q);
      }
    }
    if constexpr (kHasPairs) {
      for (int word = 0; word < kQuads / 4; ++word) {
        Uint32x16 pairs = {};
        for (int j = 0; j < 4; ++j) pairs |= (quads[4 * word + j] >> kPairsTo & kPairs) << (2 * j);
        put(pairs, packed + kPairsAt, word);
      }
    }
    if constexpr (kHasOnes) {
      Uint32x16 ones = {};
      for (int q = 0; q < kQuads; ++q) ones |= (quads[q] >> (kBits - 1) & kOnes) << q;
      put(ones, packed + kOnesAt, 0);
    }
  }
};

// ---- scales of a block ---------------------------------------------------------------------

// What a tile takes over of each row's block, in this order, the rows' fields side by side.
struct Fields {
  int halves_at, num_halves, words_at, num_words, bytes_at, num_bytes;
  constexpr int64_t size() const {
    return kWeightTile * (2 * num_halves + 4 * num_words + num_bytes);
  }
};

typedef uint32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef int8_t ByteLanes __attribute__((vector_size(kLanes)));

inline Vec as_floats(IntLanes integers) {
  const FloatLanes floats = __builtin_convertvector(integers, FloatLanes);
  return load(reinterpret_cast<const float*>(&floats));
}
inline IntLanes signed_bytes(const uint8_t* p) {
  ByteLanes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, IntLanes);
}
inline Vec halves_at(const uint8_t* p, int part) {
  return load(reinterpret_cast<const f16*>(p) + part * kLanes);
}
inline float half_at(const uint8_t* p, int row) {
  f16 x;
  std::memcpy(&x, p + 2 * row, 2);
  return to_float(x);
}

constexpr int64_t kHalvesBytes = 2 * kWeightTile;  // a float16 of each row

// One scale for 32: in front of its group's values.
template <typename Block, int kBits, int kBiasOf>
struct SimpleTile {
  using Values = Packed<kBits, int(kWeightGroup)>;
  static constexpr int kGroup = int(kWeightGroup);
  static constexpr int kShared = 1;
  static constexpr bool kRotated = false;
  static constexpr bool kHasMinimum = Block::kHead == 4;
  static constexpr Fields kFields = {0, kHasMinimum ? 2 : 1, 0, 0, 0, 0};
  static constexpr int64_t kHeadBytes = 0;
  static constexpr int64_t kBytes = kFields.size() + Values::kBytes;
  static constexpr int kHalves = 1;
  static constexpr int kBias = kBiasOf;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return Values::values(group + kFields.size(), quad, part);
  }
  static inline Vec scales(const uint8_t*, const uint8_t* group, int, int part) {
    return halves_at(group, part);
  }
  static inline Vec minima(const uint8_t*, const uint8_t* group, int part) {
    return halves_at(group + kHalvesBytes, part);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return Values::value(group + kFields.size(), i, row);
  }
  static inline float scale(const uint8_t*, const uint8_t* group, int, int row) {
    return half_at(group, row);
  }
  static inline float minimum(const uint8_t*, const uint8_t* group, int row) {
    return half_at(group + kHalvesBytes, row);
  }
};

struct Iq4Tile : SimpleTile<IQ4_NL, 4, 128> {
  using Codes = SimpleTile<IQ4_NL, 4, 128>;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return iq4_values(Codes::values(group, quad, part));
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return kIq4Values[Codes::value(group, i, row)];
  }
};

// K-quants: a tile is the values of all groups, then the blocks' scales, the last block's first: so
// a group's distance from the head, which is where they begin, says which block's it needs.
// `Scales` reads them: see below.
template <typename BlockOf, int kBits, int kBiasOf, typename Scales>
struct KTile : Packed<kBits, BlockOf::Layout::kGroup> {
  using Block = BlockOf;
  static constexpr int kGroup = Block::Layout::kGroup;
  static constexpr int kShared = 1;
  static constexpr bool kRotated = false;
  static constexpr int64_t kHeadBytes = 0;
  static constexpr int64_t kBytes = Packed<kBits, kGroup>::kBytes;
  static constexpr int kHalves = Block::Layout::kHalves;
  static constexpr bool kHasMinimum = Block::Layout::kHasMinimum;
  static constexpr int kBias = kBiasOf;
  static constexpr Fields kFields = Scales::kFields;
  static inline Vec scales(const uint8_t* head, const uint8_t* group, int half, int part) {
    const Place place = place_of(head, group);
    // The next blocks' fields: they lie apart from the values, which the loop over groups fetches.
    if (half == 0) {
      constexpr int64_t kStep = (kFields.size() + Block::kGroups - 1) / Block::kGroups;
      __builtin_prefetch(place.fields - 4 * kFields.size() + place.group * kStep);
    }
    return Scales::scales(place.fields, place.group * kHalves + half, part);
  }
  static inline Vec minima(const uint8_t* head, const uint8_t* group, int part) {
    const Place place = place_of(head, group);
    return Scales::minima(place.fields, place.group, part);
  }
  static inline float scale(const uint8_t* head, const uint8_t* group, int half, int row) {
    return of_row(scales(head, group, half, row / kLanes), row);
  }
  static inline float minimum(const uint8_t* head, const uint8_t* group, int row) {
    return of_row(minima(head, group, row / kLanes), row);
  }

 private:
  struct Place {
    const uint8_t* fields;
    int group;  // of the block
  };
  static inline Place place_of(const uint8_t* head, const uint8_t* group) {
    const uint64_t after = uint64_t(head - group) / kBytes - 1;  // groups
    return {head + after / Block::kGroups * kFields.size(),
            int(Block::kGroups - 1 - after % Block::kGroups)};
  }
  static inline float of_row(Vec x, int row) {
    float lanes[kLanes];
    store(lanes, x);
    return lanes[row % kLanes];
  }
};

struct NoMinima {
  static inline Vec minima(const uint8_t*, int, int) { return splat(0.0f); }
};

struct Q2Scales {
  static constexpr Fields kFields = {80, 2, 0, 0, 0, 16};
  static inline IntLanes codes(const uint8_t* fields, int group, int part) {
    return signed_bytes(fields + 2 * kHalvesBytes + group * kWeightTile + part * kLanes);
  }
  static inline Vec scales(const uint8_t* fields, int group, int part) {
    return as_floats(codes(fields, group, part) & 15) * halves_at(fields, part);
  }
  static inline Vec minima(const uint8_t* fields, int group, int part) {
    const Vec minus_dmin = splat(-1.0f) * halves_at(fields + kHalvesBytes, part);
    return as_floats(codes(fields, group, part) >> 4 & 15) * minus_dmin;
  }
};

inline Lanes words_at(const uint8_t* words, int i, int part) {
  Lanes lanes;
  std::memcpy(&lanes, words + i * kStepBytes + part * kPartBytes, sizeof(lanes));
  return lanes;
}

struct Q3Scales : NoMinima {
  static constexpr Fields kFields = {108, 1, 96, 3, 0, 0};
  static inline Vec scales(const uint8_t* fields, int s, int part) {
    const uint8_t* words = fields + kHalvesBytes;
    const int shift = 8 * (s % 4);
    const Lanes low = words_at(words, s / 4 % 2, part) >> (shift + s / 8 * 4) & 15;
    const Lanes code = low | (words_at(words, 2, part) >> (shift + s / 4 * 2) & 3) << 4;
    return as_floats((IntLanes)code - 32) * halves_at(fields, part);
  }
};

struct Q4Scales {
  static constexpr Fields kFields = {0, 2, 4, 3, 0, 0};
  static inline Vec codes(const uint8_t* fields, int group, int part, int minimum) {
    const uint8_t* words = fields + 2 * kHalvesBytes;
    const int shift = 8 * (group % 4);
    const Lanes word = words_at(words, minimum, part) >> shift;
    if (group < 4) return as_floats((IntLanes)(word & 63));
    const Lanes low = words_at(words, 2, part) >> (shift + 4 * minimum) & 15;
    return as_floats((IntLanes)(low | (word >> 6 & 3) << 4));
  }
  static inline Vec scales(const uint8_t* fields, int group, int part) {
    return codes(fields, group, part, 0) * halves_at(fields, part);
  }
  static inline Vec minima(const uint8_t* fields, int group, int part) {
    const Vec minus_dmin = splat(-1.0f) * halves_at(fields + kHalvesBytes, part);
    return codes(fields, group, part, 1) * minus_dmin;
  }
};

struct Q6Scales : NoMinima {
  static constexpr Fields kFields = {208, 1, 0, 0, 192, 16};
  static inline Vec scales(const uint8_t* fields, int s, int part) {
    const uint8_t* codes = fields + kHalvesBytes + s * kWeightTile + part * kLanes;
    return as_floats(signed_bytes(codes)) * halves_at(fields, part);
  }
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
