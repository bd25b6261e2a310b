// Graph ops: each op of ops.def as symbols of MindSpore's AOT ABI, for mindspore.ops.Custom.
//
// `clrt_name` runs the op on inputs and outputs; `clrt_nameInferShape` gives the shapes of its
// outputs, where -1 stands for a size not known yet; `clrt_nameInit` reads its attributes, once per
// kernel, possibly with sizes unknown. Parameters are in the order of codellama_rt/ops/schema.py,
// inputs before outputs. No symbol of MindSpore is used. An exception goes through to MindSpore,
// which makes a RuntimeError with its text of it (a return value other than 0 would be shown as a
// bare number).
#include <cstring>
#include <sstream>
#include <string>
#include <tuple>

#include "common/launch.h"
#ifdef CLRT_CUDA
#include "cuda/runtime/runtime.h"
#else
#include "cpu/ops/decoder_layer.h"
#endif
#include "bind/ms_aot_extra.h"

namespace codellama_rt {
namespace {

using Shape = std::vector<int64_t>;
using Shapes = std::vector<Shape>;

constexpr int kMaxInputs = 19;
#ifdef CLRT_CUDA
constexpr size_t kAttentionBytes = 64 << 20;  // partial results of 9 x 100,000 tokens, 32 heads
#else
constexpr size_t kAttentionBytes = 0;
#endif

// What the bytes of an input stand for. The attribute `formats`, written by ops/primitives.py, has
// an entry for each of the first inputs, a ';' after it: "dtype row_bytes axis axis ...", empty for
// floats. Of a cache the number and the size of pages, axes 0 and 2, are -1: they follow from its
// payload (num_blocks, n_kv_heads, block_size * row_bytes).
struct Format {
  DType dtype = DType::kOther;  // not quantised
  int ndim = 0;
  int64_t row_bytes = 0;
  int64_t shape[kMaxDims] = {};

  static Format of(AotExtra* extra, int input) {
    Format format;
    std::istringstream entries(extra->get("formats"));
    std::string entry, name;
    for (int i = 0; i <= input; ++i) {
      if (!std::getline(entries, entry, ';')) return format;
    }
    std::istringstream text(entry);
    if (!(text >> name >> format.row_bytes)) return format;
    format.dtype = quantized_dtype(name.c_str());
    while (format.ndim < kMaxDims && text >> format.shape[format.ndim]) ++format.ndim;
    return format;
  }
  // Of an axis; `payload(axis)` gives the payload's, or -1 while that is not known.
  template <typename Payload>
  int64_t size(int axis, const Payload& payload) const {
    if (axis >= ndim || shape[axis] >= 0) return axis < ndim ? shape[axis] : 1;
    const int64_t size = payload(axis);
    return axis == 0 || size < 0 || row_bytes <= 0 ? size : size / row_bytes;
  }
};

struct Attributes : AotKernelData {
  float eps = 1e-5f, scale = 0;
  bool interleaved = false, causal = true;
  Format formats[kMaxInputs];
};

// The tensors of one call.
struct Call {
  const char* name;
  int count;  // inputs and outputs; a workspace that was asked for comes behind them, as data alone
  void** data;
  int* ndims;
  int64_t** shapes;
  const char** dtypes;
  AotExtra* extra;

  const Attributes& attributes() const {
    static const auto* usual = new Attributes;  // of a caller that is not MindSpore
    return extra ? *static_cast<const Attributes*>(extra->kernel_data()) : *usual;
  }

  TensorView operator[](int i) const {
    TensorView t = plain(i);
    if (i >= kMaxInputs || attributes().formats[i].dtype == DType::kOther) return t;
    const Format& format = attributes().formats[i];
    const TensorView payload = t;
    t.num_bytes = 1;
    for (int axis = 0; axis < payload.ndim; ++axis) t.num_bytes *= payload.shape[axis];
    t.dtype = format.dtype;
    t.dtype_text = dtype_name(format.dtype);
    t.ndim = format.ndim;
    for (int axis = 0; axis < t.ndim; ++axis) {
      t.shape[axis] = format.size(
          axis, [&](int a) { return a < payload.ndim ? payload.shape[a] : int64_t{0}; });
    }
    set_contiguous_strides(t);
    return t;
  }

 private:
  TensorView plain(int i) const {
    if (ndims[i] > kMaxDims) {
      throw std::invalid_argument(std::string(name) + ": tensor " + std::to_string(i) + " has " +
                                  std::to_string(ndims[i]) + " dimensions, an op takes at most 4");
    }
    TensorView t;
    t.data = data[i];
    t.dtype_text = dtypes[i];
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32}) {
      if (std::strcmp(dtypes[i], dtype_name(dtype)) == 0) t.dtype = dtype;
    }
    t.ndim = ndims[i];
    for (int axis = 0; axis < t.ndim; ++axis) t.shape[axis] = shapes[i][axis];
    set_contiguous_strides(t);
    return t;
  }
};

// The shapes of the inputs, with -1 for a size not known yet. An axis that isn't there counts as 1:
// the launcher, which sees it as well, has the better message.
struct Inputs {
  static constexpr int64_t kUnknownRank = -2;  // as the only size

  int* ndims;
  int64_t** shapes;
  AotExtra* extra;

  int64_t size(int input, int axis) const {
    const Format format = Format::of(extra, input);
    if (format.dtype == DType::kOther) return plain_size(input, axis);
    return format.size(axis, [&](int a) { return plain_size(input, a); });
  }
  Shape shape(int input, int ndim) const {
    Shape sizes(ndim);
    for (int axis = 0; axis < ndim; ++axis) sizes[axis] = size(input, axis);
    return sizes;
  }

 private:
  int64_t plain_size(int input, int axis) const {
    const bool rank_known = ndims[input] == 0 || shapes[input][0] != kUnknownRank;
    if (axis >= ndims[input] || !rank_known) return rank_known ? 1 : -1;
    return shapes[input][axis] >= 0 ? shapes[input][axis] : -1;
  }
};

// A graph drops an op without outputs: those that only write return a token, to be depended upon.
const Shape kToken = {1};
#ifdef CLRT_CUDA
void put_token(const TensorView& token) { cuda::fill_async(token.data, 0, sizeof(int32_t)); }
#else
void put_token(const TensorView& token) { *static_cast<int32_t*>(token.data) = 0; }
#endif

// ---- what the tensors of a call are to an op ---------------------------------------------------

// Hands a launcher its arguments in order: inputs, attributes, results, the token last.
class Arguments {
 public:
  Arguments(const Call& call, float number, bool flag)
      : call_(call), number_(number), flag_(flag) {}

  template <typename... T>
  void pass_to(void (*launch)(T...)) {
    const std::tuple<T...> arguments{next(static_cast<T*>(nullptr))...};
    std::apply(launch, arguments);
    if (next_ < call_.count) put_token(call_[next_]);
  }

 private:
  TensorView next(TensorView*) { return call_[next_++]; }
  Weights next(Weights*) {  // all but the input before them and the result behind
    Weights weights;
    for (; next_ < call_.count - 1; ++next_) weights.add(call_[next_]);
    return weights;
  }
  float next(float*) const { return number_; }
  bool next(bool*) const { return flag_; }

  const Call& call_;
  float number_;
  bool flag_;
  int next_ = 0;
};

// ---- the ops -----------------------------------------------------------------------------------

namespace tag {
#define CLRT_OP(name, Params, signature) struct name;
#define CLRT_COMPOSED_OP(name, signature) struct name;
#include "ops.def"
}  // namespace tag

// The usual op: one result of the first input's shape (rows, columns); its number is eps.
struct Usual {
  static constexpr size_t kWorkspaceBytes = 0;
  static constexpr float Attributes::* kNumber = &Attributes::eps;
  static constexpr bool Attributes::* kFlag = &Attributes::interleaved;
  static Shape infer(const Inputs& in) { return in.shape(0, 2); }
};

// Specialised by the ops that differ.
template <typename Tag>
struct Op : Usual {};

template <>
struct Op<tag::embedding> : Usual {
  static Shape infer(const Inputs& in) { return {in.size(0, 0), in.size(1, 1)}; }
};

template <>
struct Op<tag::add_rms_norm> : Usual {
  static Shapes infer(const Inputs& in) { return {in.shape(0, 2), in.shape(0, 2)}; }
};

template <>
struct Op<tag::linear> : Usual {
  static Shape infer(const Inputs& in) {  // the ABI does not say how many inputs there are
    const int64_t num_weights = in.extra->get("num_weights", int64_t{1});
    int64_t out_features = 0;
    for (int i = 1; i <= num_weights; ++i) {
      const int64_t rows = in.size(i, 0);
      out_features = rows < 0 || out_features < 0 ? -1 : out_features + rows;
    }
    return {in.size(0, 0), out_features};
  }
};

struct InPlace : Usual {
  static Shape infer(const Inputs&) { return kToken; }
};
template <>
struct Op<tag::apply_rotary_pos_emb> : InPlace {};
template <>
struct Op<tag::reshape_and_cache> : InPlace {};
template <>
struct Op<tag::copy_blocks> : InPlace {};

template <>
struct Op<tag::rope_and_cache> : Usual {
  static Shape infer(const Inputs& in) {
    const int64_t qkv_dim = in.size(0, 1), kv_heads = in.size(4, 1), head_dim = in.size(4, 3);
    const bool known = qkv_dim >= 0 && kv_heads >= 0 && head_dim > 0;
    const int64_t heads = known ? qkv_dim / head_dim - 2 * kv_heads : -1;
    return {in.size(0, 0), known && heads < 0 ? 0 : heads, head_dim};  // 0: refused when it runs
  }
};

struct WithLse : Usual {  // out and the log-sum-exps
  static constexpr float Attributes::* kNumber = &Attributes::scale;
  static constexpr bool Attributes::* kFlag = &Attributes::causal;
  static Shapes infer(const Inputs& in) { return {in.shape(0, 3), in.shape(0, 2)}; }
};
template <>
struct Op<tag::merge_attention> : WithLse {};
struct Attending : WithLse {
  static constexpr size_t kWorkspaceBytes = kAttentionBytes;
};
template <>
struct Op<tag::flash_attention> : Attending {};
template <>
struct Op<tag::paged_attention> : Attending {};

template <>
struct Op<tag::silu_and_mul> : Usual {
  static Shape infer(const Inputs& in) {
    const int64_t both = in.size(0, 1);
    return {in.size(0, 0), both < 0 ? -1 : both / 2};
  }
};

template <typename Tag, typename... T>
void run(const Call& c, void (*launch)(T...)) {
  const Attributes& attributes = c.attributes();
  Arguments(c, attributes.*Op<Tag>::kNumber, attributes.*Op<Tag>::kFlag).pass_to(launch);
}

#ifndef CLRT_CUDA
template <typename Tag>
void run(const Call& c, void (*launch)(const DecoderLayer&)) {
  launch({c[0],
          c[1],
          c[2],
          c[3],
          c[4],
          c[5],
          c[6],
          c[7],
          c[8],
          c[9],
          c[10],
          c[11],
          c[12],
          c[13],
          c[14],
          c[15],
          c[16],
          c[17],
          c[18],
          c[19],
          c.attributes().eps,
          c.attributes().interleaved});
}
#endif

template <typename Tag>
int read_attributes(AotExtra* extra) {
  constexpr size_t kBytes = Op<Tag>::kWorkspaceBytes;
  if (kBytes > 0) extra->set_workspace({kBytes});
  auto* attributes = new Attributes;
  attributes->eps = extra->get("eps", attributes->eps);
  attributes->scale = extra->get("scale", attributes->scale);
  attributes->interleaved = extra->get("interleaved", attributes->interleaved);
  attributes->causal = extra->get("causal", attributes->causal);
  for (int i = 0; i < kMaxInputs; ++i) attributes->formats[i] = Format::of(extra, i);
  extra->set_kernel_data(attributes);
  return 0;
}

// The op itself. On cuda it goes to the stream that comes with the call; and a caller that is not
// MindSpore gets 1 for a refusal, 2 for what CUDA says, and the text from clrt_cuda_last_error.
#ifdef CLRT_CUDA
thread_local std::string last_error;

// A workspace that was asked for, behind the outputs, is lent to one call.
class LentWorkspace {
 public:
  explicit LentWorkspace(Call& call) {
    if (!call.extra || call.extra->workspace().empty()) return;
    --call.count;
    cuda::lend_workspace(call.data[call.count], call.extra->workspace()[0]);
  }
  ~LentWorkspace() { cuda::lend_workspace(nullptr, 0); }
};

template <typename Tag, typename Launch>
int run_op(Call call, void* stream, Launch* launch) {
  try {
    cuda::set_stream(stream);
    const LentWorkspace lent(call);
    run<Tag>(call, launch);
    return 0;
  } catch (const std::exception& error) {
    if (call.extra) throw;
    last_error = error.what();
    return dynamic_cast<const std::invalid_argument*>(&error) ||
                   dynamic_cast<const DtypeError*>(&error)
               ? 1
               : 2;
  }
}
#else
template <typename Tag, typename Launch>
int run_op(const Call& call, void*, Launch* launch) {
  run<Tag>(call, launch);
  return 0;
}
#endif

}  // namespace

// dlsym wants plain names, which no template can have.
#define CLRT_EXPORT extern "C" __attribute__((visibility("default")))
#define CLRT_AOT(name)                                                                      \
  CLRT_EXPORT int clrt_##name(int count, void** data, int* ndims, int64_t** shapes,         \
                              const char** dtypes, void* stream, void* extra) {             \
    return run_op<tag::name>(                                                               \
        {#name, count, data, ndims, shapes, dtypes, static_cast<AotExtra*>(extra)}, stream, \
        launch::name);                                                                      \
  }                                                                                         \
  CLRT_EXPORT int clrt_##name##Init(int*, int64_t**, const char**, AotExtra* extra) {       \
    return read_attributes<tag::name>(extra);                                               \
  }                                                                                         \
  CLRT_EXPORT auto clrt_##name##InferShape(int* ndims, int64_t** shapes, AotExtra* extra) { \
    return Op<tag::name>::infer({ndims, shapes, extra});                                    \
  }
#define CLRT_OP(name, Params, signature) CLRT_AOT(name)
#define CLRT_COMPOSED_OP(name, signature) CLRT_AOT(name)
#include "ops.def"

#ifdef CLRT_CUDA
CLRT_EXPORT const char* clrt_cuda_last_error() { return last_error.c_str(); }
CLRT_EXPORT void clrt_cuda_set_workspace(void* memory, int64_t bytes) {
  cuda::set_workspace(memory, size_t(bytes));
}
#endif

}  // namespace codellama_rt
