// linear over float weights for many tokens: blocks of rows, packed.
//
// The first panel of tokens reads a block's rows from memory, and leaves them packed in L2 for the
// others. Meanwhile the next segment of weights is fetched into L2, evenly, and the sums of tiles
// that are done are brought to out.
#pragma once

#include "cpu/linear/ahead.h"
#include "cpu/linear/fused.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kTasks = 32;  // tails of at most 1/32 of a core
// 256 KB of packed weights in L2: each panel of tokens is read from L3 once for 16 tiles. 32 rows
// were 4 % slower, 96 and 128 no faster.
constexpr int64_t kBlockRows = 64;

// ---- tiles ---------------------------------------------------------------------------------

// One segment of a tile of weights as they lie, which it leaves in `panel`.
template <typename Weight, int kHeight>
__attribute__((noinline)) void tile_of_rows(const typename DotOf<Weight>::type::Element* x,
                                            const WeightRows<Weight>& rows, int64_t whole, int tail,
                                            typename DotOf<Weight>::type::Element* panel,
                                            float* folded) {
  using Dot = typename DotOf<Weight>::type;
  Vec sums[kHeight][kRows];
  clear(sums);
  const auto keep = [&](int j, int64_t s, int part, typename Dot::Operand w) {
    Dot::store(panel + ((s * Dot::kParts + part) * kRows + j) * Dot::kPart, w);
    return w;
  };
  multiply_steps<Dot>(
      x, whole, [&](int j, int64_t s, int part) { return keep(j, s, part, rows.load(j, s, part)); },
      sums);
  if (tail) {
    multiply_steps<Dot>(
        x + whole * kHeight * Dot::kStep, 1,
        [&](int j, int64_t, int part) {
          return keep(j, whole, part, rows.load_first(j, whole, part, tail));
        },
        sums);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) fold_sums(sums[i], folded + i * kFoldedToken);
}

// What the tiles of kLanes rows have left folded, on its way to totals or, with the last segment,
// to out: a token at a time, while later tiles are multiplied (at k = 576: 2 % faster than at
// once).
struct Behind {
  const FusedLinearParams& p;
  const bool is_first, is_last;                         // the segment
  alignas(64) float folded[2][kTokens * kFoldedToken];  // one is written while the other is put
  int64_t writes = 0, left = 0, count = 0;              // count: rows there are
  int64_t out = 0, addend = 0;                          // offsets
  const float *from = nullptr, *gate = nullptr;
  float* total = nullptr;

  Behind(const FusedLinearParams& params, bool first, bool last)
      : p(params), is_first(first), is_last(last) {}

  float* tile(int64_t i) { return folded[writes] + i % kLanes / kRows * kFoldedTile; }

  // All tiles of `num` rows from n on are folded, for a panel of tokens from t on.
  void turn(int64_t t, int64_t height, int64_t n, int64_t num, float* totals, const float* gates) {
    finish();
    from = folded[writes], total = totals, gate = gates, left = height, count = num;
    out = t * p.out_stride + n, addend = t * p.addend_stride + n;
    writes = 1 - writes;
  }
  void finish() {
    while (left > 0) put();
  }
  inline __attribute__((always_inline)) void put() {
    if (left == 0) return;
    Vec sum = (is_first ? splat(0.0f) : load(total)) + unfold(from);
    if (is_last) {
      if (gate) sum = silu(load(gate)) * sum, gate += kBlockRows;
      if (p.addend) {
        const float* to_add = p.addend + addend;
        sum = sum + (count >= kLanes ? load(to_add) : load_first(to_add, int(count)));
        addend += p.addend_stride;
      }
      with_type(p.out_dtype, [&](auto type) {
        auto* to = static_cast<decltype(type)*>(p.out) + out;
        if (count >= kLanes) {
          store(to, sum);
        } else {
          store_first(to, sum, int(count));
        }
      });
    } else {
      store(total, sum);
    }
    from += kFoldedToken, total += kBlockRows, out += p.out_stride, --left;
  }
};

// One segment of a tile of packed weights.
template <typename Weight, int kHeight>
__attribute__((noinline)) void tile_of_panel(const typename DotOf<Weight>::type::Element* x,
                                             const typename DotOf<Weight>::type::Element* panel,
                                             int64_t steps, Ahead& ahead, Behind& behind,
                                             float* folded) {
  using Dot = typename DotOf<Weight>::type;
  Vec sums[kHeight][kRows];
  clear(sums);
  const auto load = [&](int j, int64_t s, int part) {
    if (j == 0 && part == 0 && s % kPrefetchSteps == 0) ahead.fetch(), behind.put();
    return Dot::load_packed(panel + ((s * Dot::kParts + part) * kRows + j) * Dot::kPart);
  };
  multiply_steps<Dot>(x, steps - 1, load, sums);
  // Folding all when the last is done would keep the next tile waiting.
  multiply_step<Dot>(x + (steps - 1) * kHeight * Dot::kStep, steps - 1, load, sums,
                     [&](int i) { fold_sums(sums[i], folded + i * kFoldedToken); });
}

// ---- blocks --------------------------------------------------------------------------------

// Where the results of a block go: to out, from `column` on; with `stays`, to totals alone. A row
// of either is kBlockRows. `gates`: what the results are to be gated by, or null.
struct Results {
  float* totals;
  int64_t column;
  bool stays;
  const float* gates;
};

// One segment of a block for many tokens.
template <typename Weight>
void multiply_block(const FusedLinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                    const typename DotOf<Weight>::type::Element* x, int64_t segment,
                    const Block& block, const Block& next,
                    typename DotOf<Weight>::type::Element* panels, const Results& results) {
  using Dot = typename DotOf<Weight>::type;
  const int64_t length = cut.length(segment), panel_size = kRows * length * Dot::kStep;
  const bool has_tail = cut.has_tail(segment);
  // Spells of prefetching while one panel of tokens is multiplied.
  const int64_t times = ceil_div(block.count, kRows) * ceil_div(length, kPrefetchSteps);
  Ahead ahead = fetch_after<Weight>(p, cut, segment, block, next,
                                    times * (ceil_div(p.num_tokens, kTokens) - 1));
  Behind behind(p, segment == 0, segment + 1 == cut.num_segments && !results.stays);
  for (int64_t t = 0; t < p.num_tokens; t += kTokens) {
    const int64_t height = smaller(kTokens, p.num_tokens - t);
    const auto* tokens = x + cut.panel(segment, t, p.num_tokens);
    const int64_t tokens_size = height * length * Dot::kStep;
    ahead.x = reinterpret_cast<const char*>(tokens + tokens_size);
    ahead.x_lines_a_time = ceil_div(tokens_size * int64_t(sizeof(*x)), kCacheLine * times);
    with_height<kTokens>(height, [&](auto h) {
      for (int64_t i = 0; i < block.count; i += kRows) {
        auto* panel = panels + i / kRows * panel_size;
        float* folded = behind.tile(i);
        if (t == 0) {
          const WeightRows<Weight> rows(p, block.n + i, block.n + block.count - 1,
                                        cut.begin(segment));
          tile_of_rows<Weight, h.value>(tokens, rows, length - has_tail, has_tail ? cut.tail : 0,
                                        panel, folded);
        } else {
          tile_of_panel<Weight, h.value>(tokens, panel, length, ahead, behind, folded);
        }
        const int64_t first = i / kLanes * kLanes, end = i + kRows;
        if (end % kLanes == 0 || end >= block.count) {
          const int64_t at = t * kBlockRows + first;
          behind.turn(t, height, results.column + first, block.count - first, results.totals + at,
                      results.gates ? results.gates + at : nullptr);
        }
      }
    });
  }
  behind.finish();
}

// Rows [n, end) for many tokens: packed weights, block by block. Tasks are dealt in their order, so
// that the rows after the last block, up to num_rows, are likely to be this thread's next.
template <typename Weight>
void multiply_many(const FusedLinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                   const typename DotOf<Weight>::type::Element* x, int64_t n, int64_t end,
                   int64_t num_rows) {
  using Dot = typename DotOf<Weight>::type;
  using Element = typename Dot::Element;
  const int64_t panel_bytes = kBlockRows * cut.segment_steps * Dot::kStep * sizeof(Element);
  const int64_t totals_size = p.num_tokens * kBlockRows;
  const int64_t totals_bytes = (p.gate_up ? 2 : 1) * totals_size * sizeof(float);
  char* memory = static_cast<char*>(scratch(Scratch::kTask, panel_bytes + totals_bytes));
  Element* panels = reinterpret_cast<Element*>(memory);
  float* totals = reinterpret_cast<float*>(memory + panel_bytes);
  const auto multiply = [&](const Block& block, const Block& next, const Results& results) {
    for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
      multiply_block<Weight>(p, cut, x, segment, block, next, panels, results);
    }
  };
  while (n < end) {
    const Block block = block_from(p, n, end, kBlockRows);
    n += block.count;
    const Block next = block_from(p, n, n < end ? end : num_rows, kBlockRows);
    if (p.gate_up) {
      const Block up = {p.n[0] + block.n, block.count};
      float* gates = totals + totals_size;
      multiply(block, up, {gates, block.n, true, nullptr});
      multiply(up, next, {totals, block.n, false, gates});
    } else {
      multiply(block, next, {totals, block.n, false, nullptr});
    }
  }
}

// Rows of a task for many tokens: whole blocks, or, where these are few, a block of such a height
// that the longest thread's rows are fewest. Of 576 rows one of two threads had five blocks of 64,
// the other four (k = 576 and 1536, 512 tokens, Zen 4: 368 and 380 GFLOP/s, by 48 rows 405 each).
inline int64_t many_task_rows(int64_t num_rows) {
  if (num_rows >= kBlockRows * kTasks) return kBlockRows * (num_rows / (kBlockRows * kTasks));
  const auto longest = [&](int64_t rows) {  // of a thread
    return ceil_div(ceil_div(num_rows, rows), num_threads()) * rows;
  };
  int64_t best = kBlockRows;
  for (int64_t rows = kBlockRows - kLanes; rows >= kBlockRows / 2; rows -= kLanes) {
    if (longest(rows) < longest(best)) best = rows;
  }
  return best;
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
