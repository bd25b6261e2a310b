// repack: a weight in a format of GGUF, in the tiles that the kernels multiply where they lie
// Shapes   weight (n, k) in rows of blocks; tiles as quantized.h says
// Traffic  weight_bytes(n, k) read, as many written, once each
// Limit    memory
// Tiling   a task takes tiles of 16 rows; blocks are unpacked as linear does it, then packed again
// Numerics bits are moved, none is changed
#include "cpu/linear/formats.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// A block's values, 128 - bias more than a tile has them in formats without a minimum.
template <typename Block>
void unpack_values(const Rows& rows, int64_t at, uint8_t* to) {
  Block::unpack(rows, at, to);
}
template <>
void unpack_values<IQ4_NL>(const Rows& rows, int64_t at, uint8_t* to) {
  unpack_nibbles(rows, at + IQ4_NL::kHead, to, 128 - Iq4Tile::kBias);  // not what they stand for
}

template <typename Block, typename Layout, typename Values>
void pack_values(const Rows& rows, int64_t at, uint8_t* to, int64_t stride) {
  using Source = typename Block::Layout;
  constexpr uint32_t kMore = Source::kBias - Layout::kBias;
  alignas(64) uint8_t unpacked[Block::kGroups * Source::kBytes];
  unpack_values<Block>(rows, at, unpacked);
  for (int64_t g = 0; g < Block::kGroups; ++g) {
    Uint32x16 quads[Values::kQuads];
    std::memcpy(&quads, unpacked + g * Source::kBytes, sizeof(quads));
    for (Uint32x16& quad : quads) quad -= kMore * kOnes;
    Values::pack(quads, to + g * stride);
  }
}

// Fields of so many bytes each, from byte `at` of the rows on.
inline uint8_t* copy_fields(const Rows& rows, int64_t at, int count, int bytes, uint8_t* to) {
  for (int field = 0; field < count; ++field) {
    for (const uint8_t* row : rows.row) {
      std::memcpy(to, row + at + field * bytes, bytes);
      to += bytes;
    }
  }
  return to;
}
inline void copy_scales(const Rows& rows, int64_t at, const Fields& fields, uint8_t* to) {
  to = copy_fields(rows, at + fields.halves_at, fields.num_halves, 2, to);
  to = copy_fields(rows, at + fields.words_at, fields.num_words, 4, to);
  copy_fields(rows, at + fields.bytes_at, fields.num_bytes, 1, to);
}

template <typename Block, int kBits, int kBias>
void repack_tile(SimpleTile<Block, kBits, kBias>, const Rows& rows, int64_t blocks, uint8_t* to) {
  using Layout = SimpleTile<Block, kBits, kBias>;
  for (int64_t b = 0; b < blocks; ++b, to += Layout::kBytes) {
    const int64_t at = b * Block::kBlockBytes;
    copy_scales(rows, at, Layout::kFields, to);
    pack_values<Block, Layout, typename Layout::Values>(rows, at, to + Layout::kFields.size(), 0);
  }
}

template <typename Block, int kBits, int kBias, typename Scales>
void repack_tile(KTile<Block, kBits, kBias, Scales>, const Rows& rows, int64_t blocks,
                 uint8_t* to) {
  using Layout = KTile<Block, kBits, kBias, Scales>;
  constexpr int64_t kBlockValues = Block::kGroups * Layout::kBytes;
  uint8_t* scales = to + blocks * kBlockValues;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * Block::kBlockBytes;
    pack_values<Block, Layout, Layout>(rows, at, to + b * kBlockValues, Layout::kBytes);
    copy_scales(rows, at, Scales::kFields, scales + (blocks - 1 - b) * Scales::kFields.size());
  }
}

}  // namespace

void repack(const RepackParams& p) {
  const int64_t row_bytes = weight_bytes(p.dtype, 1, p.k), tile_bytes = kWeightTile * row_bytes;
  if (p.k == 0) return;
  for_each_row(ceil_div(p.n, kWeightTile), tile_bytes, [&](int64_t tile) {
    Rows rows;
    for (int64_t i = 0; i < kWeightTile; ++i) {  // the last row stands in for those past it
      const int64_t row = smaller(tile * kWeightTile + i, p.n - 1);
      rows.row[i] = static_cast<const uint8_t*>(p.weight) + row * row_bytes;
    }
    with_block(p.dtype, [&](auto block) {
      using Layout = typename Tiles<decltype(block)>::Layout;
      const int64_t blocks = p.k / weight_block(p.dtype);
      repack_tile(Layout{}, rows, blocks, static_cast<uint8_t*>(p.tiles) + tile * tile_bytes);
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
