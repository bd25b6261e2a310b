// The dot form of linear: what one tile of tokens by weight rows computes, and in what order.
//
// A weight format says three things: how its values are multiplied (DotOf: what panels hold and one
// vector's step of the product), where its rows lie (WeightRows: loads that turn stored elements
// into the dot's operands) and, by its dot, how k is cut (Cut).
#pragma once

#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kRows = 4;  // weight rows of a tile: their four sums make one 16-byte store
#if defined(__AVX512F__)
constexpr int kTokens = 6;  // 24 sums, 4 weights and 1 activation in 32 registers
#else
constexpr int kTokens = 3;  // 12 sums and 3 activations in 16; 2 gave 75 %, 4 half the speed
#endif
// One panel of so few tokens is multiplied straight from memory; if it is higher than kTokens, by
// three rows at a time, which needs no more registers.
constexpr int kStreamTokens = kTokens * kRows / 3;
// A segment of a packed row. A tile's tokens (24 KB) and weights (16 KB) then share a 48 KB L1 with
// AVX-512; 6 KB segments fell out of it (430 -> 380 GFLOP/s a core), 2 KB ones sum twice as often.
constexpr int64_t kSegmentBytes = 4096;
// Ahead in a row; 512 to 2048 were equal. A non-temporal prefetch gained 3 % at 4 tokens and lost
// 20 % where weights stay in cache, as it keeps them out of L2.
constexpr int64_t kPrefetchBytes = 1024;

// ---- dots: what panels hold, and one vector's step of the product --------------------------

struct FloatDot {
  using Element = float;
  using Operand = Vec;
  static constexpr int kStep = kLanes;
  template <typename T>
  static Operand load(const T* p) {
    return CLRT_ISA::load(p);
  }
  template <typename T>
  static Operand load_first(const T* p, int n) {
    return CLRT_ISA::load_first(p, n);
  }
  static void store(float* p, Operand x) { CLRT_ISA::store(p, x); }
  static Vec multiply_add(Operand x, Operand w, Vec sum) { return fma(x, w, sum); }
};

template <typename Weight>
struct DotOf {
  using type = FloatDot;
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
  using Element = bf16;
  using Operand = __m512i;
  static constexpr int kStep = 2 * kLanes;
  static Operand load(const bf16* p) { return _mm512_loadu_si512(p); }
  static Operand load_first(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  static void store(bf16* p, Operand x) { _mm512_storeu_si512(p, x); }
  static Vec multiply_add(Operand x, Operand w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)w)};
  }
};
template <>
struct DotOf<bf16> {
  using type = Bf16Dot;
};
#endif

// How k is cut: a function of k and the dot alone. A step is one vector.
template <typename Dot>
struct Cut {
  int64_t steps, segment_steps, num_segments;
  int tail;  // elements of the last step, or 0 if it is whole

  explicit Cut(int64_t k) : steps(ceil_div(k, Dot::kStep)), tail(int(k % Dot::kStep)) {
    constexpr int64_t kMost = kSegmentBytes / (Dot::kStep * sizeof(typename Dot::Element));
    num_segments = ceil_div(steps, kMost);
    segment_steps = ceil_div(steps, larger(1, num_segments));
  }
  int64_t begin(int64_t segment) const { return segment * segment_steps * Dot::kStep; }
  int64_t length(int64_t segment) const {  // in steps
    return smaller(segment_steps, steps - segment * segment_steps);
  }
  bool has_tail(int64_t segment) const { return tail && segment + 1 == num_segments; }
  // Where the panel of tokens that begins with t lies: segments are outermost.
  int64_t panel(int64_t segment, int64_t t, int64_t num_tokens) const {
    return begin(segment) * num_tokens + t * length(segment) * Dot::kStep;
  }
};

// ---- weights as they lie -------------------------------------------------------------------

// Row n of the weights laid end to end.
template <typename Weight>
inline const Weight* weight_row(const LinearParams& p, int64_t n) {
  int64_t i = 0;
  while (n >= p.n[i]) n -= p.n[i++];
  return static_cast<const Weight*>(p.weights[i]) + n * p.k;
}

// kRows rows from row n and element k on; the last row stands in for those past it.
template <typename Weight>
struct WeightRows {
  using Dot = typename DotOf<Weight>::type;
  const Weight* row[kRows];

  WeightRows(const LinearParams& p, int64_t n, int64_t last, int64_t k) {
    for (int j = 0; j < kRows; ++j) row[j] = weight_row<Weight>(p, smaller(n + j, last)) + k;
  }
  inline typename Dot::Operand load(int j, int64_t step) const {
    const Weight* at = row[j] + step * Dot::kStep;
    __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes);
    return Dot::load(at);
  }
  inline typename Dot::Operand load_first(int j, int64_t step, int n) const {
    return Dot::load_first(row[j] + step * Dot::kStep, n);
  }
};

// ---- sums ----------------------------------------------------------------------------------

template <int kHeight, int kCount>
inline void clear(Vec (&sums)[kHeight][kCount]) {
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) sums[i][j] = splat(0.0f);
  }
}

// sums += x * w over `steps` steps; load(j, step) gives row j's operand.
template <typename Dot, int kHeight, int kCount, typename Load>
inline __attribute__((always_inline)) void multiply_steps(const typename Dot::Element* x,
                                                          int64_t steps, const Load& load,
                                                          Vec (&sums)[kHeight][kCount]) {
  for (int64_t s = 0; s < steps; ++s, x += kHeight * Dot::kStep) {
    typename Dot::Operand w[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) w[j] = load(j, s);
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
      const typename Dot::Operand xi = Dot::load(x + i * Dot::kStep);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) sums[i][j] = Dot::multiply_add(xi, w[j], sums[i][j]);
    }
  }
}

// totals[j] += sum(sums[j]), by the tree of sum(), four at once. `totals` has room for four.
template <int kCount>
inline void add_sums(const Vec (&sums)[kCount], float* totals) {
#if defined(__AVX512F__)
  const auto fold = [](__m512 a, __m512 b) {  // each one's halves added: a's sum, then b's
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 ab = fold(sums[0].v, sums[1].v), cd = fold(sums[2].v, sums[kCount - 1].v);
  const __m512 q =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 d = _mm512_add_ps(q, _mm512_permute_ps(q, 0x4e));
  const __m512 s = _mm512_add_ps(d, _mm512_permute_ps(d, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m128 four = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s));
  _mm_storeu_ps(totals, _mm_add_ps(_mm_loadu_ps(totals), four));
#else
  for (int j = 0; j < kCount; ++j) totals[j] += sum(sums[j]);
#endif
}

template <int kHeight, int kCount>
inline void add_all_sums(const Vec (&sums)[kHeight][kCount], float* totals, int64_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) add_sums(sums[i], totals + i * stride);
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
