#include <stdexcept>

#include "cublaslt.h"
#include "runtime.h"

#ifdef CLRT_EMULATE

namespace codellama_rt {
namespace cuda {

std::string use_cublaslt(const std::string&, void*, size_t) { return "not emulated"; }
bool cublaslt_linear(const LinearParams&) { return false; }

}  // namespace cuda
}  // namespace codellama_rt

#else
#include <cuda_runtime.h>
#include <dlfcn.h>

namespace codellama_rt {
namespace cuda {
namespace {

// The part of cublasLt.h that is needed, which has been the same since CUDA 11.
using Handle = void*;
using Descriptor = void*;
using Layout = void*;
constexpr int kCompute32F = 68, kOpT = 1, kTransA = 3;
constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;

struct Library {
  int (*create)(Handle*);
  int (*descriptor_create)(Descriptor*, int compute, int scale);
  int (*descriptor_set)(Descriptor, int attribute, const void* value, size_t bytes);
  int (*descriptor_destroy)(Descriptor);
  int (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*layout_destroy)(Layout);
  int (*matmul)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout,
                const void* beta, const void* c, Layout, void* d, Layout, const void* algorithm,
                void* workspace, size_t workspace_bytes, cudaStream_t);
  Handle handle;
  void* workspace;
  size_t workspace_bytes;
  bool loaded;
};
Library library{};

template <typename Function>
bool find(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

void check(int status, const char* what) {
  if (status == 0) return;
  throw std::runtime_error(std::string("linear on cuda: ") + what + " gave status " +
                           std::to_string(status));
}

int real_type(DType dtype) {
  return dtype == DType::kFloat32 ? kReal32F : dtype == DType::kFloat16 ? kReal16F : kReal16BF;
}

// What is made for one product, and goes with it.
struct Product {
  Descriptor descriptor = nullptr;
  Layout weight = nullptr, x = nullptr, out = nullptr;

  ~Product() {
    for (Layout layout : {weight, x, out}) {
      if (layout) library.layout_destroy(layout);
    }
    if (descriptor) library.descriptor_destroy(descriptor);
  }
};

// Column-major to cuBLAS: out^T (n, tokens) = weight^T^T (n, k) x^T (k, tokens).
void multiply(const LinearParams& p, int i, int64_t first_out) {
  Product product;
  check(library.descriptor_create(&product.descriptor, kCompute32F, kReal32F), "DescCreate");
  check(library.descriptor_set(product.descriptor, kTransA, &kOpT, sizeof(kOpT)), "DescSet");
  const int type = real_type(p.x_dtype);
  check(library.layout_create(&product.weight, type, p.k, p.n[i], p.k), "LayoutCreate");
  check(library.layout_create(&product.x, type, p.k, p.num_tokens, p.x_stride), "LayoutCreate");
  check(library.layout_create(&product.out, real_type(p.out_dtype), p.n[i], p.num_tokens,
                              p.out_stride),
        "LayoutCreate");
  const float one = 1, zero = 0;
  char* out = static_cast<char*>(p.out) + first_out * item_size(p.out_dtype);
  check(library.matmul(library.handle, product.descriptor, &one, p.weights[i], product.weight, p.x,
                       product.x, &zero, out, product.out, out, product.out, nullptr,
                       library.workspace, library.workspace_bytes,
                       static_cast<cudaStream_t>(stream())),
        "Matmul");
}

}  // namespace

std::string use_cublaslt(const std::string& path, void* workspace, size_t workspace_bytes) {
  void* handle = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"}) {
    if (!handle && path.empty()) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (!handle) return std::string("libcublasLt cannot be loaded: ") + dlerror();
  Library l{};
  const bool complete = find(handle, "cublasLtCreate", &l.create) &&
                        find(handle, "cublasLtMatmulDescCreate", &l.descriptor_create) &&
                        find(handle, "cublasLtMatmulDescSetAttribute", &l.descriptor_set) &&
                        find(handle, "cublasLtMatmulDescDestroy", &l.descriptor_destroy) &&
                        find(handle, "cublasLtMatrixLayoutCreate", &l.layout_create) &&
                        find(handle, "cublasLtMatrixLayoutDestroy", &l.layout_destroy) &&
                        find(handle, "cublasLtMatmul", &l.matmul);
  if (!complete) return "libcublasLt lacks a function";
  if (l.create(&l.handle) != 0) return "cublasLtCreate failed";
  l.workspace = workspace;
  l.workspace_bytes = workspace_bytes;
  l.loaded = true;
  library = l;
  return "";
}

bool cublaslt_linear(const LinearParams& p) {
  if (!library.loaded) return false;
  int64_t first_out = 0;
  for (int i = 0; i < p.num_weights; ++i) {
    multiply(p, i, first_out);
    first_out += p.n[i];
  }
  return true;
}

}  // namespace cuda
}  // namespace codellama_rt
#endif
