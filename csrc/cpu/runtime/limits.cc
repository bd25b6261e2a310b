// limits: what the machine gives to any kernel, measured by kernels that do nothing else.
// read_memory    reads every byte once and keeps nothing
// multiply_add   one instruction on registers alone; returns the FLOPs (or integer operations)
// Tiling   reading: pieces of 1 MiB dealt to the threads; arithmetic: one task a thread
// Numerics none: results go to scratch memory so that no compiler may leave the work out
#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kPieceBytes = 1 << 20;
// Measured, two threads: 1 to 8 KiB ahead are alike at 66 to 70 GB/s with AVX-512; without any the
// hardware prefetcher alone gets 66 there, 58 with AVX2 and 50 with the baseline's narrow loads.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kStreams = 4;
// Enough independent chains to hide 4 cycles of latency at 2 a cycle, and no more than registers.
constexpr int kChains = kLanes == 16 ? 24 : 12;

// One step of each instruction: a Vec's chain of sums goes in and comes out. By inline assembly for
// integers: GCC 12 copies and spills intrinsics' chains between integer and float registers, at 0.4
// of this speed. A set that lacks the instruction has no step: it is a null type.
struct Missing {};

struct Fma {
  static constexpr int kFlops = 2;  // a lane
  static Vec step(Vec chain, Vec a, Vec b) { return fma(chain, a, b); }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  static constexpr int kFlops = 4;
  static Vec step(Vec chain, Vec a, Vec b) { return dot_bf16_pairs(a, b, chain); }
};
#else
using DotBf16 = Missing;
#endif

#if defined(__AVX512VNNI__)
struct DotInt16 {
  static constexpr int kFlops = 4;
  static Vec step(Vec chain, Vec a, Vec b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(chain.v) : "v"(a.v), "v"(b.v));
    return chain;
  }
};
struct DotInt8 {
  static constexpr int kFlops = 8;
  static Vec step(Vec chain, Vec a, Vec b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(chain.v) : "v"(a.v), "v"(b.v));
    return chain;
  }
};
#else
using DotInt16 = Missing;
using DotInt8 = Missing;
#endif

#if defined(__AVX2__)
struct MaddInt16 {  // two instructions: what CPUs without VNNI multiply integers with
  static constexpr int kFlops = 4;
  static Vec step(Vec chain, Vec a, Vec) {
    Vec products;
    asm("vpmaddwd %2, %1, %0" : "=v"(products.v) : "v"(chain.v), "v"(a.v));
    asm("vpaddd %1, %0, %0" : "+v"(chain.v) : "v"(products.v));
    return chain;
  }
};
#else
using MaddInt16 = Missing;
#endif

void keep(const Vec* values, int n) {
  auto* out = static_cast<float*>(scratch(Scratch::kTask, n * sizeof(Vec)));
  for (int i = 0; i < n; ++i) store(out + i * kLanes, values[i]);
}

void read_piece(const char* begin, const char* end) {
  constexpr int64_t kStep = kStreams * sizeof(Vec);
  Vec sums[kStreams];
  for (Vec& sum : sums) sum = splat(0.0f);
  for (const char* p = begin; p + kStep <= end; p += kStep) {
    for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(p + kPrefetchBytes + line);
    for (int i = 0; i < kStreams; ++i) {
      sums[i] = sums[i] + load(reinterpret_cast<const float*>(p) + i * kLanes);
    }
  }
  keep(sums, kStreams);
}

template <typename Instruction>
int64_t repeat(Instruction, int64_t num_rounds) {
  const Vec a = splat(num_rounds > 1 ? 0.5f : 0.25f);  // not constants to the compiler
  const Vec b = splat(num_rounds > 1 ? 1.0f : 2.0f);
  const int64_t num_tasks = num_threads();
  for_each_task(num_tasks, [&](int64_t) {
    Vec chains[kChains];
    for (int i = 0; i < kChains; ++i) chains[i] = splat(float(i));  // unlike, or they become one
    for (int64_t round = 0; round < num_rounds; ++round) {
#pragma GCC unroll 24
      for (int i = 0; i < kChains; ++i) chains[i] = Instruction::step(chains[i], a, b);
    }
    keep(chains, kChains);
  });
  return num_tasks * num_rounds * kChains * kLanes * Instruction::kFlops;
}

inline int64_t repeat(Missing, int64_t) { return 0; }

}  // namespace

void read_memory(const void* memory, int64_t bytes) {
  const char* begin = static_cast<const char*>(memory);
  for_each_task(ceil_div(bytes, kPieceBytes), [&](int64_t task) {
    const int64_t end = smaller(bytes, (task + 1) * kPieceBytes);
    read_piece(begin + task * kPieceBytes, begin + end);
  });
}

int64_t multiply_add(Arithmetic arithmetic, int64_t num_rounds) {
  switch (arithmetic) {
    case Arithmetic::kFma:
      return repeat(Fma{}, num_rounds);
    case Arithmetic::kDotBf16:
      return repeat(DotBf16{}, num_rounds);
    case Arithmetic::kMaddInt16:
      return repeat(MaddInt16{}, num_rounds);
    case Arithmetic::kDotInt16:
      return repeat(DotInt16{}, num_rounds);
    case Arithmetic::kDotInt8:
      return repeat(DotInt8{}, num_rounds);
  }
  return 0;
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
