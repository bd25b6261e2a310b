// The part of cublasLt.h that large products need. That header comes with 400 MB of library, which
// is looked for at run time only; where it is there, the two are compared.
#pragma once

#include <cstddef>
#include <cstdint>

namespace codellama_rt {
namespace cuda {
namespace cublaslt {

using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;

constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;  // cudaDataType_t
constexpr int kCompute32F = 68;                            // cublasComputeType_t
constexpr int kOpT = 1;                                    // cublasOperation_t
constexpr int kDescTransA = 3;                             // cublasLtMatmulDescAttributes_t
// cublasLtMatmulPreferenceAttributes_t; alignments of A, B, C and D are consecutive
constexpr int kPreferWorkspace = 1, kPreferReduction = 3, kPreferAlignmentA = 5;
constexpr uint32_t kReductionNone = 0;  // cublasLtReductionScheme_t: k is not split

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

// Each returns cublasStatus_t: 0 is success.
struct Functions {
  int (*create)(Handle*);
  int (*descriptor_create)(Descriptor*, int compute, int scale);
  int (*descriptor_set)(Descriptor, int attribute, const void* value, size_t bytes);
  int (*descriptor_destroy)(Descriptor);
  int (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*layout_destroy)(Layout);
  int (*preference_create)(Preference*);
  int (*preference_set)(Preference, int attribute, const void* value, size_t bytes);
  int (*preference_destroy)(Preference);
  int (*choose)(Handle, Descriptor, Layout a, Layout b, Layout c, Layout d, Preference, int most,
                Heuristic*, int* count);
  int (*check)(Handle, Descriptor, Layout a, Layout b, Layout c, Layout d, const Algorithm*,
               Heuristic*);
  int (*matmul)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout,
                const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*,
                void* workspace, size_t workspace_bytes, void* stream);
};

}  // namespace cublaslt
}  // namespace cuda
}  // namespace codellama_rt

#if __has_include(<cublasLt.h>) && !defined(CLRT_EMULATE)
#include <cublasLt.h>

static_assert(codellama_rt::cuda::cublaslt::kReal32F == CUDA_R_32F &&
              codellama_rt::cuda::cublaslt::kReal16F == CUDA_R_16F &&
              codellama_rt::cuda::cublaslt::kReal16BF == CUDA_R_16BF);
static_assert(codellama_rt::cuda::cublaslt::kCompute32F == CUBLAS_COMPUTE_32F &&
              codellama_rt::cuda::cublaslt::kOpT == CUBLAS_OP_T &&
              codellama_rt::cuda::cublaslt::kDescTransA == CUBLASLT_MATMUL_DESC_TRANSA);
static_assert(
    codellama_rt::cuda::cublaslt::kPreferWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
    codellama_rt::cuda::cublaslt::kPreferReduction == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK &&
    codellama_rt::cuda::cublaslt::kPreferAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
    codellama_rt::cuda::cublaslt::kReductionNone == CUBLASLT_REDUCTION_SCHEME_NONE);
static_assert(sizeof(codellama_rt::cuda::cublaslt::Algorithm) == sizeof(cublasLtMatmulAlgo_t) &&
              sizeof(codellama_rt::cuda::cublaslt::Heuristic) ==
                  sizeof(cublasLtMatmulHeuristicResult_t));
#endif
