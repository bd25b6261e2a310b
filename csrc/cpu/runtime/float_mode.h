// The floating-point mode that kernels run in, whatever their caller's.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace codellama_rt {

// Kernels run in the floating-point mode of C: rounding to nearest, subnormal numbers kept. A
// caller may have another: frameworks set flush-to-zero in their threads, threads inherit it from
// the one that starts them, and a weight's subnormal float16 would then count as 0 in some of a
// result's rows. Reading the mode takes a few cycles; it is written only where it differs.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : found_(_mm_getcsr()) {
    if ((found_ & kMode) != kDefault) _mm_setcsr((found_ & ~kMode) | kDefault);
  }
  ~DefaultFloatMode() {
    if ((found_ & kMode) != kDefault) _mm_setcsr(found_);
  }

 private:
  static constexpr unsigned kMode = 0xFFC0;  // flush-to-zero, rounding, masks, subnormals-are-zero
  static constexpr unsigned kDefault = 0x1F80;  // exceptions masked, nothing else
  unsigned found_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(found_));
    if (found_ != 0) write(0);
  }
  ~DefaultFloatMode() {
    if (found_ != 0) write(found_);
  }

 private:
  static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
  uint64_t found_;
#endif
};

}  // namespace codellama_rt
