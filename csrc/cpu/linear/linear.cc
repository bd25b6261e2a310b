// linear: out[t, n] = sum over k of x[t, k] * weight[n, k]; up to three weights in one pass over x
// Shapes   x (num_tokens, k), weights (n[i], k) as they lie, out (num_tokens, sum(n))
// Traffic  sum(n) * k * itemsize bytes of weights once for every kMaxTokens tokens
// Limit    memory read to about 16 tokens, then FMA (float32) or VDPBF16PS (bfloat16)
// Tiling   activations are packed once in panels of tokens, rounded to what the dot reads. A few
//          tokens (kFewTokens): panels of up to kStreamTokens over weights as they lie, in blocks
//          of kFewRows; a run of each panel stays in L1 while a segment of the block passes over
//          it, and the next segment is fetched into L2, evenly. Many: many_tokens.h. Very few
//          (kInOrderTokens): in_order.h
// Numerics fp32 accumulate. k is cut in equal segments of at most kSegmentBytes; a segment has one
//          vector of sums for each (t, n), taken in ascending k and summed by the tree of sum();
//          segments are added in ascending order. No other choice (tile, task, edge, thread)
//          touches an element's sum: its bits follow from x[t] and weight[n] alone.
//          bfloat16 weights with VDPBF16PS: x is rounded to bfloat16 (nearest even), and the
//          instruction takes subnormals as zero. Else both operands are float32; with AVX-512
//          bfloat16 weights go even before odd in each 32 of k.
#include "common/quantized.h"
#include "cpu/linear/ahead.h"
#include "cpu/linear/dot.h"
#include "cpu/linear/fused.h"
#include "cpu/linear/in_order.h"
#include "cpu/linear/many_tokens.h"
#include "cpu/linear/quantized.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kMaxTokens = 516;  // 86 panels; bounds the scratch memory, not the result
constexpr int64_t kTaskRows = 12;    // a multiple of this: whole tiles, of four rows or of three

// What as-stored weights are multiplied by lies in L2 beside two blocks of them, and is multiplied
// by too few tokens for packing to pay: at 32 tokens of k = 11008 (704 KB) packed weights were 8 %
// faster, at 32 of 4096 4 % slower, at 46 4 % faster (of 576: 7 and 11 % faster). Weights that are
// converted at each use pay for packing sooner; the baseline's, by many instructions, at once (2
// panels: 1.8 times as slow).
constexpr int64_t kFewTokens = kLanes > 8 ? 40 : kMaxTokens;
constexpr int64_t kFewBytes = 384 << 10;
constexpr int64_t kFewConvertedBytes = kLanes > 4 ? 96 << 10 : 0;
// A segment of so many rows is 192 KB, and the next one is fetched beside it; 12 rows were 20 %
// slower at 8 tokens, 72 no faster.
constexpr int64_t kFewRows = 48;
// Of a panel of tokens, half of a 32 KB L1; whole segments of 8 tokens fell out of it (163 -> 111
// GFLOP/s a core).
constexpr int64_t kRunBytes = 16 << 10;

// ---- activations: panels (step, part, token, kPart), zero after k ---------------------------

template <typename Dot, typename X>
void pack_tokens(const LinearParams& p, const Cut<Dot>& cut, int64_t t, int64_t height,
                 typename Dot::Element* panels) {
  for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
    const int64_t begin = cut.begin(segment), end = begin + cut.length(segment) * Dot::kStep;
    typename Dot::Element* panel = panels + cut.panel(segment, t, p.num_tokens);
    for (int64_t i = 0; i < height; ++i) {
      const X* x = static_cast<const X*>(p.x) + (t + i) * p.x_stride;
      const auto at = [&](int64_t k) {
        return k + kLanes <= p.k ? load(x + k) : load_first(x + k, int(larger(p.k - k, 0)));
      };
      for (int64_t k = begin; k < end; k += Dot::kStep) {
        Dot::pack(at, k, panel + (k - begin) * height + i * Dot::kPart, height * Dot::kPart);
      }
    }
  }
}

template <typename Dot>
void pack_panel(const LinearParams& p, const Cut<Dot>& cut, int64_t t, int64_t height,
                typename Dot::Element* panels) {
  switch (p.x_dtype) {
    case DType::kFloat16:
      return pack_tokens<Dot, f16>(p, cut, t, height, panels);
    case DType::kBFloat16:
      return pack_tokens<Dot, bf16>(p, cut, t, height, panels);
    default:
      return pack_tokens<Dot, float>(p, cut, t, height, panels);
  }
}

// ---- tiles ---------------------------------------------------------------------------------

// Steps of one segment. The sums are taken up where the run before left them.
struct Run {
  int64_t first, whole;  // steps
  int tail;              // elements of one more, or 0
  bool begins, ends;     // the segment
};

template <typename Weight, int kHeight, int kCount>
__attribute__((noinline)) void tile_of_run(const typename DotOf<Weight>::type::Element* x,
                                           const WeightRows<Weight>& rows, const Run& run,
                                           float* carried, float* totals, int64_t stride,
                                           Ahead& ahead) {
  using Dot = typename DotOf<Weight>::type;
  constexpr bool kCarries = kHeight * kSegmentBytes > kRunBytes;  // else a run is a whole segment
  Vec sums[kHeight][kCount];
  clear(sums);
  if constexpr (kCarries) {
    if (!run.begins) load_sums(carried, sums);
  }
  const auto load = [&](int j, int64_t s, int part) {
    if (j == 0 && part == 0 && s % prefetch_steps<Weight>(kHeight) == 0) {
      ahead.fetch();
    }
    return rows.load(j, run.first + s, part);
  };
  multiply_steps<Dot>(x, run.whole, load, sums);
  if (run.tail) {
    const int64_t last = run.first + run.whole;
    multiply_steps<Dot>(
        x + run.whole * kHeight * Dot::kStep, 1,
        [&](int j, int64_t, int part) { return rows.load_first(j, last, part, run.tail); }, sums);
  }
  if constexpr (kCarries) {
    if (!run.ends) return store_sums(sums, carried);
  }
  add_all_sums(sums, totals, stride);
}

// ---- results -------------------------------------------------------------------------------

template <typename T>
inline void put_as(const float* totals, int64_t stride, const FusedLinearParams& p, int64_t n,
                   int64_t count) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    T* out = static_cast<T*>(p.out) + t * p.out_stride + n;
    const float* total = totals + t * stride;
    if (p.addend) {
      const float* addend = p.addend + t * p.addend_stride + n;
      for (int64_t j = 0; j < count; ++j) out[j] = from_float<T>(total[j] + addend[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) out[j] = from_float<T>(total[j]);
    }
  }
}

// out[:, n .. n + count) = totals, rows `stride` apart.
inline void put(const float* totals, int64_t stride, const FusedLinearParams& p, int64_t n,
                int64_t count) {
  switch (p.out_dtype) {
    case DType::kFloat16:
      return put_as<f16>(totals, stride, p, n, count);
    case DType::kBFloat16:
      return put_as<bf16>(totals, stride, p, n, count);
    default:
      return put_as<float>(totals, stride, p, n, count);
  }
}

// ---- the two kernels -----------------------------------------------------------------------

// One segment of a block for one panel of tokens.
template <typename Weight, int kHeight>
void multiply_panel(const LinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                    const typename DotOf<Weight>::type::Element* x, int64_t segment,
                    const Block& block, float* carried, float* totals, Ahead& ahead) {
  using Dot = typename DotOf<Weight>::type;
  constexpr int kCount = tile_rows(kHeight);
  const int64_t length = cut.length(segment);
  const int64_t most = kRunBytes / (kHeight * Dot::kStep * int64_t(sizeof(*x)));
  const int64_t run_steps = ceil_div(length, ceil_div(length, most));
  for (int64_t first = 0; first < length; first += run_steps) {
    const int64_t steps = smaller(run_steps, length - first);
    const bool ends = first + steps == length, has_tail = ends && cut.has_tail(segment);
    const Run run{first, steps - has_tail, has_tail ? cut.tail : 0, first == 0, ends};
    for (int64_t i = 0; i < block.count; i += kCount) {
      const WeightRows<Weight> rows(p, block.n + i, block.n + block.count - 1, cut.begin(segment));
      tile_of_run<Weight, kHeight, kCount>(x + first * kHeight * Dot::kStep, rows, run,
                                           carried + i * kHeight * kLanes, totals + i, kFewRows,
                                           ahead);
    }
  }
}

// Rows [n, end) for a few tokens: weights as they lie. While one segment of a block is multiplied,
// the next is fetched. The first block is a tile, for nothing has fetched it, and each other at
// most twice as high as the one before.
template <typename Weight>
void multiply_few(const FusedLinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                  const typename DotOf<Weight>::type::Element* x, int64_t panel_tokens, int64_t n,
                  int64_t end) {
  const int64_t height = tile_rows(panel_tokens);
  const int64_t num_panels = ceil_div(p.num_tokens, panel_tokens);
  const int64_t totals_size = p.num_tokens * kFewRows;
  const int64_t carried_size = (kFewRows + kRows) * panel_tokens * kLanes;
  float* totals = static_cast<float*>(
      scratch(Scratch::kTask, (totals_size + carried_size) * int64_t(sizeof(float))));
  float* carried = totals + totals_size;
  Block next = block_from(p, n, end, height);
  while (next.count > 0) {
    const Block block = next;
    next = block_from(p, block.n + block.count, end, smaller(2 * block.count, kFewRows));
    std::memset(totals, 0, totals_size * sizeof(float));
    for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
      const int64_t times = ceil_div(block.count, height) * num_panels *
                            ceil_div(cut.length(segment), prefetch_steps<Weight>(panel_tokens));
      Ahead ahead = fetch_after<Weight>(p, cut, segment, block, next, times);
      for (int64_t t = 0; t < p.num_tokens; t += panel_tokens) {
        with_height<kStreamTokens>(smaller(panel_tokens, p.num_tokens - t), [&](auto h) {
          multiply_panel<Weight, h.value>(p, cut, x + cut.panel(segment, t, p.num_tokens), segment,
                                          block, carried, totals + t * kFewRows, ahead);
        });
      }
    }
    put(totals, kFewRows, p, block.n, block.count);
  }
}

// Rows [n, end) for very few tokens.
template <typename Weight>
void multiply_in_order(const FusedLinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                       const typename DotOf<Weight>::type::Element* x, int64_t n, int64_t end) {
  float totals[kInOrderTokens * kInOrderRows];
  for (Block block; n < end; n += block.count) {
    block = block_from(p, n, end, kInOrderRows);
    std::memset(totals, 0, p.num_tokens * kInOrderRows * sizeof(float));
    with_height<kInOrderTokens>(p.num_tokens, [&](auto height) {
      if (cut.num_segments == 1) {
        multiply_short_rows<Weight, height.value>(p, cut, x, block, totals);
      } else {
        multiply_long_rows<Weight, height.value>(p, cut, x, block, totals);
      }
    });
    put(totals, kInOrderRows, p, block.n, block.count);
  }
}

// Packs the activations in panels of so many tokens.
template <typename Dot>
void pack(const LinearParams& p, const Cut<Dot>& cut, int64_t panel_tokens,
          typename Dot::Element* x) {
  const auto pack_one = [&](int64_t i) {
    const int64_t t = i * panel_tokens;
    pack_panel<Dot>(p, cut, t, smaller(panel_tokens, p.num_tokens - t), x);
  };
  const int64_t num_panels = ceil_div(p.num_tokens, panel_tokens);
  if (p.num_tokens > kStreamTokens) return for_each_task(num_panels, pack_one);
  for (int64_t i = 0; i < num_panels; ++i) pack_one(i);
}

// The activations of a few tokens over rows as they lie.
template <typename Weight>
void multiply_streamed(const FusedLinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                       typename DotOf<Weight>::type::Element* x, int64_t num_rows) {
  const int64_t num_panels = ceil_div(p.num_tokens, kStreamTokens);
  const int64_t panel_tokens = ceil_div(p.num_tokens, num_panels);
  pack(p, cut, panel_tokens, x);
  const bool in_order = p.num_tokens <= kInOrderTokens;
  const int64_t stream_tasks = num_stream_tasks(num_rows * p.k * sizeof(Weight));
  const int64_t tasks = in_order ? stream_tasks : smaller(kTasks, stream_tasks);
  const int64_t task_rows = ceil_div(num_rows, kTaskRows * tasks) * kTaskRows;
  for_each_task(ceil_div(num_rows, task_rows), [&](int64_t task) {
    const int64_t n = task * task_rows;
    const int64_t row_end = smaller(num_rows, n + task_rows);
    if (in_order) {
      multiply_in_order<Weight>(p, cut, x, n, row_end);
    } else {
      multiply_few<Weight>(p, cut, x, panel_tokens, n, row_end);
    }
  });
}

template <typename Weight>
void multiply(const FusedLinearParams& p) {
  using Dot = typename DotOf<Weight>::type;
  using Element = typename Dot::Element;
  const Cut<Dot> cut(p.k);
  int64_t num_rows = 0;
  for (int64_t i = 0; i < p.num_weights; ++i) num_rows += p.n[i];
  if (num_rows == 0) return;
  const int64_t x_bytes = p.num_tokens * cut.steps * Dot::kStep * sizeof(Element);
  Element* x = static_cast<Element*>(scratch(Scratch::kCaller, x_bytes));
  constexpr int64_t most_bytes = sizeof(Weight) == sizeof(Element) ? kFewBytes : kFewConvertedBytes;
  const bool few = p.num_tokens <= kFewTokens && x_bytes <= most_bytes;
  if (p.num_tokens <= kStreamTokens || few || p.k == 0) {  // no block would write the zeros
    if (!p.gate_up) return multiply_streamed<Weight>(p, cut, x, num_rows);
    multiply_streamed<Weight>(before_gating(p), cut, x, num_rows);
    gate(p);
  } else {
    pack(p, cut, kTokens, x);
    if (p.gate_up) num_rows = p.n[0];
    const int64_t task_rows = many_task_rows(num_rows);
    for_each_task(ceil_div(num_rows, task_rows), [&](int64_t task) {
      const int64_t n = task * task_rows;
      multiply_many<Weight>(p, cut, x, n, smaller(num_rows, n + task_rows), num_rows);
    });
  }
}

void multiply_by_dtype(const FusedLinearParams& p) {
  switch (p.weight_dtype) {
    case DType::kFloat16:
      return multiply<f16>(p);
    case DType::kBFloat16:
      return multiply<bf16>(p);
    default:
      return multiply<float>(p);
  }
}

}  // namespace

void fused_linear(const FusedLinearParams& p) {
  if (!is_float(p.weight_dtype)) return linear_quantized(p);
  const int64_t parts = ceil_div(p.num_tokens, kMaxTokens);
  if (parts == 0) return;
  const int64_t tokens = ceil_div(ceil_div(p.num_tokens, parts), kTokens) * kTokens;
  for_tokens(p, tokens, multiply_by_dtype);
}

void linear(const LinearParams& p) { fused_linear({p}); }

DType linear_input(DType weight_dtype) {
  const bool rounds = std::is_same<DotOf<bf16>::type::Element, bf16>::value;
  return weight_dtype == DType::kBFloat16 && rounds ? DType::kBFloat16 : DType::kFloat32;
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
