// Vector instructions: the forms that take a count, and those that take a mask, repeats and
// strides.
//
// Sums are taken pairwise as the device documents it; the order of a hardware's additions may still
// differ, so kernels' sums agree with it to rounding, not to the bit.
#pragma once

#include <cmath>

#include "tensors.h"

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

// Strides in 32 bytes: between the eight blocks of a repeat, and between repeats.
struct BinaryRepeatParams {
  BinaryRepeatParams(uint8_t to_block, uint8_t a_block, uint8_t b_block, uint8_t to_repeat,
                     uint8_t a_repeat, uint8_t b_repeat)
      : dstBlkStride(to_block),
        src0BlkStride(a_block),
        src1BlkStride(b_block),
        dstRepStride(to_repeat),
        src0RepStride(a_repeat),
        src1RepStride(b_repeat) {}
  uint8_t dstBlkStride, src0BlkStride, src1BlkStride, dstRepStride, src0RepStride, src1RepStride;
};
struct UnaryRepeatParams {
  UnaryRepeatParams(uint16_t to_block, uint16_t from_block, uint8_t to_repeat, uint8_t from_repeat)
      : dstBlkStride(to_block),
        srcBlkStride(from_block),
        dstRepStride(to_repeat),
        srcRepStride(from_repeat) {}
  uint16_t dstBlkStride, srcBlkStride;
  uint8_t dstRepStride, srcRepStride;
};
struct BrcbRepeatParams {
  BrcbRepeatParams(uint16_t to_block, uint16_t to_repeat)
      : dstBlkStride(to_block), dstRepStride(to_repeat) {}
  uint16_t dstBlkStride, dstRepStride;
};

namespace emu_vector {

using ascend_emu::core;
using ascend_emu::fail;

inline void begin(const char* name) { core().issue(PIPE_V, name); }

template <typename T>
void check_count(int64_t count, const LocalTensor<T>& t) {
  if (count < 1) fail(std::string(core().instruction()) + ": count must be positive");
  t.require_aligned();
}
inline void check_repeats(uint64_t mask, int64_t repeats) {
  if (mask < 1 || mask > 64) fail(std::string(core().instruction()) + ": mask not in [1, 64]");
  if (repeats < 1 || repeats > 255) {
    fail(std::string(core().instruction()) + ": repeats not in [1, 255]");
  }
}

// Source and destination are the same elements or have none in common.
template <typename T, typename U>
void check_overlap(const LocalTensor<T>& to, const LocalTensor<U>& from, int64_t count) {
  const int64_t a = to.begin(), b = from.begin();
  const int64_t a_end = a + count * int64_t(sizeof(T)), b_end = b + count * int64_t(sizeof(U));
  const bool same = a == b && sizeof(T) == sizeof(U);
  if (!same && a < b_end && b < a_end) {
    fail(std::string(core().instruction()) + ": source and destination overlap in part");
  }
}

template <typename T, typename F>
void unary(const char* name, const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t count,
           const F& f) {
  begin(name);
  check_count(count, to);
  check_count(count, from);
  check_overlap(to, from, count);
  const T* a = from.read(0, count);
  T* d = to.write(0, count);
  for (int32_t i = 0; i < count; ++i) d[i] = f(a[i]);
}

template <typename T, typename F>
void binary(const char* name, const LocalTensor<T>& to, const LocalTensor<T>& a_,
            const LocalTensor<T>& b_, int32_t count, const F& f) {
  begin(name);
  for (const auto* t : {&to, &a_, &b_}) check_count(count, *t);
  check_overlap(to, a_, count);
  check_overlap(to, b_, count);
  const T *a = a_.read(0, count), *b = b_.read(0, count);
  T* d = to.write(0, count);
  for (int32_t i = 0; i < count; ++i) d[i] = f(d[i], a[i], b[i]);
}

// `mask` floats a repeat, in blocks of eight. Only float: what these kernels compute in.
template <typename F>
void unary_repeats(const char* name, const LocalTensor<float>& to, const LocalTensor<float>& from,
                   uint64_t mask, int64_t repeats, const UnaryRepeatParams& p, const F& f) {
  begin(name);
  check_repeats(mask, repeats);
  to.require_aligned();
  from.require_aligned();
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t b = 0; b * 8 < int64_t(mask); ++b) {
      const int64_t n = std::min<int64_t>(8, int64_t(mask) - b * 8);
      const float* a = from.read((r * p.srcRepStride + b * p.srcBlkStride) * 8, n);
      float* d = to.write((r * p.dstRepStride + b * p.dstBlkStride) * 8, n);
      for (int64_t i = 0; i < n; ++i) d[i] = f(a[i]);
    }
  }
}

template <typename F>
void binary_repeats(const char* name, const LocalTensor<float>& to, const LocalTensor<float>& a_,
                    const LocalTensor<float>& b_, uint64_t mask, int64_t repeats,
                    const BinaryRepeatParams& p, bool accumulates, const F& f) {
  begin(name);
  check_repeats(mask, repeats);
  for (const auto* t : {&to, &a_, &b_}) t->require_aligned();
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t block = 0; block * 8 < int64_t(mask); ++block) {
      const int64_t n = std::min<int64_t>(8, int64_t(mask) - block * 8);
      const float* a = a_.read((r * p.src0RepStride + block * p.src0BlkStride) * 8, n);
      const float* b = b_.read((r * p.src1RepStride + block * p.src1BlkStride) * 8, n);
      const int64_t at = (r * p.dstRepStride + block * p.dstBlkStride) * 8;
      if (accumulates) to.read(at, n);
      float* d = to.write(at, n);
      for (int64_t i = 0; i < n; ++i) d[i] = f(d[i], a[i], b[i]);
    }
  }
}

// Adds neighbours, then their sums, as a tree.
inline float pairwise(const float* x, int64_t n) {
  if (n == 1) return x[0];
  const int64_t left = (n + 1) / 2;
  return pairwise(x, left) + pairwise(x + left, n - left);
}

// One number a repeat, `to_repeat` elements apart.
template <typename F>
void whole_reduce(const char* name, const LocalTensor<float>& to, const LocalTensor<float>& from,
                  int32_t mask, int32_t repeats, int32_t to_repeat, int32_t from_block,
                  int32_t from_repeat, const F& f) {
  begin(name);
  check_repeats(uint64_t(mask), repeats);
  from.require_aligned();
  for (int64_t r = 0; r < repeats; ++r) {
    float lanes[64];
    for (int64_t b = 0; b * 8 < mask; ++b) {
      const int64_t n = std::min<int64_t>(8, mask - b * 8);
      const float* block = from.read((r * from_repeat + b * from_block) * 8, n);
      std::memcpy(lanes + b * 8, block, size_t(n) * 4);
    }
    *to.write(r * to_repeat, 1) = f(lanes, mask);
  }
}

}  // namespace emu_vector

#define ASCEND_EMU_BINARY(Name, expression)                                                  \
  template <typename T>                                                                      \
  void Name(const LocalTensor<T>& to, const LocalTensor<T>& a, const LocalTensor<T>& b,      \
            int32_t count) {                                                                 \
    emu_vector::binary(#Name, to, a, b, count, [](T, T x, T y) -> T { return expression; }); \
  }                                                                                          \
  inline void Name(const LocalTensor<float>& to, const LocalTensor<float>& a,                \
                   const LocalTensor<float>& b, uint64_t mask, uint8_t repeats,              \
                   const BinaryRepeatParams& p) {                                            \
    emu_vector::binary_repeats(#Name, to, a, b, mask, repeats, p, false,                     \
                               [](float, float x, float y) -> float { return expression; }); \
  }
ASCEND_EMU_BINARY(Add, x + y)
ASCEND_EMU_BINARY(Sub, x - y)
ASCEND_EMU_BINARY(Mul, x* y)
ASCEND_EMU_BINARY(Div, x / y)
ASCEND_EMU_BINARY(Max, x > y ? x : y)
#undef ASCEND_EMU_BINARY

// to += a * b.
inline void MulAddDst(const LocalTensor<float>& to, const LocalTensor<float>& a,
                      const LocalTensor<float>& b, uint64_t mask, uint8_t repeats,
                      const BinaryRepeatParams& p) {
  emu_vector::binary_repeats("MulAddDst", to, a, b, mask, repeats, p, true,
                             [](float d, float x, float y) { return d + x * y; });
}

#define ASCEND_EMU_UNARY(Name, expression)                                                        \
  inline void Name(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t count) { \
    emu_vector::unary(#Name, to, from, count, [](float x) -> float { return expression; });       \
  }                                                                                               \
  inline void Name(const LocalTensor<float>& to, const LocalTensor<float>& from, uint64_t mask,   \
                   uint8_t repeats, const UnaryRepeatParams& p) {                                 \
    emu_vector::unary_repeats(#Name, to, from, mask, repeats, p,                                  \
                              [](float x) -> float { return expression; });                       \
  }
ASCEND_EMU_UNARY(Exp, std::exp(x))
ASCEND_EMU_UNARY(Ln, std::log(x))
ASCEND_EMU_UNARY(Sqrt, std::sqrt(x))
#undef ASCEND_EMU_UNARY

inline void Muls(const LocalTensor<float>& to, const LocalTensor<float>& from, float by,
                 int32_t count) {
  emu_vector::unary("Muls", to, from, count, [by](float x) { return x * by; });
}
inline void Adds(const LocalTensor<float>& to, const LocalTensor<float>& from, float what,
                 int32_t count) {
  emu_vector::unary("Adds", to, from, count, [what](float x) { return x + what; });
}

template <typename T>
void Duplicate(const LocalTensor<T>& to, T value, int32_t count) {
  emu_vector::begin("Duplicate");
  emu_vector::check_count(count, to);
  T* d = to.write(0, count);
  for (int32_t i = 0; i < count; ++i) d[i] = value;
}

template <typename To, typename From>
void Cast(const LocalTensor<To>& to, const LocalTensor<From>& from, const RoundMode& mode,
          uint32_t count) {
  emu_vector::begin("Cast");
  emu_vector::check_count(count, to);
  emu_vector::check_count(count, from);
  emu_vector::check_overlap(to, from, count);
  const bool widens = sizeof(To) > sizeof(From);
  if (mode != (widens ? RoundMode::CAST_NONE : RoundMode::CAST_RINT)) {
    ascend_emu::fail("Cast: to float with CAST_NONE, from float with CAST_RINT");
  }
  const From* a = from.read(0, count);
  To* d = to.write(0, count);
  for (uint32_t i = 0; i < count; ++i) d[i] = To(float(a[i]));
}

inline void WholeReduceSum(const LocalTensor<float>& to, const LocalTensor<float>& from,
                           int32_t mask, int32_t repeats, int32_t to_repeat, int32_t from_block,
                           int32_t from_repeat) {
  emu_vector::whole_reduce("WholeReduceSum", to, from, mask, repeats, to_repeat, from_block,
                           from_repeat, emu_vector::pairwise);
}
inline void WholeReduceMax(const LocalTensor<float>& to, const LocalTensor<float>& from,
                           int32_t mask, int32_t repeats, int32_t to_repeat, int32_t from_block,
                           int32_t from_repeat, ReduceOrder order) {
  if (order != ReduceOrder::ORDER_ONLY_VALUE) {
    ascend_emu::fail("emulator: WholeReduceMax gives values only");
  }
  emu_vector::whole_reduce("WholeReduceMax", to, from, mask, repeats, to_repeat, from_block,
                           from_repeat,
                           [](const float* x, int64_t n) { return *std::max_element(x, x + n); });
}
// Eight numbers a repeat, each spread over a block.
inline void Brcb(const LocalTensor<float>& to, const LocalTensor<float>& from, uint8_t repeats,
                 const BrcbRepeatParams& p) {
  emu_vector::begin("Brcb");
  emu_vector::check_repeats(64, repeats);
  to.require_aligned();
  from.require_aligned();
  for (int64_t r = 0; r < repeats; ++r) {
    const float* a = from.read(r * 8, 8);
    for (int64_t b = 0; b < 8; ++b) {
      float* d = to.write((r * p.dstRepStride + b * p.dstBlkStride) * 8, 8);
      std::fill(d, d + 8, a[b]);
    }
  }
}

}  // namespace AscendC
