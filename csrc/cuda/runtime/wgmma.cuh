// Hopper's matrix products of a warpgroup: the first operand in registers, as mma's (warp w holds
// rows 16 w to 16 w + 15), the second in shared memory behind a descriptor.
#pragma once

#include "cuda/runtime/ptx.cuh"

#ifdef CLRT_EMULATE
#include "wgmma.h"
#else

namespace codellama_rt {
namespace cuda {
namespace ptx {

// A swizzled operand (128 bytes) from `memory` on: bits 0-13 the address, 16-29 the leading, 32-45
// the stride byte offset, all in units of 16; 62-63 the swizzle. Along k (keys of a tile for q .
// k): 8 rows are `stride` apart. Across k (values): 64 columns are `leading` apart, 8 rows
// `stride`.
CLRT_DEVICE uint64_t descriptor(const void* memory, int leading, int stride) {
  const uint64_t address = shared_address(memory) >> 4 & 0x3fff;
  return address | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// Before the first product after registers it reads or writes were touched.
CLRT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Until all products of this warpgroup are done.
CLRT_DEVICE void wgmma_finish() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Registers that products read or write while other instructions run: what the program does to them
// before stays before, and what after, after. The compiler sees no tie to the fence or the wait.
template <typename T, int kCount>
CLRT_DEVICE void hold(T (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (std::is_same_v<T, float>) {
        asm volatile("" : "+f"(registers[i][j])::"memory");
      } else {
        asm volatile("" : "+r"(registers[i][j])::"memory");
      }
    }
  }
}

template <int kRegisters>
CLRT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
CLRT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers 1 to 15 of a block, among `num_threads` threads: those that wait and those that only
// arrive.
CLRT_DEVICE void named_wait(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
CLRT_DEVICE void named_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// c (64 x 64) = a (64 x 16) * b (+ c where `add`); b (16 x 64) along k.
template <typename T>
CLRT_DEVICE void wgmma_64(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add);
// c (64 x 128) = a (64 x 16) * b (+ c where `add`); b (16 x 128) across k.
template <typename T>
CLRT_DEVICE void wgmma_128(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add);

// Of each type, by its name in PTX; registers of a fragment, of 8 fragments.
#define CLRT_C(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define CLRT_8C(i)                                                                      \
  CLRT_C(i), CLRT_C(i + 1), CLRT_C(i + 2), CLRT_C(i + 3), CLRT_C(i + 4), CLRT_C(i + 5), \
      CLRT_C(i + 6), CLRT_C(i + 7)
#define CLRT_A_AND_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add))
#define CLRT_0_TO_31                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17," \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CLRT_32_TO_63                                                           \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CLRT_PRODUCTS(T, type)                                                                     \
  template <>                                                                                      \
  CLRT_DEVICE void wgmma_64<T>(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {   \
    asm volatile(                                                                                  \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" CLRT_0_TO_31              \
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"                                           \
        : CLRT_8C(0)                                                                               \
        : CLRT_A_AND_B);                                                                           \
  }                                                                                                \
  template <>                                                                                      \
  CLRT_DEVICE void wgmma_128<T>(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) { \
    asm volatile(                                                                                  \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" CLRT_0_TO_31             \
        ", " CLRT_32_TO_63 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"                        \
        : CLRT_8C(0), CLRT_8C(8)                                                                   \
        : CLRT_A_AND_B);                                                                           \
  }
CLRT_PRODUCTS(bf16, "bf16")
CLRT_PRODUCTS(f16, "f16")

}  // namespace ptx
}  // namespace cuda
}  // namespace codellama_rt
#endif  // CLRT_EMULATE
