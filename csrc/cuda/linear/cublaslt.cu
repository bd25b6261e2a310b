// linear, many tokens, by cuBLASLt: out[t, n] = sum_k x[t, k] * weight[n, k], float weights
// Numerics fp32 sums in the order of one algorithm for each (n, k, dtypes), chosen once for
//          kTypicalTokens tokens and never with k split: whatever their number, the same kernel
//          adds up a row. Not the order of linear.cu, which up to 32 tokens still go by
#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "cuda/linear/cublaslt.h"
#include "cuda/linear/cublaslt_abi.h"
#include "cuda/runtime/runtime.h"

namespace codellama_rt {
namespace cuda {
namespace {

using namespace cublaslt;

constexpr int64_t kTypicalTokens = 2048;  // of a prefill step
constexpr uint32_t kAlignment = 16;       // of what linear takes

using Shape = std::tuple<int64_t, int64_t, int, int>;  // n, k, dtypes of x and out

struct Library {
  Functions call;
  Handle handle;
  void* workspace;
  size_t workspace_bytes;
  std::map<Shape, Heuristic> chosen;  // state != 0: there is no algorithm
};
std::mutex mutex;
std::unique_ptr<Library> library;  // null: not in use

template <typename Function>
bool find(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}
bool find_all(void* handle, Functions* f) {
  return find(handle, "cublasLtCreate", &f->create) &&
         find(handle, "cublasLtMatmulDescCreate", &f->descriptor_create) &&
         find(handle, "cublasLtMatmulDescSetAttribute", &f->descriptor_set) &&
         find(handle, "cublasLtMatmulDescDestroy", &f->descriptor_destroy) &&
         find(handle, "cublasLtMatrixLayoutCreate", &f->layout_create) &&
         find(handle, "cublasLtMatrixLayoutDestroy", &f->layout_destroy) &&
         find(handle, "cublasLtMatmulPreferenceCreate", &f->preference_create) &&
         find(handle, "cublasLtMatmulPreferenceSetAttribute", &f->preference_set) &&
         find(handle, "cublasLtMatmulPreferenceDestroy", &f->preference_destroy) &&
         find(handle, "cublasLtMatmulAlgoGetHeuristic", &f->choose) &&
         find(handle, "cublasLtMatmulAlgoCheck", &f->check) &&
         find(handle, "cublasLtMatmul", &f->matmul);
}

void check(int status, const char* what) {
  if (status == 0) return;
  throw std::runtime_error(std::string("linear on cuda: cublasLt") + what + " gave status " +
                           std::to_string(status));
}

int real_type(DType dtype) {
  return dtype == DType::kFloat32 ? kReal32F : dtype == DType::kFloat16 ? kReal16F : kReal16BF;
}

// What is made for one weight's product, and goes with it. To cuBLAS all is column-major:
// out^T (n, tokens) = (weight^T)^T (n, k) x^T (k, tokens).
struct Product {
  Descriptor descriptor = nullptr;
  Layout weight = nullptr, x = nullptr, out = nullptr;

  Product(const LinearParams& p, int i, int64_t num_tokens) {
    const Functions& call = library->call;
    check(call.descriptor_create(&descriptor, kCompute32F, kReal32F), "MatmulDescCreate");
    check(call.descriptor_set(descriptor, kDescTransA, &kOpT, sizeof(kOpT)),
          "MatmulDescSetAttribute");
    const int type = real_type(p.x_dtype);
    check(call.layout_create(&weight, type, p.k, p.n[i], p.k), "MatrixLayoutCreate");
    check(call.layout_create(&x, type, p.k, num_tokens, p.x_stride), "MatrixLayoutCreate");
    check(call.layout_create(&out, real_type(p.out_dtype), p.n[i], num_tokens, p.out_stride),
          "MatrixLayoutCreate");
  }
  Product(const Product&) = delete;
  ~Product() {
    for (Layout layout : {weight, x, out}) {
      if (layout) library->call.layout_destroy(layout);
    }
    if (descriptor) library->call.descriptor_destroy(descriptor);
  }
};

Heuristic choose(const LinearParams& p, int i) {
  const Functions& call = library->call;
  const Product typical(p, i, kTypicalTokens);
  Preference preference = nullptr;
  check(call.preference_create(&preference), "MatmulPreferenceCreate");
  const uint64_t workspace_bytes = library->workspace_bytes;
  int status = call.preference_set(preference, kPreferWorkspace, &workspace_bytes, 8);
  if (status == 0) {
    status = call.preference_set(preference, kPreferReduction, &kReductionNone, 4);
  }
  for (int operand = 0; operand < 4 && status == 0; ++operand) {
    status = call.preference_set(preference, kPreferAlignmentA + operand, &kAlignment, 4);
  }
  Heuristic best{};
  int count = 0;
  if (status == 0) {
    const int asked = call.choose(library->handle, typical.descriptor, typical.weight, typical.x,
                                  typical.out, typical.out, preference, 1, &best, &count);
    if (asked != 0 || count == 0) best.state = 1;
  }
  call.preference_destroy(preference);
  check(status, "MatmulPreferenceSetAttribute");
  return best;
}

// The algorithm for a weight, where there is one that takes this many tokens too.
const Algorithm* algorithm_for(const LinearParams& p, int i, const Product& product) {
  const Shape shape{p.n[i], p.k, int(p.x_dtype), int(p.out_dtype)};
  const auto found = library->chosen.find(shape);
  const Heuristic& chosen = found != library->chosen.end()
                                ? found->second
                                : library->chosen.emplace(shape, choose(p, i)).first->second;
  if (chosen.state != 0) return nullptr;
  Heuristic now{};
  const int status =
      library->call.check(library->handle, product.descriptor, product.weight, product.x,
                          product.out, product.out, &chosen.algorithm, &now);
  const bool fits =
      status == 0 && now.state == 0 && now.workspace_bytes <= library->workspace_bytes;
  return fits ? &chosen.algorithm : nullptr;
}

bool is_aligned(const void* memory) {
  return reinterpret_cast<uintptr_t>(memory) % kAlignment == 0;
}

}  // namespace

std::string use_cublaslt(const std::string& path, void* workspace, size_t workspace_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  void* handle = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"}) {
    if (!handle && path.empty()) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (!handle) return std::string("libcublasLt cannot be loaded: ") + dlerror();
  auto loaded = std::make_unique<Library>();
  if (!find_all(handle, &loaded->call)) return "libcublasLt lacks a function";
  if (loaded->call.create(&loaded->handle) != 0) return "cublasLtCreate failed";
  loaded->workspace = workspace;
  loaded->workspace_bytes = workspace_bytes;
  library = std::move(loaded);
  return "";
}

void leave_cublaslt() {
  const std::lock_guard<std::mutex> lock(mutex);
  library.reset();
}

bool cublaslt_linear(const LinearParams& p) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!library) return false;
  std::array<std::unique_ptr<Product>, kMaxWeights> products;
  std::array<const Algorithm*, kMaxWeights> algorithms{};
  std::array<char*, kMaxWeights> out{};
  auto* next = static_cast<char*>(p.out);
  for (int i = 0; i < p.num_weights; ++i) {  // all of them or none
    products[i] = std::make_unique<Product>(p, i, p.num_tokens);
    algorithms[i] = algorithm_for(p, i, *products[i]);
    out[i] = next;
    next += p.n[i] * item_size(p.out_dtype);
    if (!algorithms[i] || !is_aligned(out[i])) return false;
  }
  const float one = 1, zero = 0;
  for (int i = 0; i < p.num_weights; ++i) {
    const Product& product = *products[i];
    check(library->call.matmul(library->handle, product.descriptor, &one, p.weights[i],
                               product.weight, p.x, product.x, &zero, out[i], product.out, out[i],
                               product.out, algorithms[i], library->workspace,
                               library->workspace_bytes, stream()),
          "Matmul");
  }
  return true;
}

}  // namespace cuda
}  // namespace codellama_rt
