// A stand-in for CANN's libnnopbase.so and for the libcust_opapi.so that its op build generates.
//
// The same C symbols, called in the same two phases: GetWorkspaceSize checks the tensors against
// the definitions of op_host and runs their tiling; the second call runs the kernel on emulated
// cores. Errors are CANN's numbers; `clrt_emu_last_error` has the reason in words.
#include <cstdlib>
#include <memory>

#include "clrt_add_rms_norm.cpp"
#include "clrt_paged_attention.cpp"
#include "clrt_reshape_and_cache.cpp"
#include "clrt_rms_norm.cpp"
#include "clrt_rope_and_cache.cpp"
#include "clrt_silu_and_mul.cpp"
#include "register/op_def_registry.h"

#define CLRT_EXPORT extern "C" __attribute__((visibility("default")))

struct aclTensor {
  std::vector<int64_t> shape;
  int dtype;
  void* memory;
  int64_t bytes() const {
    int64_t n = dtype == ge::DT_INT64 ? 8 : dtype == ge::DT_FLOAT || dtype == ge::DT_INT32 ? 4 : 2;
    for (const int64_t d : shape) n *= d;
    return n;
  }
};
struct aclIntArray {
  std::vector<int64_t> values;
};

namespace {

constexpr int kInvalidParameter = 161002, kTilingFailed = 561002, kKernelFailed = 507000;

thread_local std::string last_error;
uint32_t num_cores = 40;

int refuse(int code, const std::string& why) {
  last_error = why;
  return code;
}

}  // namespace

// A planned call. `arguments` are the kernel's, in its order: inputs, then outputs; what is both
// comes twice.
struct aclOpExecutor {
  std::string name;
  std::vector<uint8_t*> arguments;
  std::vector<ascend_emu::Region> regions;
  std::vector<aclIntArray> arrays;  // the device's copies of the lengths
  gert::TilingContext context;
};

namespace {

using Executor = std::unique_ptr<aclOpExecutor>;
using Run = void (*)(const std::vector<uint8_t*>&, uint8_t* workspace, uint8_t* tiling);

// Collects what a call was given, in the order of the op's definition.
class Planner {
 public:
  explicit Planner(const char* name) : executor_(new aclOpExecutor) { executor_->name = name; }

  Planner& input(const aclTensor* t) { return tensor(t, false, &executor_->context.inputs); }
  Planner& written(const aclTensor* t) { return tensor(t, true, &executor_->context.inputs); }
  Planner& output(const aclTensor* t) { return tensor(t, true, &outputs_); }
  Planner& array(const aclIntArray* a) {
    if (!a) return fail("an aclIntArray is null");
    executor_->arrays.push_back(*a);
    const int64_t size = int64_t(a->values.size());
    executor_->context.inputs.push_back(
        {{gert::Shape({size})}, {ge::DT_INT64}, executor_->arrays.back().values.data()});
    auto* memory = reinterpret_cast<uint8_t*>(executor_->arrays.back().values.data());
    add(memory, size * 8, false);
    return *this;
  }
  Planner& attribute(double value) {
    executor_->context.attributes.floats.push_back(float(value));
    return *this;
  }

  int plan(uint64_t* workspace, aclOpExecutor** executor) {
    if (!error_.empty()) return refuse(kInvalidParameter, executor_->name + ": " + error_);
    if (const int rc = check_types()) return rc;
    if (const int rc = check_outputs()) return rc;
    gert::TilingContext& context = executor_->context;
    context.platform.num_vector_cores = num_cores;
    if (ops::registry().at(executor_->name).core.tiling(&context) != ge::GRAPH_SUCCESS) {
      return refuse(kTilingFailed, executor_->name + ": the tiling function refuses the shapes");
    }
    *workspace = context.workspace;
    *executor = executor_.release();
    return 0;
  }

 private:
  Planner& fail(const char* why) { return error_ = why, *this; }

  Planner& tensor(const aclTensor* t, bool writable, std::vector<gert::Tensor>* list) {
    if (!t) return fail("an aclTensor is null");
    list->push_back({{gert::Shape(t->shape)}, {ge::DataType(t->dtype)}});
    add(static_cast<uint8_t*>(t->memory), t->bytes(), writable);
    return *this;
  }
  void add(uint8_t* memory, int64_t bytes, bool writable) {
    executor_->arguments.push_back(memory);
    executor_->regions.push_back({memory, bytes, writable});
  }

  // One of the definition's combinations of types must be that of the call.
  int check_types() {
    const ops::OpDef& op = ops::registry().at(executor_->name);
    const auto& inputs = executor_->context.inputs;
    if (inputs.size() != op.inputs.size()) {
      return refuse(kInvalidParameter, executor_->name + ": another number of inputs is defined");
    }
    for (size_t c = 0; c < op.inputs[0].dtypes.size(); ++c) {
      bool fits = true;
      for (size_t i = 0; i < inputs.size(); ++i) {
        fits &= inputs[i].desc.dtype == op.inputs[i].dtypes[c];
      }
      for (size_t i = 0; i < outputs_.size(); ++i) {
        fits &= outputs_[i].desc.dtype == op.outputs[i].dtypes[c];
      }
      if (fits) return 0;
    }
    return refuse(kInvalidParameter, executor_->name + ": no defined combination of dtypes");
  }

  // The outputs have the shapes and types that op_host infers.
  int check_outputs() {
    const ops::OpDef& op = ops::registry().at(executor_->name);
    gert::InferShapeContext shapes;
    gert::InferDataTypeContext types;
    for (const gert::Tensor& t : executor_->context.inputs) {
      shapes.inputs.push_back(t.storage.shape);
      types.inputs.push_back(t.desc.dtype);
    }
    shapes.outputs.resize(outputs_.size());
    types.outputs.resize(outputs_.size());
    op.shape_function(&shapes);
    op.type_function(&types);
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (!(shapes.outputs[i] == outputs_[i].storage.shape)) {
        return refuse(kInvalidParameter, executor_->name + ": " + op.outputs[i].name +
                                             " has not the shape that is inferred");
      }
      if (types.outputs[i] != outputs_[i].desc.dtype) {
        return refuse(kInvalidParameter, executor_->name + ": " + op.outputs[i].name +
                                             " has not the dtype that is inferred");
      }
    }
    return 0;
  }

  Executor executor_;
  std::vector<gert::Tensor> outputs_;
  std::string error_;
};

int execute(void* workspace, uint64_t size, aclOpExecutor* planned, Run run) {
  const Executor executor(planned);
  if (size != executor->context.workspace || (size && !workspace)) {
    return refuse(kInvalidParameter, executor->name + ": not the workspace that was asked for");
  }
  auto* bytes = static_cast<uint8_t*>(workspace);
  auto* tiling = static_cast<uint8_t*>(executor->context.tiling_data.GetData());
  const int64_t used = ascend_emu::kLibraryWorkspace;  // which is not the kernel's
  executor->regions.push_back({bytes + used, int64_t(size) - used, true});
  executor->regions.push_back(
      {tiling, int64_t(executor->context.tiling_data.GetDataSize()), false});
  try {
    ascend_emu::Launcher::run(executor->context.block_dim, executor->regions,
                              [&] { run(executor->arguments, bytes, tiling); });
  } catch (const ascend_emu::Violation& violation) {
    return refuse(kKernelFailed, executor->name + ": " + violation.what());
  }
  return 0;
}

}  // namespace

// ---- libnnopbase.so -------------------------------------------------------------------------

CLRT_EXPORT aclTensor* aclCreateTensor(const int64_t* shape, uint64_t ndim, int dtype,
                                       const int64_t* strides, int64_t offset, int, const int64_t*,
                                       uint64_t, void* memory) {
  int64_t stride = 1;
  for (int64_t i = int64_t(ndim) - 1; i >= 0; --i) {
    if (strides[i] != stride && shape[i] != 1) return nullptr;  // the kernels take contiguous ones
    stride *= shape[i];
  }
  if (offset != 0) return nullptr;
  return new aclTensor{{shape, shape + ndim}, dtype, memory};
}
CLRT_EXPORT int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return 0;
}
CLRT_EXPORT aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{{values, values + size}};
}
CLRT_EXPORT int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return 0;
}
CLRT_EXPORT const char* aclGetRecentErrMsg() { return last_error.c_str(); }

// ---- libcust_opapi.so -----------------------------------------------------------------------

CLRT_EXPORT int aclnnClrtRopeAndCacheGetWorkspaceSize(
    const aclTensor* qkv, const aclTensor* cos, const aclTensor* sin, const aclTensor* positions,
    aclTensor* key_cache, aclTensor* value_cache, const aclTensor* slots, const aclTensor* query,
    uint64_t* size, aclOpExecutor** executor) {
  Planner p("ClrtRopeAndCache");
  p.input(qkv).input(cos).input(sin).input(positions).written(key_cache).written(value_cache);
  p.input(slots).output(query).output(key_cache).output(value_cache);
  return p.plan(size, executor);
}
CLRT_EXPORT int aclnnClrtRopeAndCache(void* workspace, uint64_t size, aclOpExecutor* executor,
                                      void*) {
  return execute(workspace, size, executor, [](const auto& a, uint8_t* w, uint8_t* t) {
    clrt_rope_and_cache(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], w, t);
  });
}

CLRT_EXPORT int aclnnClrtReshapeAndCacheGetWorkspaceSize(
    const aclTensor* key, const aclTensor* value, aclTensor* key_cache, aclTensor* value_cache,
    const aclTensor* slots, uint64_t* size, aclOpExecutor** executor) {
  Planner p("ClrtReshapeAndCache");
  p.input(key).input(value).written(key_cache).written(value_cache).input(slots);
  p.output(key_cache).output(value_cache);
  return p.plan(size, executor);
}
CLRT_EXPORT int aclnnClrtReshapeAndCache(void* workspace, uint64_t size, aclOpExecutor* executor,
                                         void*) {
  return execute(workspace, size, executor, [](const auto& a, uint8_t* w, uint8_t* t) {
    clrt_reshape_and_cache(a[0], a[1], a[2], a[3], a[4], a[5], a[6], w, t);
  });
}

CLRT_EXPORT int aclnnClrtRmsNormGetWorkspaceSize(const aclTensor* x, const aclTensor* weight,
                                                 double eps, const aclTensor* out, uint64_t* size,
                                                 aclOpExecutor** executor) {
  Planner p("ClrtRmsNorm");
  p.input(x).input(weight).attribute(eps).output(out);
  return p.plan(size, executor);
}
CLRT_EXPORT int aclnnClrtRmsNorm(void* workspace, uint64_t size, aclOpExecutor* executor, void*) {
  return execute(workspace, size, executor, [](const auto& a, uint8_t* w, uint8_t* t) {
    clrt_rms_norm(a[0], a[1], a[2], w, t);
  });
}

CLRT_EXPORT int aclnnClrtAddRmsNormGetWorkspaceSize(const aclTensor* x, const aclTensor* residual,
                                                    const aclTensor* weight, double eps,
                                                    const aclTensor* out,
                                                    const aclTensor* residual_out, uint64_t* size,
                                                    aclOpExecutor** executor) {
  Planner p("ClrtAddRmsNorm");
  p.input(x).input(residual).input(weight).attribute(eps).output(out).output(residual_out);
  return p.plan(size, executor);
}
CLRT_EXPORT int aclnnClrtAddRmsNorm(void* workspace, uint64_t size, aclOpExecutor* executor,
                                    void*) {
  return execute(workspace, size, executor, [](const auto& a, uint8_t* w, uint8_t* t) {
    clrt_add_rms_norm(a[0], a[1], a[2], a[3], a[4], w, t);
  });
}

CLRT_EXPORT int aclnnClrtSiluAndMulGetWorkspaceSize(const aclTensor* gate_up, const aclTensor* out,
                                                    uint64_t* size, aclOpExecutor** executor) {
  Planner p("ClrtSiluAndMul");
  p.input(gate_up).output(out);
  return p.plan(size, executor);
}
CLRT_EXPORT int aclnnClrtSiluAndMul(void* workspace, uint64_t size, aclOpExecutor* executor,
                                    void*) {
  return execute(workspace, size, executor, [](const auto& a, uint8_t* w, uint8_t* t) {
    clrt_silu_and_mul(a[0], a[1], w, t);
  });
}

CLRT_EXPORT int aclnnClrtPagedAttentionGetWorkspaceSize(
    const aclTensor* query, const aclTensor* key_cache, const aclTensor* value_cache,
    const aclTensor* block_tables, const aclIntArray* seq_lens, const aclIntArray* cu_seqlens_q,
    double scale, const aclTensor* out, const aclTensor* lse, uint64_t* size,
    aclOpExecutor** executor) {
  Planner p("ClrtPagedAttention");
  p.input(query).input(key_cache).input(value_cache).input(block_tables);
  p.array(seq_lens).array(cu_seqlens_q).attribute(scale).output(out).output(lse);
  return p.plan(size, executor);
}
CLRT_EXPORT int aclnnClrtPagedAttention(void* workspace, uint64_t size, aclOpExecutor* executor,
                                        void*) {
  return execute(workspace, size, executor, [](const auto& a, uint8_t* w, uint8_t* t) {
    clrt_paged_attention(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], w, t);
  });
}

// ---- the emulator's own ---------------------------------------------------------------------

CLRT_EXPORT void clrt_emu_set_cores(uint32_t cores) { num_cores = cores; }
CLRT_EXPORT const char* clrt_emu_last_error() { return last_error.c_str(); }
