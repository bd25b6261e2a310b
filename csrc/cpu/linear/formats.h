// Quantised weight formats: those that are read in place, and GGUF's that are unpacked first.
#pragma once

#include "cpu/linear/tiles.h"
#include "cpu/runtime/task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- a format of any kind ------------------------------------------------------------------

// Read in place, in tiles of 16 rows.
template <typename LayoutOf>
struct InPlace {
  using Layout = LayoutOf;
  static constexpr bool kInPlace = true, kTiled = true;
};
// Unpacked first: GGUF's blocks, in rows or in tiles.
template <typename BlockOf, bool kTiledOf>
struct Blocks {
  using Block = BlockOf;
  using Layout = typename Block::Layout;
  static constexpr bool kInPlace = false, kTiled = kTiledOf;
};

// A GGUF format in tiles.
template <typename Block>
struct Tiled : Blocks<Block, true> {};
template <>
struct Tiled<Q4_0> : InPlace<NibbleTile<Q4_0, 8>> {};
template <>
struct Tiled<Q4_1> : InPlace<NibbleTile<Q4_1, 0>> {};
template <>
struct Tiled<Q5_0> : InPlace<FiveTile<Q5_0, 16>> {};
template <>
struct Tiled<Q5_1> : InPlace<FiveTile<Q5_1, 0>> {};
template <>
struct Tiled<Q8_0> : InPlace<Q8Tile> {};
template <>
struct Tiled<IQ4_NL> : InPlace<Iq4Tile> {};

template <typename Body>
inline void with_format(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kInt8:
      return body(InPlace<Int8Layout>{});
#define CLRT_FORMAT(format, name, elements, bytes) \
  case DType::k##format:                           \
    return body(Blocks<format, false>{});          \
  case DType::k##format##Tiled:                    \
    return body(Tiled<format>{});
      CLRT_GGUF_FORMATS(CLRT_FORMAT)
#undef CLRT_FORMAT
    default:
      return body(InPlace<Int4Layout>{});
  }
}

// What repacking takes: the blocks of a GGUF format.
template <typename Body>
inline void with_block(DType dtype, const Body& body) {
  switch (dtype) {
#define CLRT_FORMAT(format, name, elements, bytes) \
  case DType::k##format:                           \
    return body(format{});
    CLRT_GGUF_FORMATS(CLRT_FORMAT)
#undef CLRT_FORMAT
    default:
      return;
  }
}

// ---- tiles ---------------------------------------------------------------------------------

template <typename Layout>
constexpr int64_t num_groups(int64_t k) {
  return ceil_div(k, Layout::kGroup);
}

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
    const int64_t tile_bytes = Layout::kHeadBytes + num_groups<Layout>(k) * Layout::kBytes;
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
    const int64_t row_bytes = num_groups<Layout>(k) / Block::kGroups * Block::kBlockBytes;
    const auto unpack = [&](const auto& rows) {
      for (int64_t at = 0; at < count; at += Block::kGroups) {
        const int64_t block = (g + at) / Block::kGroups * Block::kBlockBytes;
        Block::unpack(rows, block, to + at * Layout::kBytes);
      }
      return to;
    };
    if constexpr (Format::kTiled) {
      return unpack(TiledRows{tile.weight + tile.first_row * row_bytes});
    } else {
      Rows rows;
      for (int64_t i = 0; i < kWeightTile; ++i) {  // the last row stands in for those past it
        rows.row[i] = tile.weight + (tile.first_row + smaller(i, tile.num_rows - 1)) * row_bytes;
      }
      // What is unpacked next: sixteen rows are more streams than hardware prefetchers follow.
      const int64_t bytes = count / Block::kGroups * Block::kBlockBytes;
      const int64_t end = (g + count) / Block::kGroups * Block::kBlockBytes;
      const int64_t ahead = end < row_bytes ? end : kWeightTile * row_bytes;
      for (const uint8_t* row : rows.row) {
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + ahead + at);
      }
      return unpack(rows);
    }
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
