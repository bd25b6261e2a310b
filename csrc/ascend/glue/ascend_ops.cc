// The ops for MindSpore's PyNative mode: tensors, workspace and stream are MindSpore's, the kernels
// are reached through aclnn.h. The only file that includes a header of MindSpore.
//
// MindSpore runs an op in stages on threads of its own: outputs are allocated, `CalcWorkspace`
// plans the call, `LaunchKernel` queues it on the stream. So arguments are kept until then, and an
// error shows when a result is read.
#include <functional>

#include "aclnn.h"
#include "ms_extension/api.h"

namespace codellama_rt {
namespace ascend {
namespace {

using Tensors = std::vector<TensorHandle>;

AclDataType acl_dtype(const ms::Tensor& t) {
  switch (t.data_type()) {
    case ms::TypeId::kNumberTypeFloat32:
      return kAclFloat;
    case ms::TypeId::kNumberTypeFloat16:
      return kAclFloat16;
    case ms::TypeId::kNumberTypeBFloat16:
      return kAclBFloat16;
    case ms::TypeId::kNumberTypeInt32:
      return kAclInt32;
    default:
      throw std::runtime_error("an Ascend op takes float32, float16, bfloat16 and int32 tensors");
  }
}

TensorHandle to_acl(const ms::Tensor& t) {
  const auto shape = t.shape();
  return make_tensor({shape.begin(), shape.end()}, acl_dtype(t), t.GetDataPtr());
}

// `plan` gets all tensors, inputs first, and calls the first phase with them in its order.
class Runner : public ms::pynative::PyboostRunner {
 public:
  using Plan = std::function<uint64_t(AclnnCall*, const Tensors&)>;

  Runner(const std::string& name, Plan plan)
      : PyboostRunner(name), call_(name), plan_(std::move(plan)) {}

  size_t CalcWorkspace() override {
    tensors_.clear();
    for (const ms::Tensor& t : inputs()) tensors_.push_back(to_acl(t));
    for (const ms::Tensor& t : outputs()) tensors_.push_back(to_acl(t));
    return plan_(&call_, tensors_);
  }
  void LaunchKernel() override {
    call_.execute(workspace_ptr(), stream());
    tensors_.clear();
  }

 protected:
  // On an NPU every kernel is launched by one queue. On a CPU MindSpore's own run a stage earlier,
  // and would overtake ours in that queue: the emulator's run with them.
  void _DispatchLaunchTask() override {
    if (CLRT_ASCEND_EMULATED) {
      LaunchKernel();
    } else {
      PyboostRunner::_DispatchLaunchTask();
    }
  }

 private:
  AclnnCall call_;
  Plan plan_;
  Tensors tensors_;
};

void run(const char* name, const std::vector<ms::Tensor>& inputs,
         const std::vector<ms::Tensor>& outputs, Runner::Plan plan) {
  std::make_shared<Runner>(name, std::move(plan))->Run(inputs, outputs);
}

ms::Tensor like(const ms::Tensor& t) { return ms::Tensor(t.data_type(), t.shape()); }

ms::Tensor rms_norm(const ms::Tensor& x, const ms::Tensor& weight, double eps) {
  const ms::Tensor out = like(x);
  run("ClrtRmsNorm", {x, weight}, {out}, [eps](AclnnCall* call, const Tensors& t) {
    return call->plan(t[0].get(), t[1].get(), eps, t[2].get());
  });
  return out;
}

std::vector<ms::Tensor> add_rms_norm(const ms::Tensor& x, const ms::Tensor& residual,
                                     const ms::Tensor& weight, double eps) {
  const ms::Tensor out = like(x), total = like(x);
  run("ClrtAddRmsNorm", {x, residual, weight}, {out, total},
      [eps](AclnnCall* call, const Tensors& t) {
        return call->plan(t[0].get(), t[1].get(), t[2].get(), eps, t[3].get(), t[4].get());
      });
  return {out, total};
}

ms::Tensor silu_and_mul(const ms::Tensor& gate_up) {
  const ms::Tensor out(gate_up.data_type(), {gate_up.shape()[0], gate_up.shape()[1] / 2});
  run("ClrtSiluAndMul", {gate_up}, {out},
      [](AclnnCall* call, const Tensors& t) { return call->plan(t[0].get(), t[1].get()); });
  return out;
}

void reshape_and_cache(const ms::Tensor& key, const ms::Tensor& value, const ms::Tensor& key_cache,
                       const ms::Tensor& value_cache, const ms::Tensor& slots) {
  run("ClrtReshapeAndCache", {key, value, key_cache, value_cache, slots}, {},
      [](AclnnCall* call, const Tensors& t) {
        return call->plan(t[0].get(), t[1].get(), t[2].get(), t[3].get(), t[4].get());
      });
}

ms::Tensor rope_and_cache(const ms::Tensor& qkv, const ms::Tensor& cos, const ms::Tensor& sin,
                          const ms::Tensor& positions, const ms::Tensor& key_cache,
                          const ms::Tensor& value_cache, const ms::Tensor& slots) {
  const int64_t n_kv_heads = key_cache.shape()[1], head_dim = key_cache.shape()[3];
  const int64_t n_heads = qkv.shape()[1] / head_dim - 2 * n_kv_heads;
  const ms::Tensor query(qkv.data_type(), {qkv.shape()[0], n_heads, head_dim});
  run("ClrtRopeAndCache", {qkv, cos, sin, positions, key_cache, value_cache, slots}, {query},
      [](AclnnCall* call, const Tensors& t) {
        return call->plan(t[0].get(), t[1].get(), t[2].get(), t[3].get(), t[4].get(), t[5].get(),
                          t[6].get(), t[7].get());
      });
  return query;
}

std::vector<ms::Tensor> paged_attention(const ms::Tensor& query, const ms::Tensor& key_cache,
                                        const ms::Tensor& value_cache,
                                        const ms::Tensor& block_tables,
                                        const std::vector<int64_t>& seq_lens,
                                        const std::vector<int64_t>& cu_seqlens_q, double scale) {
  const ms::Tensor out = like(query);
  const ms::Tensor lse(ms::TypeId::kNumberTypeFloat32, {query.shape()[0], query.shape()[1]});
  run("ClrtPagedAttention", {query, key_cache, value_cache, block_tables}, {out, lse},
      [=](AclnnCall* call, const Tensors& t) {
        const IntArrayHandle lens = make_int_array(seq_lens), ends = make_int_array(cu_seqlens_q);
        return call->plan(t[0].get(), t[1].get(), t[2].get(), t[3].get(), lens.get(), ends.get(),
                          scale, t[4].get(), t[5].get());
      });
  return {out, lse};
}

}  // namespace
}  // namespace ascend
}  // namespace codellama_rt

PYBIND11_MODULE(MS_EXTENSION_NAME, m) {
  using namespace codellama_rt::ascend;
  using T = const ms::Tensor&;
  using Runner = ms::pynative::PyboostRunner;
  using Integers = const std::vector<int64_t>&;
  m.doc() = "The Ascend kernels on MindSpore tensors; codellama_rt.ops.ascend is the surface.";
  m.attr("emulated") = bool(CLRT_ASCEND_EMULATED);
  m.def("open", [](const std::string& acl, const std::string& ops) {
    Libraries::instance().open(acl, ops);
  });
  m.def("rms_norm",
        [](T x, T weight, double eps) { return Runner::Call<1>(rms_norm, x, weight, eps); });
  m.def("add_rms_norm", [](T x, T residual, T weight, double eps) {
    return Runner::Call<2>(add_rms_norm, x, residual, weight, eps);
  });
  m.def("silu_and_mul", [](T gate_up) { return Runner::Call<1>(silu_and_mul, gate_up); });
  m.def("reshape_and_cache", [](T key, T value, T key_cache, T value_cache, T slots) {
    return Runner::Call<0>(reshape_and_cache, key, value, key_cache, value_cache, slots);
  });
  m.def("rope_and_cache", [](T qkv, T cos, T sin, T positions, T key_cache, T value_cache,
                             T slots) {
    return Runner::Call<1>(rope_and_cache, qkv, cos, sin, positions, key_cache, value_cache, slots);
  });
  m.def("paged_attention", [](T query, T key_cache, T value_cache, T block_tables,
                              Integers seq_lens, Integers cu_seqlens_q, double scale) {
    return Runner::Call<2>(paged_attention, query, key_cache, value_cache, block_tables, seq_lens,
                           cu_seqlens_q, scale);
  });
}
