// repack: a weight in a format of GGUF, as the kernels read it: in tiles of 16 rows
// Shapes   weight (n, k) in rows of blocks; tiles as quantized.h says
// Traffic  weight_bytes(n, k) read, as many written, once each
// Limit    memory
// Tiling   a task takes tiles of 16 rows; four words of them are transposed at a time
// Numerics bits are moved, and 128 is added to q8_0's values
#include "cpu/linear/formats.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The words of a block of a tile, as its layout wants them.
template <typename Block>
void finish(uint8_t*) {}

template <>
void finish<Q8_0>(uint8_t* words) {
  for (int i = 0; i < int(kWeightGroup * kWeightTile); ++i) words[i] ^= 128;
}

void finish_fifths(uint8_t* words) {
  Uint32x16 fifths;
  std::memcpy(&fifths, words, sizeof(fifths));
  order_bits_by_quad(fifths);
  std::memcpy(words, &fifths, sizeof(fifths));
}
template <>
void finish<Q5_0>(uint8_t* words) {
  finish_fifths(words);
}
template <>
void finish<Q5_1>(uint8_t* words) {
  finish_fifths(words);
}

template <typename Block>
void repack_block(const Rows& rows, int64_t at, uint8_t* to) {
  for (int64_t field = 0; field < Block::kBlockBytes; field += 2) {
    if (field >= Block::kWordsAt && field < Block::kWordsEnd) continue;
    for (int64_t r = 0; r < kWeightTile; ++r) {
      std::memcpy(to + kWeightTile * field + 2 * r, rows.row[r] + at + field, 2);
    }
  }
  for (int64_t next = Block::kWordsAt; next < Block::kWordsEnd; next += 16) {
    const int64_t field = smaller(next, Block::kWordsEnd - 16);  // the last ones may come twice
    Uint32x16 words[4];
    rows.load_four(at + field, words);
    std::memcpy(to + kWeightTile * field, &words, sizeof(words));
  }
  finish<Block>(to + kWeightTile * Block::kWordsAt);
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
    uint8_t* to = static_cast<uint8_t*>(p.tiles) + tile * tile_bytes;
    with_block(p.dtype, [&](auto block) {
      using Block = decltype(block);
      for (int64_t at = 0; at < row_bytes; at += Block::kBlockBytes) {
        repack_block<Block>(rows, at, to + kWeightTile * at);
      }
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
