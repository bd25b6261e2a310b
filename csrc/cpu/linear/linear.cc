// linear: out[t, n] = sum over k of x[t, k] * weight[n, k]; up to three weights in one pass over x
// Shapes   x (num_tokens, k), weights (n[i], k) as they lie, out (num_tokens, sum(n))
// Traffic  sum(n) * k * itemsize bytes of weights once for every kMaxTokens tokens
// Limit    memory read to about 16 tokens, then FMA (float32) or VDPBF16PS (bfloat16)
// Tiling   activations are packed once in panels of tokens, rounded to what the dot reads. Up to
//          kStreamTokens tokens: one panel; a few rows at a time, straight from memory. More:
//          panels of kTokens; a task takes blocks of kBlockRows rows; the first panel of tokens
//          reads a block from memory and leaves it packed in L2, the others read it there and
//          prefetch the next block meanwhile
// Numerics fp32 accumulate. k is cut in equal segments of at most kSegmentBytes; a segment has one
//          vector of sums for each (t, n), taken in ascending k and summed by the tree of sum();
//          segments are added in ascending order. No other choice (tile, task, edge, thread)
//          touches an element's sum: its bits follow from x[t] and weight[n] alone.
//          bfloat16 weights with VDPBF16PS: x is rounded to bfloat16 (nearest even), and the
//          instruction takes subnormals as zero. Else both operands are float32.
#include "common/quantized.h"
#include "cpu/linear/dot.h"
#include "cpu/linear/quantized.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// 256 KB of packed weights in L2: each panel of tokens is read from L3 once for 16 tiles. 32 rows
// were 4 % slower, 96 and 128 no faster.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kMaxTokens = 516;  // 86 panels; bounds the scratch memory, not the result
constexpr int64_t kTaskRows = 12;    // a multiple of this: whole tiles, of four rows or of three
constexpr int64_t kTasks = 32;       // with many tokens: tails of at most 1/32 of a core
constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchSteps = 4;  // of a tile between two spells of prefetching

// ---- activations: panels (step, token, kStep), zero after k --------------------------------

template <typename Dot, typename X>
void pack_tokens(const LinearParams& p, const Cut<Dot>& cut, int64_t t, int64_t height,
                 typename Dot::Element* panels) {
  for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
    const int64_t begin = cut.begin(segment), end = begin + cut.length(segment) * Dot::kStep;
    typename Dot::Element* panel = panels + cut.panel(segment, t, p.num_tokens);
    for (int64_t i = 0; i < height; ++i) {
      const X* x = static_cast<const X*>(p.x) + (t + i) * p.x_stride;
      for (int64_t k = begin; k < end; k += kLanes) {
        const int64_t step = (k - begin) / Dot::kStep, lane = (k - begin) % Dot::kStep;
        const Vec v = k + kLanes <= p.k ? load(x + k) : load_first(x + k, int(larger(p.k - k, 0)));
        store(panel + (step * height + i) * Dot::kStep + lane, v);
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

// ---- weights of the next block -----------------------------------------------------------------

// Walks the cache lines of what is needed soon, some at a time.
template <typename Weight>
struct Prefetch {
  const LinearParams& p;
  int64_t n, end_n, k, row_bytes, lines_a_time;  // rows [n, end_n) of weights, row_bytes from k
  int64_t at = 0;
  const char* x = nullptr;  // the next panel of tokens
  int64_t x_lines_a_time = 0;

  inline void operator()() {
    for (int64_t i = 0; i < lines_a_time && n < end_n; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(weight_row<Weight>(p, n) + k) + at);
      at += kCacheLine;
      if (at >= row_bytes) at = 0, ++n;
    }
    for (int64_t i = 0; i < x_lines_a_time; ++i, x += kCacheLine) __builtin_prefetch(x);
  }
};

// ---- tiles ---------------------------------------------------------------------------------

// One segment of a tile of weights as they lie, which it leaves in `panel`.
template <typename Weight, int kHeight>
__attribute__((noinline)) void tile_of_rows(const typename DotOf<Weight>::type::Element* x,
                                            const WeightRows<Weight>& rows, int64_t whole, int tail,
                                            typename DotOf<Weight>::type::Element* panel,
                                            float* totals, int64_t stride) {
  using Dot = typename DotOf<Weight>::type;
  Vec sums[kHeight][kRows];
  clear(sums);
  const auto keep = [&](int j, int64_t s, typename Dot::Operand w) {
    Dot::store(panel + (s * kRows + j) * Dot::kStep, w);
    return w;
  };
  multiply_steps<Dot>(
      x, whole, [&](int j, int64_t s) { return keep(j, s, rows.load(j, s)); }, sums);
  if (tail) {
    multiply_steps<Dot>(
        x + whole * kHeight * Dot::kStep, 1,
        [&](int j, int64_t) { return keep(j, whole, rows.load_first(j, whole, tail)); }, sums);
  }
  add_all_sums(sums, totals, stride);
}

// One segment of a tile of packed weights.
template <typename Weight, int kHeight>
__attribute__((noinline)) void tile_of_panel(const typename DotOf<Weight>::type::Element* x,
                                             const typename DotOf<Weight>::type::Element* panel,
                                             int64_t steps, Prefetch<Weight>& prefetch,
                                             float* totals, int64_t stride) {
  using Dot = typename DotOf<Weight>::type;
  Vec sums[kHeight][kRows];
  clear(sums);
  const auto load = [&](int j, int64_t s) {
    if (j == 0 && s % kPrefetchSteps == 0) prefetch();
    return Dot::load(panel + (s * kRows + j) * Dot::kStep);
  };
  multiply_steps<Dot>(x, steps, load, sums);
  add_all_sums(sums, totals, stride);
}

// ---- results -------------------------------------------------------------------------------

template <typename T>
inline void put_as(const float* totals, int64_t stride, const LinearParams& p, int64_t n,
                   int64_t count) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    T* out = static_cast<T*>(p.out) + t * p.out_stride + n;
    for (int64_t j = 0; j < count; ++j) out[j] = from_float<T>(totals[t * stride + j]);
  }
}

// out[:, n .. n + count) = totals, rows `stride` apart.
inline void put(const float* totals, int64_t stride, const LinearParams& p, int64_t n,
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

template <int n>
struct Height {
  static constexpr int value = n;
};
template <int kMost, typename F>
inline void with_height(int64_t height, const F& f) {
  if (height == kMost) {
    f(Height<kMost>{});
  } else if constexpr (kMost > 1) {
    with_height<kMost - 1>(height, f);
  }
}

// Rows [n, end) for one panel of tokens.
template <typename Weight, int kHeight>
void stream_rows(const LinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                 const typename DotOf<Weight>::type::Element* x, int64_t n, int64_t end) {
  using Dot = typename DotOf<Weight>::type;
  constexpr int kCount = kHeight > kTokens ? 3 : kRows;
  for (; n < end; n += kCount) {
    const WeightRows<Weight> rows(p, n, end - 1, 0);
    float totals[kHeight][kRows] = {};
    for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
      const int64_t first = segment * cut.segment_steps;
      const int64_t whole = cut.length(segment) - cut.has_tail(segment), last = first + whole;
      Vec sums[kHeight][kCount];
      clear(sums);
      multiply_steps<Dot>(
          x + first * kHeight * Dot::kStep, whole,
          [&](int j, int64_t s) { return rows.load(j, first + s); }, sums);
      if (cut.has_tail(segment)) {
        multiply_steps<Dot>(
            x + last * kHeight * Dot::kStep, 1,
            [&](int j, int64_t) { return rows.load_first(j, last, cut.tail); }, sums);
      }
      add_all_sums(sums, totals[0], kRows);
    }
    put(totals[0], kRows, p, n, smaller(kCount, end - n));
  }
}

// One segment of the rows [n, n + count), a block, for all tokens.
template <typename Weight>
void multiply_block(const LinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                    const typename DotOf<Weight>::type::Element* x, int64_t segment, int64_t n,
                    int64_t count, typename DotOf<Weight>::type::Element* panels, float* totals,
                    Prefetch<Weight> prefetch) {
  using Dot = typename DotOf<Weight>::type;
  const int64_t length = cut.length(segment), panel_size = kRows * length * Dot::kStep;
  // Spells of prefetching while one panel of tokens is multiplied.
  const int64_t times = ceil_div(count, kRows) * ceil_div(length, kPrefetchSteps);
  prefetch.lines_a_time =
      ceil_div((prefetch.end_n - prefetch.n) * ceil_div(prefetch.row_bytes, kCacheLine),
               times * larger(1, ceil_div(p.num_tokens, kTokens) - 1));
  for (int64_t t = 0; t < p.num_tokens; t += kTokens) {
    const int64_t height = smaller(kTokens, p.num_tokens - t);
    const auto* tokens = x + cut.panel(segment, t, p.num_tokens);
    const int64_t tokens_size = height * length * Dot::kStep;
    prefetch.x = reinterpret_cast<const char*>(tokens + tokens_size);
    prefetch.x_lines_a_time = ceil_div(tokens_size * sizeof(*x), kCacheLine * times);
    with_height<kTokens>(height, [&](auto h) {
      for (int64_t i = 0; i < count; i += kRows) {
        auto* panel = panels + i / kRows * panel_size;
        float* to = totals + t * kBlockRows + i;
        if (t == 0) {
          const WeightRows<Weight> rows(p, n + i, n + count - 1, cut.begin(segment));
          const bool has_tail = cut.has_tail(segment);
          tile_of_rows<Weight, h.value>(tokens, rows, length - has_tail, has_tail ? cut.tail : 0,
                                        panel, to, kBlockRows);
        } else {
          tile_of_panel<Weight, h.value>(tokens, panel, length, prefetch, to, kBlockRows);
        }
      }
    });
  }
}

// Rows [n, end), block by block, for any number of tokens.
template <typename Weight>
void multiply_rows(const LinearParams& p, const Cut<typename DotOf<Weight>::type>& cut,
                   const typename DotOf<Weight>::type::Element* x, int64_t n, int64_t end) {
  using Dot = typename DotOf<Weight>::type;
  using Element = typename Dot::Element;
  const int64_t panel_bytes = kBlockRows * cut.segment_steps * Dot::kStep * sizeof(Element);
  const int64_t totals_bytes = p.num_tokens * kBlockRows * sizeof(float);
  char* memory = static_cast<char*>(scratch(Scratch::kTask, panel_bytes + totals_bytes));
  Element* panels = reinterpret_cast<Element*>(memory);
  float* totals = reinterpret_cast<float*>(memory + panel_bytes);
  for (; n < end; n += kBlockRows) {
    const int64_t count = smaller(kBlockRows, end - n);
    std::memset(totals, 0, totals_bytes);
    for (int64_t segment = 0; segment < cut.num_segments; ++segment) {
      const bool stays = segment + 1 < cut.num_segments;
      const int64_t next = stays ? segment + 1 : 0;
      const int64_t next_n = stays ? n : smaller(end, n + kBlockRows);
      const int64_t next_bytes =
          smaller(p.k - cut.begin(next), cut.length(next) * Dot::kStep) * sizeof(Weight);
      multiply_block<Weight>(
          p, cut, x, segment, n, count, panels, totals,
          {p, next_n, smaller(end, next_n + kBlockRows), cut.begin(next), next_bytes, 0});
    }
    put(totals, kBlockRows, p, n, count);
  }
}

template <typename Weight>
void multiply(const LinearParams& p) {
  using Dot = typename DotOf<Weight>::type;
  using Element = typename Dot::Element;
  const Cut<Dot> cut(p.k);
  int64_t num_rows = 0;
  for (int64_t i = 0; i < p.num_weights; ++i) num_rows += p.n[i];
  if (num_rows == 0) return;
  const int64_t x_bytes = p.num_tokens * cut.steps * Dot::kStep * sizeof(Element);
  Element* x = static_cast<Element*>(scratch(Scratch::kCaller, x_bytes));
  if (p.num_tokens <= kStreamTokens) {
    pack_panel<Dot>(p, cut, 0, p.num_tokens, x);
    const int64_t tasks = num_stream_tasks(num_rows * p.k * sizeof(Weight));
    const int64_t task_rows = ceil_div(num_rows, kTaskRows * tasks) * kTaskRows;
    with_height<kStreamTokens>(p.num_tokens, [&](auto h) {
      for_each_task(ceil_div(num_rows, task_rows), [&](int64_t task) {
        const int64_t n = task * task_rows;
        stream_rows<Weight, h.value>(p, cut, x, n, smaller(num_rows, n + task_rows));
      });
    });
  } else {
    for_each_task(ceil_div(p.num_tokens, kTokens), [&](int64_t i) {
      const int64_t t = i * kTokens;
      pack_panel<Dot>(p, cut, t, smaller(kTokens, p.num_tokens - t), x);
    });
    const int64_t task_rows = kBlockRows * larger(1, num_rows / (kBlockRows * kTasks));
    for_each_task(ceil_div(num_rows, task_rows), [&](int64_t task) {
      const int64_t n = task * task_rows;
      multiply_rows<Weight>(p, cut, x, n, smaller(num_rows, n + task_rows));
    });
  }
}

}  // namespace

void linear(const LinearParams& params) {
  if (!is_float(params.weight_dtype)) return linear_quantized(params);
  const int64_t parts = ceil_div(params.num_tokens, kMaxTokens);
  if (parts == 0) return;
  const int64_t tokens = ceil_div(ceil_div(params.num_tokens, parts), kTokens) * kTokens;
  for (int64_t t = 0; t < params.num_tokens; t += tokens) {
    LinearParams p = params;
    p.num_tokens = smaller(tokens, params.num_tokens - t);
    p.x = static_cast<const char*>(p.x) + t * p.x_stride * item_size(p.x_dtype);
    p.out = static_cast<char*>(p.out) + t * p.out_stride * item_size(p.out_dtype);
    switch (p.weight_dtype) {
      case DType::kFloat16:
        multiply<f16>(p);
        break;
      case DType::kBFloat16:
        multiply<bf16>(p);
        break;
      default:
        multiply<float>(p);
    }
  }
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
