// What linear over float weights fetches while it multiplies: the next segment of weights, evenly.
#pragma once

#include "cpu/linear/dot.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchSteps = 4;  // of a tile of packed weights between two spells of it
// The same for weights as they lie, by the bytes of a row between two. Against 256 for all, 1 to
// 4 tokens were 1 to 12 % faster, 5 to 8 as fast in the mean.
template <typename Weight>
constexpr int64_t prefetch_steps(int64_t height) {
  return (height <= 4 ? 128 : 512) / (DotOf<Weight>::type::kStep * int64_t(sizeof(Weight)));
}

// Fetches one segment of some rows into L2, in `times` spells of about as many lines.
struct Ahead {
  const char* row;
  int64_t num_rows, row_bytes, piece_bytes, num_lines, times;
  int64_t at = 0, due = 0;  // due: lines, in parts of `times`
  const char* x = nullptr;  // the next panel of tokens, into L1
  int64_t x_lines_a_time = 0;

  inline void fetch() {
    for (due += num_lines; due >= times && num_rows > 0; due -= times) {
      prefetch_to_l2(row + at);
      at += kCacheLine;
      if (at >= piece_bytes) at = 0, row += row_bytes, --num_rows;
    }
    for (int64_t i = 0; i < x_lines_a_time; ++i, x += kCacheLine) __builtin_prefetch(x);
  }
};

// What comes after `segment` of `block`: its next segment, or the first one of `next`; in `times`
// spells.
struct Block {
  int64_t n, count;  // rows of one weight
};
template <typename Weight>
Ahead fetch_after(const LinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                  int64_t segment, const Block& block, const Block& next, int64_t times) {
  const bool stays = segment + 1 < cut.num_segments;
  const Block& rows = stays ? block : next;
  if (rows.count == 0) return {};
  const int64_t row_bytes = p.k * int64_t(sizeof(Weight));
  const int64_t begin = stays ? cut.begin(segment + 1) * int64_t(sizeof(Weight)) : 0;
  const int64_t length = cut.length(stays ? segment + 1 : 0);
  const int64_t piece_bytes =
      smaller(row_bytes - begin, length * DotOf<Weight>::type::kStep * int64_t(sizeof(Weight)));
  return {reinterpret_cast<const char*>(weight_row<Weight>(p, rows.n)) + begin,
          rows.count,
          row_bytes,
          piece_bytes,
          rows.count * ceil_div(piece_bytes, kCacheLine),
          larger(times, 1)};
}

// At most `most` of the rows from n to `end`: those that lie together.
inline Block block_from(const LinearParams& p, int64_t n, int64_t end, int64_t most) {
  return {n, n < end ? rows_together(p, n, smaller(end, n + most)) : 0};
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
