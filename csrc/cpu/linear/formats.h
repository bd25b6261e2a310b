// Quantised weight formats of both kinds: own ones, read in place, and GGUF's, unpacked first.
#pragma once

#include "cpu/linear/gguf_blocks.h"
#include "cpu/runtime/task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

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
