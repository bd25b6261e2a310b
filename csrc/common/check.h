// Checks of an op's arguments, each in one line, with messages that name op, argument, expected,
// got and remedy. Axes are bound by their first use: a later tensor must agree with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/quantized.h"
#include "ops.h"

namespace codellama_rt {

constexpr int kMaxDims = 4;

// Whether indices can be looked at before the kernel runs: those in a device's memory are the
// caller's promise.
#ifdef CLRT_CUDA
constexpr bool kValuesAtHand = false;
#else
constexpr bool kValuesAtHand = true;
#endif

// A tensor of any framework, as an op sees it.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  const char* dtype_text = "";  // the framework's own name, for messages
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  bool writable = true;
  int64_t num_bytes = 0;          // of a quantised tensor
  int64_t piece_strides[2] = {};  // of its first two axes in bytes; 0: all is contiguous
};

// Elements that a tensor may have, a size of 0 counted as 1. No memory holds that many, and
// products of sizes stay within 64 bits, in bytes and rounded up to tiles. (Nothing else bounds a
// shape whose memory says nothing of it: that of a quantised tensor, or of one without elements.)
constexpr int64_t kMaxElements = int64_t{1} << 48;

// Of the shape that is set. Sizes are not checked yet: a product may overflow, and then goes
// unused.
inline void set_contiguous_strides(TensorView& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.strides[i] = stride;
    __builtin_mul_overflow(stride, t.shape[i], &stride);
  }
}

// The product of sizes of several tensors.
inline int64_t checked_product(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (!__builtin_mul_overflow(product, size, &product)) continue;
    throw std::invalid_argument("the sizes of an op's tensors multiply to more than 64 bits hold");
  }
  return product;
}

// A wrong dtype: TypeError in Python. (Wrong values and shapes: std::invalid_argument, ValueError.)
struct __attribute__((visibility("default"))) DtypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Axis {
  const char* name;
  int64_t size = -1;  // -1: not bound yet
};

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // A contiguous tensor of one of the float dtypes (or of `same_as`).
  void floats(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void floats(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
              DType same_as);
  void float32(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void int32(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  // A tensor of a dtype that no other op takes, in its framework's name: "float64".
  void array(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
             const char* dtype, int64_t item_bytes);
  // A weight (out_features, in_features), or a cache (num_blocks, n_kv_heads, block_size,
  // head_dim) of keys or, with `same_as` the keys' dtype, of values: floats, or quantised as
  // quantized.h says. A cache may have strides of its own (CacheStrides in ops.h).
  void weight(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void weight(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
              DType same_as);
  void cache(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void cache(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
             DType same_as);
  // Floats of which what the first axis counts, a row or a token, may lie apart.
  void rows(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void rows(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
            DType same_as);
  void writable(const char* name, const TensorView& t);
  // Every element in [low, high).
  void range(const char* name, const TensorView& t, int64_t low, int64_t high, const char* high_is);
  // 0 = cu[0] <= cu[1] <= ... = total.
  void offsets(const char* name, const TensorView& t, int64_t total, const char* total_is);
  void require(bool condition, const std::string& message);
  void require(bool condition, const char* message) {
    if (!condition) require(false, std::string(message));
  }
  // The message is what `message` returns. It is made if it is needed: it takes as long as an op.
  template <typename Message, typename = decltype(std::declval<const Message&>()())>
  void require(bool condition, const Message& message) {
    if (!condition) require(false, message());
  }

 private:
  enum class Layout { kContiguous, kRowsApart, kRowsAnywhere };
  void tensor(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
              bool dtype_ok, const char* dtype_wanted, Layout layout = Layout::kContiguous);
  void pages(const char* name, const TensorView& t, std::initializer_list<Axis*> axes, bool key);
  void num_bytes(const char* name, const TensorView& t, int64_t expected);
  [[noreturn]] void fail_shape(const char* name, const TensorView& t, const char* dtype_wanted,
                               std::initializer_list<Axis*> axes);

  const char* op_;
};

// What several launchers check alike, and how they read a view's memory.
namespace launch {

inline const int32_t* ints(const TensorView& t) { return static_cast<const int32_t*>(t.data); }
inline float* floats(const TensorView& t) { return static_cast<float*>(t.data); }

inline void check_eps(Check& check, float eps) {
  check.require(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative");
}

inline float usual_scale(int64_t head_dim) { return 1.0f / std::sqrt(float(head_dim)); }

// 0 stands for the usual one.
inline float attention_scale(Check& check, float scale, int64_t head_dim) {
  check.require(std::isfinite(scale) && scale >= 0, "scale must be finite and not negative");
  return scale == 0 ? usual_scale(head_dim) : scale;
}

inline void check_heads(Check& check, int64_t n_heads, int64_t n_kv_heads) {
  check.require(n_kv_heads > 0 && n_heads % n_kv_heads == 0, [&] {
    return "n_heads=" + std::to_string(n_heads) +
           " must be a multiple of n_kv_heads=" + std::to_string(n_kv_heads);
  });
}

inline void check_block_size(Check& check, int64_t block_size) {
  check.require(block_size > 0 && block_size % 16 == 0, [&] {
    return "block_size must be a multiple of 16, got " + std::to_string(block_size);
  });
}

// Of a checked cache.
inline CacheStrides cache_strides(const TensorView& cache, bool key) {
  if (is_float(cache.dtype)) {
    const int64_t item = item_size(cache.dtype);
    const int64_t token = cache.strides[2] * item;
    return {cache.strides[0] * item, cache.strides[1] * item, kCacheGroup * token, token};
  }
  const int64_t group = cache_group_bytes(cache.dtype, cache.shape[3], key);
  if (cache.piece_strides[0] != 0)
    return {cache.piece_strides[0], cache.piece_strides[1], group, 0};
  const int64_t head = cache.shape[2] / kCacheGroup * group;
  return {cache.shape[1] * head, head, group, 0};
}

// The kernel steps through keys and values alike.
inline void check_token_strides(Check& check, const TensorView& key, const TensorView& value,
                                int axis, const char* what) {
  if (key.strides[axis] == value.strides[axis] || key.shape[axis] <= 1) return;
  check.require(false, std::string(what) + " must have the same stride from token to token, got " +
                           std::to_string(key.strides[axis]) + " and " +
                           std::to_string(value.strides[axis]) + " elements");
}

inline void check_even(Check& check, int64_t head_dim) {
  check.require(head_dim > 0 && head_dim % 2 == 0,
                [&] { return "head_dim must be even, got " + std::to_string(head_dim); });
}

// Each sequence's length covers its queries, fits its table, and its pages exist.
inline void check_pages(Check& check, const TensorView& block_tables, const TensorView& seq_lens,
                        const TensorView& cu_seqlens_q, int64_t num_blocks, int64_t block_size) {
  if (!kValuesAtHand) return;
  const int64_t max_blocks = block_tables.shape[1];
  const int64_t capacity = checked_product({max_blocks, block_size});
  for (int64_t s = 0; s < seq_lens.shape[0]; ++s) {
    const int64_t length = ints(seq_lens)[s];
    const int64_t queries = ints(cu_seqlens_q)[s + 1] - ints(cu_seqlens_q)[s];
    if (length < queries || length > capacity) {
      check.require(false,
                    "seq_lens[" + std::to_string(s) + "]=" + std::to_string(length) +
                        " must be at least its queries (" + std::to_string(queries) +
                        ") and at most max_blocks * block_size = " + std::to_string(capacity));
    }
    for (int64_t i = 0; i < (length + block_size - 1) / block_size; ++i) {
      const int64_t block = ints(block_tables)[s * max_blocks + i];
      if (block >= 0 && block < num_blocks) continue;
      check.require(false, "block_tables[" + std::to_string(s) + ", " + std::to_string(i) +
                               "]=" + std::to_string(block) +
                               " must be in [0, num_blocks=" + std::to_string(num_blocks) + ")");
    }
  }
}

}  // namespace launch
}  // namespace codellama_rt
