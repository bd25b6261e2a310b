#include "common/check.h"

#include <cstring>

namespace codellama_rt {
namespace {

std::string describe(const TensorView& t) {
  std::string text = std::string(t.dtype_text) + " (";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + ")";
}

std::string describe(const char* dtype, std::initializer_list<Axis*> axes) {
  std::string text = std::string(dtype) + " (";
  const char* separator = "";
  for (const Axis* axis : axes) {
    text += separator + std::string(axis->name);
    if (axis->size >= 0) text += "=" + std::to_string(axis->size);
    separator = ", ";
  }
  return text + ")";
}

bool has_elements(const TensorView& t) {
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return false;
  }
  return true;
}

bool sizes_are_sane(const TensorView& t) {
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) {
    const int64_t size = t.shape[i] == 0 ? 1 : t.shape[i];
    if (size < 0 || __builtin_mul_overflow(elements, size, &elements)) return false;
    if (elements > kMaxElements) return false;
  }
  return true;
}

// A quantised tensor is bytes, of which kernels read larger items wherever they lie.
bool is_aligned(const TensorView& t) {
  if (!is_float(t.dtype) && t.dtype != DType::kInt32) return true;
  return !has_elements(t) || reinterpret_cast<uintptr_t>(t.data) % item_size(t.dtype) == 0;
}

bool is_contiguous(const TensorView& t, bool rows_apart) {
  if (!has_elements(t)) return true;  // nothing is apart from nothing
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (rows_apart && i == 0) return t.shape[0] <= 1 || t.strides[0] >= expected;
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

// Whether rows of the last axis are contiguous, and no two of them overlap: seen from the smallest
// stride to the largest, each axis steps over all that lies inside.
bool rows_are_apart(const TensorView& t) {
  if (is_contiguous(t, false)) return true;  // and so is what has no elements
  int64_t size[kMaxDims], stride[kMaxDims];
  int n = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 1) continue;
    if (i == t.ndim - 1 && t.strides[i] != 1) return false;
    int at = n++;
    for (; at > 0 && stride[at - 1] > t.strides[i]; --at) {
      stride[at] = stride[at - 1];
      size[at] = size[at - 1];
    }
    stride[at] = t.strides[i];
    size[at] = t.shape[i];
  }
  int64_t inside = 1;
  for (int i = 0; i < n; ++i) {
    if (stride[i] < inside || __builtin_mul_overflow(stride[i], size[i], &inside)) return false;
  }
  return true;
}

constexpr const char* kFloatNames = "float32, float16 or bfloat16";
#ifdef CLRT_CUDA
constexpr const char* kCacheNames = "float32, float16, bfloat16, int8 or fp8";
constexpr bool kCachesHaveStrides = false;
constexpr const char* kWeightNames = "float32, float16, bfloat16, int8_mma or int4_mma";
#else
constexpr const char* kCacheNames = "float32, float16, bfloat16, int8 or int4";
constexpr bool kCachesHaveStrides = true;
#define CLRT_FORMAT(format, name, elements, bytes) name ", "
constexpr const char* kWeightNames =
    "float32, float16, bfloat16, int8, int4, " CLRT_GGUF_FORMATS(CLRT_FORMAT) "or one of these "
    "with _tiled";
#undef CLRT_FORMAT
#endif

}  // namespace

void Check::floats(const char* name, const TensorView& t, std::initializer_list<Axis*> axes) {
  tensor(name, t, axes, is_float(t.dtype), kFloatNames);
}

void Check::floats(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                   DType same_as) {
  tensor(name, t, axes, t.dtype == same_as, dtype_name(same_as));
}

void Check::array(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                  const char* dtype, int64_t item_bytes) {
  tensor(name, t, axes, std::strcmp(t.dtype_text, dtype) == 0, dtype);
  require(!has_elements(t) || reinterpret_cast<uintptr_t>(t.data) % item_bytes == 0, [&] {
    return std::string(name) + " must lie at a multiple of " + std::to_string(item_bytes) +
           " bytes in memory; copy it with .copy()";
  });
}

void Check::weight(const char* name, const TensorView& t, std::initializer_list<Axis*> axes) {
  tensor(name, t, axes, is_weight_dtype(t.dtype), kWeightNames);
  if (is_float(t.dtype)) return;
  require(t.piece_strides[0] == 0, [&] {
    return std::string(name) + ": the payload of a Quantized weight must be contiguous";
  });
  const int64_t block = weight_block(t.dtype);
  require(t.shape[1] % block == 0, [&] {
    return std::string(name) + " in " + t.dtype_text + " must have in_features a multiple of " +
           std::to_string(block) + ", got " + std::to_string(t.shape[1]);
  });
  num_bytes(name, t, weight_bytes(t.dtype, t.shape[0], t.shape[1]));
}

void Check::weight(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                   DType same_as) {
  if (t.dtype == same_as) return weight(name, t, axes);
  tensor(name, t, axes, false, dtype_name(same_as));
}

void Check::cache(const char* name, const TensorView& t, std::initializer_list<Axis*> axes) {
  pages(name, t, axes, true);
}

void Check::cache(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                  DType same_as) {
  if (t.dtype == same_as) return pages(name, t, axes, false);
  tensor(name, t, axes, false, dtype_name(same_as));
}

void Check::pages(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                  bool key) {
  tensor(name, t, axes, is_cache_dtype(t.dtype), kCacheNames,
         kCachesHaveStrides ? Layout::kRowsAnywhere : Layout::kContiguous);
  if (is_float(t.dtype)) return;
  require(t.dtype != DType::kInt4 || t.shape[3] % kInt4Step == 0, [&] {
    return std::string(name) + " in int4 must have head_dim a multiple of " +
           std::to_string(kInt4Step) + ", got " + std::to_string(t.shape[3]);
  });
  require(t.shape[2] % kCacheGroup == 0,
          [&] { return "block_size must be a multiple of 16, got " + std::to_string(t.shape[2]); });
  if (t.piece_strides[0] != 0 && has_elements(t)) {
    const int64_t piece = t.shape[2] / kCacheGroup * cache_group_bytes(t.dtype, t.shape[3], key);
    TensorView pieces;  // of `piece` bytes each
    pieces.ndim = 3;
    for (int i = 0; i < 2; ++i) {
      pieces.shape[i] = t.shape[i];
      pieces.strides[i] = t.piece_strides[i];
    }
    pieces.shape[2] = piece;
    pieces.strides[2] = 1;
    require(rows_are_apart(pieces),
            [&] { return std::string(name) + ": blocks or heads overlap"; });
  }
  num_bytes(name, t,
            t.shape[0] * t.shape[1] * (t.shape[2] / kCacheGroup) *
                cache_group_bytes(t.dtype, t.shape[3], key));
}

void Check::num_bytes(const char* name, const TensorView& t, int64_t expected) {
  require(t.num_bytes == expected, [&] {
    return std::string(name) + " " + describe(t) + " must hold " + std::to_string(expected) +
           " bytes, got " + std::to_string(t.num_bytes);
  });
}

void Check::float32(const char* name, const TensorView& t, std::initializer_list<Axis*> axes) {
  tensor(name, t, axes, t.dtype == DType::kFloat32, "float32");
}

void Check::int32(const char* name, const TensorView& t, std::initializer_list<Axis*> axes) {
  tensor(name, t, axes, t.dtype == DType::kInt32, "int32");
}

void Check::rows(const char* name, const TensorView& t, std::initializer_list<Axis*> axes) {
  tensor(name, t, axes, is_float(t.dtype), kFloatNames, Layout::kRowsApart);
}

void Check::rows(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                 DType same_as) {
  tensor(name, t, axes, t.dtype == same_as, dtype_name(same_as), Layout::kRowsApart);
}

void Check::tensor(const char* name, const TensorView& t, std::initializer_list<Axis*> axes,
                   bool dtype_ok, const char* dtype_wanted, Layout layout) {
  if (!dtype_ok) {
    throw DtypeError(std::string(op_) + ": " + name + " must be " + describe(dtype_wanted, axes) +
                     ", got " + describe(t) + "; cast it with .astype");
  }
  if (t.ndim != int(axes.size())) fail_shape(name, t, dtype_wanted, axes);
  require(sizes_are_sane(t), [&] {
    return std::string(name) + " " + describe(t) +
           " has a size below 0, or more than 2^48 elements";
  });
  int i = 0;
  for (const Axis* axis : axes) {
    if (axis->size >= 0 && axis->size != t.shape[i]) fail_shape(name, t, dtype_wanted, axes);
    ++i;
  }
  i = 0;
  for (Axis* axis : axes) axis->size = t.shape[i++];
  require(is_aligned(t), [&] {
    return std::string(name) + " " + describe(t) + " must lie at a multiple of " +
           std::to_string(item_size(t.dtype)) + " bytes in memory; copy it with .copy()";
  });
  if (layout == Layout::kRowsAnywhere ? !is_float(t.dtype) || rows_are_apart(t)
                                      : is_contiguous(t, layout == Layout::kRowsApart)) {
    return;
  }
  throw std::invalid_argument(
      std::string(op_) + ": " + name + " " + describe(t) + " must be contiguous" +
      (layout == Layout::kContiguous
           ? ""
           : " within its rows" +
                 std::string(layout == Layout::kRowsAnywhere ? ", which must not overlap" : "")) +
      "; copy it with numpy.ascontiguousarray");
}

void Check::fail_shape(const char* name, const TensorView& t, const char* dtype_wanted,
                       std::initializer_list<Axis*> axes) {
  throw std::invalid_argument(std::string(op_) + ": " + name + " must be " +
                              describe(dtype_wanted, axes) + ", got " + describe(t));
}

void Check::writable(const char* name, const TensorView& t) {
  require(t.writable,
          [&] { return std::string(name) + " is written in place and must not be read-only"; });
}

void Check::range(const char* name, const TensorView& t, int64_t low, int64_t high,
                  const char* high_is) {
  if (!kValuesAtHand) return;
  const int32_t* values = static_cast<const int32_t*>(t.data);
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] >= low && values[i] < high) continue;
    throw std::invalid_argument(std::string(op_) + ": " + name + "[" + std::to_string(i) +
                                "] must be in [" + std::to_string(low) + ", " + high_is + "=" +
                                std::to_string(high) + "), got " + std::to_string(values[i]));
  }
}

void Check::offsets(const char* name, const TensorView& t, int64_t total, const char* total_is) {
  if (!kValuesAtHand) return;
  const int32_t* values = static_cast<const int32_t*>(t.data);
  const int64_t last = t.shape[0] - 1;
  bool rising = last >= 0 && values[0] == 0 && values[last] == total;
  for (int64_t i = 0; rising && i < last; ++i) rising = values[i] <= values[i + 1];
  require(rising, [&] {
    return std::string(name) + " must rise from 0 to " + total_is + "=" + std::to_string(total);
  });
}

void Check::require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(std::string(op_) + ": " + message);
}

}  // namespace codellama_rt
