// aclnn operators called by name: libraries, tensors, and the two phases. No framework.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "acl_abi.h"

namespace codellama_rt {
namespace ascend {

// The two libraries, opened once. In an emulated build both are the emulator.
class Libraries {
 public:
  static Libraries& instance() {
    static Libraries libraries;
    return libraries;
  }

  void open(const std::string& acl_path, const std::string& ops_path) {
    acl_ = open_one(acl_path);
    ops_ = open_one(ops_path);
    create_tensor = function<CreateTensor>(acl_, "aclCreateTensor");
    destroy_tensor = function<DestroyTensor>(acl_, "aclDestroyTensor");
    create_int_array = function<CreateIntArray>(acl_, "aclCreateIntArray");
    destroy_int_array = function<DestroyIntArray>(acl_, "aclDestroyIntArray");
    // CANN has this one in libascendcl.so; without it an error is its number.
    recent_error = reinterpret_cast<RecentError>(dlsym(acl_, "aclGetRecentErrMsg"));
  }

  template <typename Function>
  Function op(const std::string& name) const {
    if (!ops_) throw std::runtime_error("the Ascend libraries are not loaded");
    return function<Function>(ops_, name);
  }

  void check(int code, const std::string& what) const {
    if (code == 0) return;
    const char* why = recent_error ? recent_error() : "";
    throw std::runtime_error(what + " failed with " + std::to_string(code) +
                             (why && *why ? std::string(": ") + why : std::string()));
  }

  CreateTensor create_tensor = nullptr;
  DestroyTensor destroy_tensor = nullptr;
  CreateIntArray create_int_array = nullptr;
  DestroyIntArray destroy_int_array = nullptr;
  RecentError recent_error = nullptr;

 private:
  static void* open_one(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (!library) throw std::runtime_error(std::string("cannot load ") + dlerror());
    return library;
  }
  template <typename Function>
  static Function function(void* library, const std::string& name) {
    void* symbol = dlsym(library, name.c_str());
    if (!symbol) throw std::runtime_error("the Ascend libraries have no symbol " + name);
    return reinterpret_cast<Function>(symbol);
  }

  void *acl_ = nullptr, *ops_ = nullptr;
};

struct DestroyAclTensor {
  void operator()(aclTensor* t) const { Libraries::instance().destroy_tensor(t); }
};
struct DestroyAclIntArray {
  void operator()(aclIntArray* a) const { Libraries::instance().destroy_int_array(a); }
};
using TensorHandle = std::unique_ptr<aclTensor, DestroyAclTensor>;
using IntArrayHandle = std::unique_ptr<aclIntArray, DestroyAclIntArray>;

inline TensorHandle make_tensor(const std::vector<int64_t>& shape, AclDataType dtype,
                                void* memory) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  TensorHandle t(Libraries::instance().create_tensor(shape.data(), shape.size(), dtype,
                                                     strides.data(), 0, kAclFormatNd, shape.data(),
                                                     shape.size(), memory));
  if (!t) throw std::runtime_error("aclCreateTensor gives no tensor");
  return t;
}
inline IntArrayHandle make_int_array(const std::vector<int64_t>& values) {
  IntArrayHandle a(Libraries::instance().create_int_array(values.data(), values.size()));
  if (!a) throw std::runtime_error("aclCreateIntArray gives no array");
  return a;
}

// One call: plan() with the operator's own arguments, then execute() with the memory it asks for.
class AclnnCall {
 public:
  explicit AclnnCall(std::string name) : name_(std::move(name)) {}

  template <typename... Arguments>
  uint64_t plan(Arguments... arguments) {
    using Plan = int (*)(Arguments..., uint64_t*, aclOpExecutor**);
    const Libraries& libraries = Libraries::instance();
    const std::string symbol = "aclnn" + name_ + "GetWorkspaceSize";
    libraries.check(libraries.op<Plan>(symbol)(arguments..., &size_, &executor_), symbol);
    return size_;
  }
  void execute(void* workspace, void* stream) {
    const Libraries& libraries = Libraries::instance();
    const auto run = libraries.op<Execute>("aclnn" + name_);
    libraries.check(run(workspace, size_, executor_, stream), "aclnn" + name_);
  }

 private:
  std::string name_;
  uint64_t size_ = 0;
  aclOpExecutor* executor_ = nullptr;
};

}  // namespace ascend
}  // namespace codellama_rt
