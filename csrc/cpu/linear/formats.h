// Quantised weight formats: those that are read in place, and GGUF's that are unpacked first.
#pragma once

#include "cpu/linear/tiles.h"
#include "cpu/runtime/task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// ---- a format of either kind ---------------------------------------------------------------

// Read in place, in tiles of 16 rows.
template <typename LayoutOf>
struct InPlace {
  using Layout = LayoutOf;
  static constexpr bool kInPlace = true;
};
// Rows of GGUF's blocks: unpacked first.
template <typename BlockOf>
struct Gguf {
  using Block = BlockOf;
  using Layout = typename Block::Layout;
  static constexpr bool kInPlace = false;
};

// The layout of a GGUF format in tiles.
template <typename Block>
struct Tiles;
template <>
struct Tiles<Q4_0> : InPlace<SimpleTile<Q4_0, 4, 8>> {};
template <>
struct Tiles<Q4_1> : InPlace<SimpleTile<Q4_1, 4, 0>> {};
template <>
struct Tiles<Q5_0> : InPlace<SimpleTile<Q5_0, 5, 16>> {};
template <>
struct Tiles<Q5_1> : InPlace<SimpleTile<Q5_1, 5, 0>> {};
template <>
struct Tiles<Q8_0> : InPlace<SimpleTile<Q8_0, 8, 128>> {};
template <>
struct Tiles<IQ4_NL> : InPlace<Iq4Tile> {};
template <>
struct Tiles<Q2_K> : InPlace<KTile<Q2_K, 2, 0, Q2Scales>> {};
template <>
struct Tiles<Q3_K> : InPlace<KTile<Q3_K, 3, 4, Q3Scales>> {};
template <>
struct Tiles<Q4_K> : InPlace<KTile<Q4_K, 4, 0, Q4Scales>> {};
template <>
struct Tiles<Q5_K> : InPlace<KTile<Q5_K, 5, 0, Q4Scales>> {};
template <>
struct Tiles<Q6_K> : InPlace<KTile<Q6_K, 6, 32, Q6Scales>> {};

template <typename Body>
inline void with_format(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kInt8:
      return body(InPlace<Int8Layout>{});
#define CLRT_FORMAT(format, name, elements, bytes) \
  case DType::k##format:                           \
    return body(Gguf<format>{});                   \
  case DType::k##format##Tiled:                    \
    return body(Tiles<format>{});
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

template <typename Layout, typename = void>
struct Tail {  // of a tile, after its groups
  static constexpr int64_t bytes(int64_t) { return 0; }
};
template <typename Layout>
struct Tail<Layout, std::void_t<typename Layout::Block>> {  // the blocks' scales of K-quants
  static constexpr int64_t bytes(int64_t groups) {
    return groups / Layout::Block::kGroups * Layout::kFields.size();
  }
};

// A tile of a layout in place.
template <typename Layout>
inline const uint8_t* start_of(const Tile& tile, int64_t k) {
  const int64_t groups = num_groups<Layout>(k);
  const int64_t bytes = Layout::kHeadBytes + groups * Layout::kBytes + Tail<Layout>::bytes(groups);
  return tile.weight + tile.first_row / kWeightTile * bytes;
}

// What a layout in place has before a tile's groups, or after them.
template <typename Format>
inline const uint8_t* head_of(const Tile& tile, int64_t k) {
  using Layout = typename Format::Layout;
  if constexpr (!Format::kInPlace) {
    return nullptr;
  } else {
    const int64_t groups = num_groups<Layout>(k);
    const uint8_t* start = start_of<Layout>(tile, k);
    return Tail<Layout>::bytes(groups) > 0 ? start + groups * Layout::kBytes : start;
  }
}

// Groups [g, g + count) of a tile in the layout; `to` takes what has to be unpacked.
template <typename Format>
const uint8_t* groups_of(const Tile& tile, int64_t k, int64_t g, int64_t count, uint8_t* to) {
  using Layout = typename Format::Layout;
  if constexpr (Format::kInPlace) {
    return start_of<Layout>(tile, k) + Layout::kHeadBytes + g * Layout::kBytes;
  } else {
    using Block = typename Format::Block;
    const int64_t row_bytes = num_groups<Layout>(k) / Block::kGroups * Block::kBlockBytes;
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
    for (int64_t at = 0; at < count; at += Block::kGroups) {
      Block::unpack(rows, (g + at) / Block::kGroups * Block::kBlockBytes, to + at * Layout::kBytes);
    }
    return to;
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
