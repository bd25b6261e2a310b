// linear over float weights for very few tokens: rows are read in the order in which they lie.
//
// Hardware follows one stream of addresses; of a tile's four in the same pages it follows hardly
// any. Short rows, of one segment, are multiplied one after another with no prefetching: the sums
// of the rows to come do not wait for one another. A longer row's sum waits for itself, and the
// next row is out of sight. So longer rows are multiplied in tiles of four, whose dots wait for
// nothing, and what is fetched meanwhile is the rows to come, line by line in their order in
// memory.
//
// AMD EPYC (Zen 4). Short rows, one core that reads 31.5 GB/s: 1 token over (3072, 576),
// (576, 1536) and (2048, 2048) in bfloat16 took 147, 79 and 363 us in tiles and takes 117, 55 and
// 272. Long rows, two cores that read 60 GB/s, by blocks (multiply_few) -> by tiles: 1 token over
// (4096, 4096), (11008, 4096) and (4096, 11008) 79, 80, 79 -> 91, 92, 86 % of it; 2 and 3 tokens as
// fast in the mean, 4 no faster either way.
#pragma once

#include "cpu/linear/ahead.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kInOrderTokens = kLanes > 8 ? 3 : 1;
constexpr int64_t kInOrderRows = 64;
// Rows that share a pass over one segment of the tokens: the tokens do not stay in L1 over all
// segments (4 rows: 3 % slower at 2 and 3 tokens). 16 rows were 2 to 4 % slower at 1 token.
constexpr int64_t kPassRows = 2 * kRows;

// Rows [n, n + count) of one weight and one segment: no two are read at a time.
template <typename Weight, int kHeight>
__attribute__((noinline)) void multiply_short_rows(const LinearParams& p,
                                                   const Cut<typename DotOf<Weight>::type>& cut,
                                                   const typename DotOf<Weight>::type::Element* x,
                                                   const Block& block, float* totals) {
  using Dot = typename DotOf<Weight>::type;
  const int64_t whole = cut.steps - (cut.tail != 0);
  for (int64_t i = 0; i < block.count; i += kRows) {
    const WeightRows<Weight> rows(p, block.n + i, block.n + block.count - 1, 0);
    Vec sums[kHeight][kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      Vec row[kHeight][1];
      clear(row);
      const auto load = [&](int, int64_t s, int part) { return rows.load(j, s, part); };
#pragma GCC unroll 4
      for (int64_t s = 0; s < whole; ++s) {
        multiply_step<Dot>(x + s * kHeight * Dot::kStep, s, load, row);
      }
      if (cut.tail) {
        const auto tail = [&](int, int64_t, int part) {
          return rows.load_first(j, whole, part, cut.tail);
        };
        multiply_steps<Dot>(x + whole * kHeight * Dot::kStep, 1, tail, row);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kHeight; ++t) sums[t][j] = row[t][0];
    }
    add_all_sums(sums, totals + i, kInOrderRows);
  }
}

// One segment of a tile. Fetches as much from `next` on, and moves it.
template <typename Weight, int kHeight>
inline void multiply_long_tile(const WeightRows<Weight>& rows,
                               const typename DotOf<Weight>::type::Element* x, int64_t whole,
                               int tail, const char*& next, float* totals) {
  using Dot = typename DotOf<Weight>::type;
  constexpr int64_t kLineSteps = larger(1, kCacheLine / (Dot::kStep * int64_t(sizeof(Weight))));
  Vec sums[kHeight][kRows];
  clear(sums);
  const char* line = next;
  const auto load = [&](int j, int64_t s, int part) {
    if (part == 0 && s % kLineSteps == 0) prefetch_to_l2(line), line += kCacheLine;
    return rows.load(j, s, part);
  };
  multiply_steps<Dot>(x, whole, load, sums);
  if (tail) {
    multiply_steps<Dot>(
        x + whole * kHeight * Dot::kStep, 1,
        [&](int j, int64_t, int part) { return rows.load_first(j, whole, part, tail); }, sums);
  }
  next = line;
  add_all_sums(sums, totals, kInOrderRows);
}

// Rows [n, n + count) of one weight.
template <typename Weight, int kHeight>
__attribute__((noinline)) void multiply_long_rows(const LinearParams& p,
                                                  const Cut<typename DotOf<Weight>::type>& cut,
                                                  const typename DotOf<Weight>::type::Element* x,
                                                  const Block& block, float* totals) {
  const int64_t row_bytes = p.k * int64_t(sizeof(Weight));
  for (int64_t first = 0; first < block.count; first += kPassRows) {
    const int64_t end = smaller(first + kPassRows, block.count);
    const char* next = reinterpret_cast<const char*>(weight_row<Weight>(p, block.n + first));
    next += kPassRows * row_bytes;
    for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
      const bool has_tail = cut.has_tail(segment);
      for (int64_t i = first; i < end; i += kRows) {
        const WeightRows<Weight> rows(p, block.n + i, block.n + block.count - 1,
                                      cut.begin(segment));
        multiply_long_tile<Weight, kHeight>(rows, x + cut.panel(segment, 0, kHeight),
                                            cut.length(segment) - has_tail, has_tail ? cut.tail : 0,
                                            next, totals + i);
      }
    }
  }
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
