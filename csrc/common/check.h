// Checks of an op's arguments, each in one line, with messages that name op, argument, expected,
// got and remedy. Axes are bound by their first use: a later tensor must agree with it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/quantized.h"

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
  int64_t num_bytes = 0;  // of a quantised tensor
};

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
  // A weight (out_features, in_features), or a cache (num_blocks, n_kv_heads, block_size,
  // head_dim) of keys or, with `same_as` the keys' dtype, of values: floats, or quantised as
  // quantized.h says.
  void weight(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void weight(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
              DType same_as);
  void cache(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void cache(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
             DType same_as);
  // A float matrix whose rows may lie apart.
  void rows(const char* name, const TensorView& t, std::initializer_list<Axis*> axes);
  void writable(const char* name, const TensorView& t);
  // Every element in [low, high).
  void range(const char* name, const TensorView& t, int64_t low, int64_t high, const char* high_is);
  // 0 = cu[0] <= cu[1] <= ... = total.
  void offsets(const char* name, const TensorView& t, int64_t total, const char* total_is);
  void require(bool condition, const std::string& message);

 private:
  void tensor(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
              bool dtype_ok, const char* dtype_wanted, bool rows_apart);
  void pages(const char* name, const TensorView& t, std::initializer_list<Axis*> axes, bool key);
  void num_bytes(const char* name, const TensorView& t, int64_t expected);
  [[noreturn]] void fail_shape(const char* name, const TensorView& t, const char* dtype_wanted,
                               std::initializer_list<Axis*> axes);

  const char* op_;
};

}  // namespace codellama_rt
