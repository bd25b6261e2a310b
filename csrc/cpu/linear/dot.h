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
// Into L2 alone: a fetch from memory that is bound for L1 holds one of its few miss buffers all
// the while, which then lack for what comes from L2.
inline void prefetch_to_l2(const char* p) { __builtin_prefetch(p, 0, 2); }

constexpr int tile_rows(int64_t height) { return height > kTokens ? 3 : kRows; }

// Calls f with a panel's height as a constant.
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

// ---- dots: what panels hold, and one vector's step of the product --------------------------

// GCC loads an operand anew for each FMA that uses it, unless it is held in a register: with 32 of
// them 1.2 times as fast at 8 tokens, with AVX2's 16 half as fast.
inline Vec load_once(const float* p) {
#if defined(__AVX512F__)
  return hold(load(p));
#else
  return load(p);
#endif
}

// A step is kStep elements of k, in kParts vectors. In panels a part has kPart elements in a row,
// and parts are `stride` elements apart; `at(k)` is the vector of activations from k on.
struct FloatDot {
  using Element = float;
  using Operand = Vec;
  static constexpr int kStep = kLanes, kParts = 1, kPart = kLanes;
  template <typename At>
  static void pack(const At& at, int64_t k, float* step, int64_t) {
    CLRT_ISA::store(step, at(k));
  }
  template <typename T>
  static Operand load(const T* weight, int) {
    return CLRT_ISA::load(weight);
  }
  template <typename T>
  static Operand load_first(const T* weight, int n, int) {
    return CLRT_ISA::load_first(weight, n);
  }
  static Operand load_packed(const float* p) { return load_once(p); }
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
  static constexpr int kStep = 2 * kLanes, kParts = 1, kPart = kStep;
  // Subnormals are 0, as they are to the product.
  template <typename At>
  static void pack(const At& at, int64_t k, bf16* step, int64_t) {
    store(step, (__m512i)_mm512_cvtne2ps_pbh(at(k + kLanes).v, at(k).v));
  }
  static Operand load(const bf16* weight, int) { return _mm512_loadu_si512(weight); }
  static Operand load_first(const bf16* weight, int n, int) {
    return _mm512_maskz_loadu_epi16((1u << n) - 1, weight);
  }
  static Operand load_packed(const bf16* p) { return _mm512_loadu_si512(p); }
  static void store(bf16* p, Operand x) { _mm512_storeu_si512(p, x); }
  static Vec multiply_add(Operand x, Operand w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)w)};
  }
};
template <>
struct DotOf<bf16> {
  using type = Bf16Dot;
};
#elif defined(__AVX512F__)
// 32 weights as two vectors of float32: the even ones are shifted, the odd ones masked. Two
// instructions for 32 weights beside the four of two widening loads.
struct EvenOddDot {
  using Element = float;
  using Operand = Vec;
  static constexpr int kStep = 2 * kLanes, kParts = 2, kPart = kLanes;
  // Those of even and those of odd number among the 32 of both.
  template <typename At>
  static void pack(const At& at, int64_t k, float* step, int64_t stride) {
    const __m512i evens =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const Vec first = at(k), second = at(k + kLanes);
    store(step, {_mm512_permutex2var_ps(first.v, evens, second.v)});
    store(step + stride, {_mm512_permutex2var_ps(first.v, odds, second.v)});
  }
  static Operand widen(__m512i pairs, int part) {
    return {_mm512_castsi512_ps(
        part == 0 ? _mm512_slli_epi32(pairs, 16)
                  : _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))))};
  }
  static Operand load(const bf16* weight, int part) {
    return widen(_mm512_loadu_si512(weight), part);
  }
  static Operand load_first(const bf16* weight, int n, int part) {
    return widen(_mm512_maskz_loadu_epi16((1u << n) - 1, weight), part);
  }
  static Operand load_packed(const float* p) { return load_once(p); }
  static void store(float* p, Operand x) { CLRT_ISA::store(p, x); }
  static Vec multiply_add(Operand x, Operand w, Vec sum) { return fma(x, w, sum); }
};
template <>
struct DotOf<bf16> {
  using type = EvenOddDot;
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

// The rows [n, end) that lie together: those of n's own weight.
inline int64_t rows_together(const LinearParams& p, int64_t n, int64_t end) {
  int64_t i = 0, begin = 0;
  while (n >= begin + p.n[i]) begin += p.n[i++];
  return smaller(end, begin + p.n[i]) - n;
}

// kRows rows from row n and element k on; the last row stands in for those past it.
template <typename Weight>
struct WeightRows {
  using Dot = typename DotOf<Weight>::type;
  const Weight* row[kRows];

  WeightRows(const LinearParams& p, int64_t n, int64_t last, int64_t k) {
    for (int j = 0; j < kRows; ++j) row[j] = weight_row<Weight>(p, smaller(n + j, last)) + k;
  }
  inline typename Dot::Operand load(int j, int64_t step, int part) const {
    return Dot::load(row[j] + step * Dot::kStep, part);
  }
  inline typename Dot::Operand load_first(int j, int64_t step, int part, int n) const {
    return Dot::load_first(row[j] + step * Dot::kStep, n, part);
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

template <int kHeight, int kCount>
inline void load_sums(const float* p, Vec (&sums)[kHeight][kCount]) {
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) sums[i][j] = load(p + (i * kCount + j) * kLanes);
  }
}
template <int kHeight, int kCount>
inline void store_sums(const Vec (&sums)[kHeight][kCount], float* p) {
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) store(p + (i * kCount + j) * kLanes, sums[i][j]);
  }
}

// sums += x * w of one step; load(j, step, part) gives row j's operand. finish(i) follows when
// token i's sums are done.
template <typename Dot, int kHeight, int kCount, typename Load, typename Finish>
inline __attribute__((always_inline)) void multiply_step(const typename Dot::Element* x, int64_t s,
                                                         const Load& load,
                                                         Vec (&sums)[kHeight][kCount],
                                                         const Finish& finish) {
#pragma GCC unroll 2
  for (int part = 0; part < Dot::kParts; ++part, x += kHeight * Dot::kPart) {
    typename Dot::Operand w[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) w[j] = load(j, s, part);
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
      const typename Dot::Operand xi = Dot::load_packed(x + i * Dot::kPart);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) sums[i][j] = Dot::multiply_add(xi, w[j], sums[i][j]);
      if (part + 1 == Dot::kParts && i > 0) finish(i - 1);
    }
  }
  finish(kHeight - 1);
}
template <typename Dot, int kHeight, int kCount, typename Load>
inline __attribute__((always_inline)) void multiply_step(const typename Dot::Element* x, int64_t s,
                                                         const Load& load,
                                                         Vec (&sums)[kHeight][kCount]) {
  multiply_step<Dot>(x, s, load, sums, [](int) {});
}

// The same over `steps` steps.
template <typename Dot, int kHeight, int kCount, typename Load>
inline __attribute__((always_inline)) void multiply_steps(const typename Dot::Element* x,
                                                          int64_t steps, const Load& load,
                                                          Vec (&sums)[kHeight][kCount]) {
  for (int64_t s = 0; s < steps; ++s, x += kHeight * Dot::kStep) {
    multiply_step<Dot>(x, s, load, sums);
  }
}

#if defined(__AVX512F__)
// The first steps of the tree of sum(): in each 128 bits the four sums that are left of sums[j].
// A blend takes any of Zen 4's four pipes, a shuffle one of two.
template <int kCount>
inline __m512 fold(const Vec (&sums)[kCount]) {
  const auto halves = [](__m512 a, __m512 b) {  // (a, a, b, b)
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  };
  const __m512 ac = halves(sums[0].v, sums[2].v), bd = halves(sums[1].v, sums[kCount - 1].v);
  const __m512i others = _mm512_setr_epi64(2, 3, 8, 9, 6, 7, 12, 13);
  const __m512d swapped =
      _mm512_permutex2var_pd(_mm512_castps_pd(ac), others, _mm512_castps_pd(bd));
  return _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, ac, bd), _mm512_castpd_ps(swapped));
}
#endif

// totals[j] += sum(sums[j]), by the tree of sum(), four at once.
template <int kCount>
inline void add_sums(const Vec (&sums)[kCount], float* totals) {
#if defined(__AVX512F__)
  const __m512 q = fold(sums);
  const __m512 d = _mm512_add_ps(q, _mm512_permute_ps(q, 0x4e));
  const __m512 s = _mm512_add_ps(d, _mm512_permute_ps(d, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m128 four = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s));
  constexpr __mmask8 used = (1 << kCount) - 1;
  _mm_mask_storeu_ps(totals, used, _mm_add_ps(_mm_maskz_loadu_ps(used, totals), four));
#else
  for (int j = 0; j < kCount; ++j) totals[j] += sum(sums[j]);
#endif
}

template <int kHeight, int kCount>
inline void add_all_sums(const Vec (&sums)[kHeight][kCount], float* totals, int64_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < kHeight; ++i) add_sums(sums[i], totals + i * stride);
}

// The same in two halves: a tile ends by folding its sums, and later the folded sums of kLanes rows
// become one vector. A tile's own sums to the end kept the next tile waiting (k = 576: 9 % of all).
#if defined(__AVX512F__)
constexpr int64_t kFoldedLanes = 4;  // of one sum
#else
constexpr int64_t kFoldedLanes = 1;
#endif
constexpr int64_t kFoldedTile = kRows * kFoldedLanes;    // floats that a tile leaves of each token
constexpr int64_t kFoldedToken = kLanes * kFoldedLanes;  // and kLanes / kRows tiles

inline void fold_sums(const Vec (&sums)[kRows], float* folded) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(folded, fold(sums));
#else
  for (int j = 0; j < kRows; ++j) folded[j] = sum(sums[j]);
#endif
}

inline Vec unfold(const float* folded) {
#if defined(__AVX512F__)
  const auto halves = [](__m512 a, __m512 b) {  // (a, a, b, b) in each 128 bits
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const auto at = [&](int tile) { return _mm512_loadu_ps(folded + tile * kFoldedTile); };
  const __m512 ac = halves(at(0), at(2)), bd = halves(at(1), at(3));
  const __m512 acbd =  // row j's of the tiles 0, 2, 1, 3 in 128 bits j
      _mm512_add_ps(_mm512_shuffle_ps(ac, bd, 0x88), _mm512_shuffle_ps(ac, bd, 0xdd));
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(in_order, acbd)};
#else
  return load(folded);
#endif
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
