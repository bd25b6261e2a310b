// What attention multiplies keys in: words of 32 bits, kLanes a chunk.
//
// A float is a word, or a pair of bfloat16 where the CPU multiplies pairs. Quantised keys are pairs
// of int16 against a query in int16: exact sums, 15 bits of the query's greatest element, one scale
// a key. Keys of an int4 cache are rotated (rotate.h); so is the query.
#pragma once

#include <type_traits>

#include "cpu/linear/quantize_row.h"
#include "cpu/runtime/task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kGroup = 16;  // keys that lie one row stride apart: block_size is a multiple of it

// Whether quantised keys and values are multiplied as bytes (bytes.h).
#if defined(__AVX512VNNI__)
constexpr bool kByteDots = true;
#else
constexpr bool kByteDots = false;
#endif

// Whether keys and values are multiplied in pairs of bfloat16.
inline bool multiplies_pairs([[maybe_unused]] DType cache_dtype) {
#if defined(__AVX512BF16__)
  return cache_dtype == DType::kBFloat16;
#else
  return false;
#endif
}

// What the scores of a packed query are multiplied by, and the sum of its elements as packed.
struct QueryScale {
  float scale = 1.0f, sum = 0.0f;
};

// One element a word, multiplied in float32. A query is first rounded to a bfloat16 cache's dtype,
// so that every instruction set computes the same mathematical function.
template <typename T>
struct Qk {
  using Row = const T*;
  static constexpr int64_t count(int64_t head_dim) { return head_dim; }
  static constexpr int64_t num_chunks(int64_t head_dim) {
    return ceil_div(count(head_dim), kLanes);
  }
  static bool has_whole_chunks(int64_t head_dim) { return head_dim % (2 * kLanes) == 0; }
  static Row key_row(const T* group, int i, int64_t row_stride) { return group + i * row_stride; }
  static Vec load_whole_chunk(Row row, int64_t chunk) { return load(row + chunk * kLanes); }
  static Vec load_chunk(Row row, int64_t chunk, int64_t head_dim) {
    const int64_t left = head_dim - chunk * kLanes;
    return left < kLanes ? load_first(row + chunk * kLanes, int(left))
                         : load_whole_chunk(row, chunk);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static void store_query(float* words, int64_t element, Vec x) { store(words + element, x); }
};

#if defined(__AVX512BF16__)
// Two elements a word, as they lie.
template <>
struct Qk<bf16> {
  using Row = const bf16*;
  static constexpr int64_t count(int64_t head_dim) { return head_dim / 2; }
  static constexpr int64_t num_chunks(int64_t head_dim) {
    return ceil_div(count(head_dim), kLanes);
  }
  static bool has_whole_chunks(int64_t head_dim) { return head_dim % (2 * kLanes) == 0; }
  static Row key_row(Row group, int i, int64_t row_stride) { return group + i * row_stride; }
  static Vec load_whole_chunk(Row row, int64_t chunk) {
    return load(reinterpret_cast<const float*>(row) + chunk * kLanes);
  }
  static Vec load_chunk(Row row, int64_t chunk, int64_t head_dim) {
    const int64_t left = count(head_dim) - chunk * kLanes;
    return left < kLanes
               ? load_first(reinterpret_cast<const float*>(row) + chunk * kLanes, int(left))
               : load_whole_chunk(row, chunk);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return dot_bf16_pairs(a, b, c); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static void store_query(float* words, int64_t element, Vec x) {
    store(reinterpret_cast<bf16*>(words) + element, x);
  }
};
#else
template <>
inline void Qk<bf16>::store_query(float* words, int64_t element, Vec x) {
  bf16 rounded[kLanes];
  store(rounded, x);
  store(words + element, load(rounded));
}
#endif

// Pairs of neighbours.
template <>
struct Qk<int8_t> {
  using Row = const int8_t*;
  static constexpr int64_t num_chunks(int64_t head_dim) { return ceil_div(head_dim, 2 * kLanes); }
  static bool has_whole_chunks(int64_t head_dim) { return head_dim % (2 * kLanes) == 0; }
  static Row key_row(Row group, int i, int64_t row_stride) { return group + i * row_stride; }
  static Vec load_whole_chunk(Row row, int64_t chunk) {
    return load_pairs(row + chunk * 2 * kLanes);
  }
  static Vec load_chunk(Row row, int64_t chunk, int64_t head_dim) {
    const int64_t left = head_dim - chunk * 2 * kLanes;
    if (left >= 2 * kLanes) return load_whole_chunk(row, chunk);
    int8_t bytes[2 * kLanes] = {};
    std::memcpy(bytes, row + chunk * 2 * kLanes, left);
    return load_pairs(bytes);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return dot_int16_pairs(a, b, c); }
  static Vec add(Vec a, Vec b) { return add_int32(a, b); }
  // The query's elements, int32 in the bits of floats, as int16 in the order of a key's.
  static void put_query(const float* int32s, int64_t head_dim, int16_t* words) {
    for (int64_t d = 0; d < head_dim; ++d) words[d] = int16_t(float_to_bits(int32s[d]));
  }
};

// Chunk 2 c has the elements of even number of kLanes * 4, chunk 2 c + 1 the others.
template <>
struct Qk<Nibbles> {
  struct Row {
    const Nibbles* low;         // head_dim / 2 bytes: bits 0 to 3
    const uint8_t *even, *odd;  // head_dim / 16 bytes each: bit 4 of the elements of that number
  };
  static constexpr int64_t num_chunks(int64_t head_dim) {
    return 2 * ceil_div(head_dim, 4 * kLanes);
  }
  static bool has_whole_chunks(int64_t head_dim) { return head_dim % (4 * kLanes) == 0; }
  static Row key_row(const Nibbles* group, int i, int64_t row_stride) {
    const uint8_t* high = &group[kGroup * row_stride].bits + i * row_stride / 4;
    return {group + i * row_stride, high, high + row_stride / 8};
  }
  static Vec nibbles(Vec bytes, int64_t chunk) {
    return and_bits(chunk % 2 ? shift_right_4(bytes) : bytes, splat_int32(0x000f000f));
  }
  static Vec load_whole_chunk(const Row& row, int64_t chunk) {
    const int64_t at = chunk / 2 * 2 * kLanes;
    return add_16_where((chunk % 2 ? row.odd : row.even) + at / 8,
                        nibbles(load_pairs(&row.low[at].bits), chunk));
  }
  static Vec load_chunk(const Row& row, int64_t chunk, int64_t head_dim) {
    const int64_t at = chunk / 2 * 2 * kLanes, left = head_dim / 2 - at;
    if (left >= 2 * kLanes) return load_whole_chunk(row, chunk);
    uint8_t bytes[2 * kLanes] = {}, bits[kLanes / 4] = {};
    std::memcpy(bytes, row.low + at, left);
    std::memcpy(bits, (chunk % 2 ? row.odd : row.even) + at / 8, left / 8);
    return add_16_where(bits, nibbles(load_pairs(bytes), chunk));
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return dot_int16_pairs(a, b, c); }
  static Vec add(Vec a, Vec b) { return add_int32(a, b); }
  static void put_query(const float* int32s, int64_t head_dim, int16_t* words) {
    constexpr int64_t kHalf = kByteDots ? 64 : 2 * kLanes;
    for (int64_t d = 0; d < head_dim; d += 2 * kHalf) {
      for (int64_t i = 0; i < smaller(kHalf, (head_dim - d) / 2); ++i) {
        words[d + i] = int16_t(float_to_bits(int32s[d + 2 * i]));
        words[d + kHalf + i] = int16_t(float_to_bits(int32s[d + 2 * i + 1]));
      }
    }
  }
};

// What `spread` takes kCount of a row's words from as they lie; void: they are converted to floats
// first.
template <typename T, int kCount>
struct SpreadFrom {
  using Type = void;
};
template <int kCount>
struct SpreadFrom<float, kCount> {
  using Type = float;
};
#if defined(__AVX512F__)
template <>
struct SpreadFrom<f16, 4> {
  using Type = f16;
};
template <>
struct SpreadFrom<int8_t, 4> {
  using Type = int8_t;
};
#endif
#if defined(__AVX512BF16__)
template <int kCount>
struct SpreadFrom<bf16, kCount> {
  using Type = float;
};
#endif

template <typename T>
constexpr bool kQuantized = std::is_same_v<T, int8_t> || std::is_same_v<T, Nibbles>;

// The elements that a row's state, and the words of its query, have room for.
inline int64_t padded_dim(DType cache_dtype, int64_t head_dim) {
  const int64_t step = multiplies_pairs(cache_dtype)         ? 2 * kLanes
                       : !kByteDots || is_float(cache_dtype) ? kGroup
                       : cache_dtype == DType::kInt4         ? 128
                                                             : 64;
  return ceil_div(head_dim, step) * step;
}

// `words` has room for padded_dim floats. Words past head_dim are zero.
template <typename T, typename Q>
QueryScale pack_query(const Q* query, int64_t head_dim, float* words) {
  for (int64_t d = 0; d < head_dim; d += kLanes) store(words + d, splat(0.0f));
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t left = head_dim - d;
    Qk<T>::store_query(words, d,
                       left < kLanes ? load_first(query + d, int(left)) : load(query + d));
  }
  return {};
}

// The greatest element becomes `limit`: as great as int32 sums with int8 keys allow, and 256 times
// what fits int8 (bytes.h).
template <typename T, typename Q>
QueryScale pack_quantized_query(const Q* query, int64_t head_dim, float* words, float* floats) {
  const int64_t padded = ceil_div(head_dim, kGroup) * kGroup;
  widen(query, head_dim, floats);
  if (std::is_same_v<T, Nibbles>) rotate(floats, head_dim, kQueryRotation);
  const Range range = range_of(floats, padded);
  const float limit = float(smaller(127 * 256, (int64_t(1) << 24) / head_dim));
  const float greatest = range.greatest(), inverse = greatest > kLeast ? limit / greatest : 0.0f;
  int16_t* out = reinterpret_cast<int16_t*>(words);
  std::memset(words, 0,
              kByteDots ? ceil_div(head_dim, 128) * 128 * sizeof(int16_t) : padded * sizeof(float));
  int64_t sum = 0;
  if (range.finite) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      store(floats + d, float_to_int32(load(floats + d) * splat(inverse)));
    }
    for (int64_t d = 0; d < head_dim; ++d) sum += int32_t(float_to_bits(floats[d]));
    Qk<T>::put_query(floats, head_dim, out);
  }
  return {range.finite ? greatest / limit : NAN, float(sum)};
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
