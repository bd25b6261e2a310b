// Weights as mma.m16n8k16 takes them, 16 rows by kChunk elements of k at a time.
//
// Lane 4 g + t of a warp holds rows g and g + 8. Of every 32 elements of k it takes 8 t .. 8 t + 7,
// so a float weight's 16 bytes as they lie in the checkpoint; step s of two takes 8 t + 4 s and the
// next three. x is taken the same way, so the products are those of the plain order.
//
// int8_mma, int4_mma: tiles of 16 rows x 64, tiles of one 16 rows after another, k a multiple of
// 64, rows padded to 16. Quantised along k by 32: x = value * scale, scale float16.
//   int8   2 x 32 x 16 bytes: [row g or g + 8][lane][8 of the first 32, 8 of the second]
//   int4   32 x 4 words: [lane][row g: first 32, second 32; row g + 8: alike]; element e of 8 at
//   bits
//          4 (e / 2) + 16 (e % 2), value + 8
//   then   16 x 2 scales: [row][first 32, second 32]
#pragma once

#include "cuda/runtime/common.cuh"
#include "cuda/runtime/ptx.cuh"

namespace codellama_rt {
namespace cuda {

constexpr int kTileRows = 16, kScaleGroup = 32;

// Fragments of one chunk: a[step] is the first operand of step number `step`.
template <typename T>
struct FloatWeight {
  using Math = T;
  static constexpr int kChunk = 32, kSteps = 2;
  static constexpr bool kScaled = false;

  struct Piece {
    uint4 rows[2];
  };

  // `row` and `row + 8` of n; past them the last row again: nobody looks at those results.
  CLRT_DEVICE static Piece load(const void* weight, int64_t n, int64_t k, int64_t tile,
                                int64_t chunk) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int64_t first = tile * kTileRows + g, at = chunk * kChunk + 8 * t;
    Piece piece{};
    if (at >= k) return piece;
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first + 8 * i < n ? first + 8 * i : n - 1;
      piece.rows[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(weight) + row * k + at);
    }
    return piece;
  }
  CLRT_DEVICE static void fragment(const Piece& piece, int step, uint32_t (&a)[4]) {
    for (int i = 0; i < 2; ++i) {
      a[i] = step == 0 ? piece.rows[i].x : piece.rows[i].z;
      a[2 + i] = step == 0 ? piece.rows[i].y : piece.rows[i].w;
    }
  }
  CLRT_DEVICE static float scale(const Piece&, int, int) { return 1; }
};

CLRT_DEVICE const uint32_t* tile_scales(const unsigned char* scales) {
  return reinterpret_cast<const uint32_t*>(scales) + threadIdx.x % kWarp / 4;
}
CLRT_DEVICE float half_of(uint32_t pair, int i) { return to_float(f16{uint16_t(pair >> 16 * i)}); }

// What int8 and int4 tiles share: `Values` of a lane, then scales.
template <typename Format, typename Values, int kBytes>
struct TiledWeight {
  using Math = bf16;
  static constexpr int kChunk = 64, kSteps = 4;
  static constexpr bool kScaled = true;
  static constexpr int64_t kTileBytes = kBytes + 64;

  struct Piece {
    Values values;
    uint32_t scales[2];
  };

  CLRT_DEVICE static Piece load(const void* weight, int64_t, int64_t k, int64_t tile,
                                int64_t chunk) {
    return read(static_cast<const unsigned char*>(weight) +
                (tile * (k / kChunk) + chunk) * kTileBytes);
  }
  CLRT_DEVICE static Piece read(const unsigned char* memory) {  // of one tile, in any memory
    Piece piece;
    piece.values = Format::values(reinterpret_cast<const uint4*>(memory) + threadIdx.x % kWarp);
    for (int i = 0; i < 2; ++i) piece.scales[i] = tile_scales(memory + kBytes)[8 * i];
    return piece;
  }
  // Of this lane's row g (i = 0) or g + 8, of the first or second 32.
  CLRT_DEVICE static float scale(const Piece& piece, int i, int group) {
    return half_of(piece.scales[i], group);
  }
};

struct TwoRows {
  uint4 rows[2];
};
struct Int8Weight : TiledWeight<Int8Weight, TwoRows, 1024> {
  CLRT_DEVICE static TwoRows values(const uint4* memory) { return {{memory[0], memory[kWarp]}}; }
  CLRT_DEVICE static uint32_t to_bf16(uint32_t x) {  // as QuantizedTile does
    return ptx::fma_bf16x2((x & 0x00800080) | 0x43004300, 0xbf80bf80,
                           (x & 0x007f007f) | 0x43004300);
  }
  CLRT_DEVICE static void fragment(const Piece& piece, int step, uint32_t (&a)[4]) {
    for (int i = 0; i < 2; ++i) {
      const uint4& row = piece.values.rows[i];
      const uint32_t word = step == 0 ? row.x : step == 1 ? row.y : step == 2 ? row.z : row.w;
      a[i] = to_bf16(ptx::permute_bytes(word, 0, 0x4140));
      a[2 + i] = to_bf16(ptx::permute_bytes(word, 0, 0x4342));
    }
  }
};

struct Int4Weight : TiledWeight<Int4Weight, uint4, 512> {
  CLRT_DEVICE static uint4 values(const uint4* memory) { return *memory; }
  CLRT_DEVICE static void fragment(const Piece& piece, int step, uint32_t (&a)[4]) {
    const uint4& words = piece.values;
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = step < 2 ? (i == 0 ? words.x : words.z) : (i == 0 ? words.y : words.w);
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = word >> 4 * (step % 2 * 2 + half) & 0x000f000f;
        // 128 + value + 8, minus 136.
        a[2 * half + i] = ptx::fma_bf16x2(pair | 0x43004300, 0x3f803f80, 0xc308c308);
      }
    }
  }
};

}  // namespace cuda
}  // namespace codellama_rt
