// GGUF's formats with one scale for 32 elements, in tiles (quantized.h): multiplied where they lie.
#pragma once

#include "cpu/linear/gguf_blocks.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

inline float f16_at(const uint8_t* p) {
  f16 x;
  std::memcpy(&x, p, 2);
  return to_float(x);
}

// Scales, then minima where there are, then words.
template <typename Block, int kBiasOf>
struct TileOf {
  static constexpr int kGroup = int(kWeightGroup);
  static constexpr bool kRotated = false;
  static constexpr int64_t kHeadBytes = 0;
  static constexpr int64_t kBytes = kWeightTile * Block::kBlockBytes;
  static constexpr int64_t kWords = kWeightTile * Block::kWordsAt;
  static constexpr int kHalves = 1;
  static constexpr bool kHasMinimum = Block::kWordsAt == 4;
  static constexpr int kBias = kBiasOf;
  static inline Vec scales(const uint8_t*, const uint8_t* group, int, int part) {
    return load(reinterpret_cast<const f16*>(group) + part * kLanes);
  }
  static inline Vec minima(const uint8_t*, const uint8_t* group, int part) {
    return load(reinterpret_cast<const f16*>(group) + kWeightTile + part * kLanes);
  }
  static inline float scale(const uint8_t*, const uint8_t* group, int, int row) {
    return f16_at(group + 2 * row);
  }
  static inline float minimum(const uint8_t*, const uint8_t* group, int row) {
    return f16_at(group + 2 * kWeightTile + 2 * row);
  }
};

// Quad q of 16 bytes a row: in low nibbles, from 4 on in high ones.
inline Bytes nibbles_of_quad(const uint8_t* words, int quad, int part) {
  const Bytes both = load_bytes(words + quad % 4 * kStepBytes + part * kPartBytes);
  return quad < 4 ? low_nibbles(both) : high_nibbles(both);
}
inline uint8_t nibble_of(const uint8_t* words, int i, int row) {
  const uint8_t both = words[i / 4 % 4 * kStepBytes + row * 4 + i % 4];
  return i < 16 ? both & 15 : both >> 4;
}

template <typename Block, int kBias>
struct NibbleTile : TileOf<Block, kBias> {
  using Tile = TileOf<Block, kBias>;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return nibbles_of_quad(group + Tile::kWords, quad, part);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return nibble_of(group + Tile::kWords, i, row);
  }
};

struct Iq4Tile : TileOf<IQ4_NL, 128> {
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return iq4_values(nibbles_of_quad(group + kWords, quad, part));
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return kIq4Values[nibble_of(group + kWords, i, row)];
  }
};

struct Q8Tile : TileOf<Q8_0, 128> {
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    return load_bytes(group + kWords + quad * kStepBytes + part * kPartBytes);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    return group[kWords + i / 4 * kStepBytes + row * 4 + i % 4];
  }
};

// Bytes of `low` with bit `bit` of those of `bits` as bit 4.
inline Bytes with_fifth(Bytes low, Bytes bits, int bit) {
#if defined(__AVX2__)
  typedef uint32_t Words __attribute__((vector_size(sizeof(Bytes))));
  const Words words = (Words)bits, moved = bit <= 4 ? words << (4 - bit) : words >> (bit - 4);
  return (Bytes)((Words)low | (moved & 0x10101010));
#else
  for (int i = 0; i < kPartBytes; ++i) low.v[i] |= uint8_t((bits.v[i] >> bit & 1) << 4);
  return low;
#endif
}

// A word a row of fifth bits, then nibbles.
template <typename Block, int kBias>
struct FiveTile : TileOf<Block, kBias> {
  using Tile = TileOf<Block, kBias>;
  static inline Bytes values(const uint8_t* group, int quad, int part) {
    const uint8_t* words = group + Tile::kWords;
    return with_fifth(nibbles_of_quad(words + kStepBytes, quad, part),
                      load_bytes(words + part * kPartBytes), quad);
  }
  static inline uint8_t value(const uint8_t* group, int i, int row) {
    const uint8_t* words = group + Tile::kWords;
    const int fifth = words[row * 4 + i % 4] >> (i / 4) & 1;
    return uint8_t(nibble_of(words + kStepBytes, i, row) | fifth << 4);
  }
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
