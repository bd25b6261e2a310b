// What every kernel file starts with: element types, 16-byte accesses, the launch.
//
// A kernel takes one struct by value and asks for shared memory at its launch; nothing allocates or
// waits. Everything outside ptx.cuh is plain C++, which tests/emulators/cuda runs on the CPU.
#pragma once

#ifdef CLRT_EMULATE
#include "emu.h"
#else
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <stdexcept>
#include <string>

#include "common/quantized.h"
#include "cuda/runtime/runtime.h"
#include "ops.h"

namespace codellama_rt {
namespace cuda {

#define CLRT_DEVICE __device__ __forceinline__

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Dynamic shared memory, aligned as swizzled copies want it.
CLRT_DEVICE unsigned char* shared_memory() {
#ifdef CLRT_EMULATE
  return emu::block().shared;
#else
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
#endif
}

// --- Elements: stored as f16, bf16 or float, computed as float ------------------------------

CLRT_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
CLRT_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

CLRT_DEVICE float to_float(float x) { return x; }
CLRT_DEVICE float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
template <typename T>
CLRT_DEVICE T from_float(float x);
template <>
CLRT_DEVICE float from_float<float>(float x) {
  return x;
}
#ifdef CLRT_EMULATE
#include "conversions.h"
#else
CLRT_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <>
CLRT_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
CLRT_DEVICE f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#endif

// Two elements of a matrix fragment in a register, the first in the low half.
template <typename T>
CLRT_DEVICE uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// kCount elements that lie together and are aligned together.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T elements[kCount];
};
template <typename T>
constexpr int kVectorOf = 16 / int(sizeof(T));
template <typename T>
using Vector16 = Vector<T, kVectorOf<T>>;

// --- Reductions of fixed shape --------------------------------------------------------------

CLRT_DEVICE float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The sum over a block of kThreads, in every thread; `scratch` holds kThreads / 32 floats.
template <int kThreads>
CLRT_DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
  return total;
}

// --- Host side ------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* memory, size_t bytes) {
  return reinterpret_cast<uintptr_t>(memory) % bytes == 0;
}

[[noreturn]] inline void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string(op) + " on cuda: " + what);
}

template <typename Params>
void launch(const char* op, void (*kernel)(Params), dim3 grid, int num_threads, size_t shared_bytes,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.y > 65535) refuse(op, "too many rows for one launch");
#ifdef CLRT_EMULATE
  (void)op;
  emu::launch([=] { kernel(params); }, grid, num_threads, shared_bytes);
#else
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {  // more than a block gets without asking
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(num_threads),
                             arguments, shared_bytes, static_cast<cudaStream_t>(stream()));
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, once
  throw std::runtime_error(std::string(op) + " on cuda: " + cudaGetErrorString(error));
#endif
}

// Calls body with a value of the storage type of a float dtype: its type is what counts.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(f16{});
    case DType::kBFloat16:
      return body(bf16{});
    default:
      return body(float{});
  }
}

}  // namespace cuda
}  // namespace codellama_rt
