// limits: what the machine gives to any kernel, measured by kernels that do nothing else.
// read_memory    reads every byte once and keeps nothing
// multiply_add   the arithmetic of a dtype on registers alone; returns the FLOPs it did
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

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
inline Vec dot_bf16_pairs(Vec, Vec, Vec c) { return c; }
#endif

#if defined(__AVX512VNNI__)
constexpr bool kHasQuads = true;
// chain + the products of 4 unsigned and 4 signed bytes a lane, as 16 int32 in a Vec's bits. Not
// the intrinsic: GCC 12 copies and spills the chains between integer and float registers, at 0.4 of
// this speed.
inline Vec dot_int8_quads(Vec a, Vec b, Vec chain) {
  asm("vpdpbusd %2, %1, %0" : "+v"(chain.v) : "v"(a.v), "v"(b.v));
  return chain;
}
#else
constexpr bool kHasQuads = false;
inline Vec dot_int8_quads(Vec, Vec, Vec chain) { return chain; }
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

template <typename Step>
void run_chains(int64_t num_rounds, const Step& step) {
  Vec chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = splat(float(i));  // unlike, or they become one
  for (int64_t round = 0; round < num_rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chains[i] = step(chains[i]);
  }
  keep(chains, kChains);
}

}  // namespace

void read_memory(const void* memory, int64_t bytes) {
  const char* begin = static_cast<const char*>(memory);
  for_each_task(ceil_div(bytes, kPieceBytes), [&](int64_t task) {
    const int64_t end = smaller(bytes, (task + 1) * kPieceBytes);
    read_piece(begin + task * kPieceBytes, begin + end);
  });
}

int64_t multiply_add(DType dtype, int64_t num_rounds) {
  const bool pairs = kHasPairs && dtype == DType::kBFloat16;
  const bool quads = kHasQuads && dtype == DType::kInt8;
  const Vec b = splat(num_rounds > 1 ? 0.5f : 0.25f);  // not a constant to the compiler
  const Vec c = splat(num_rounds > 1 ? 1.0f : 2.0f);
  const int64_t num_tasks = num_threads();
  for_each_task(num_tasks, [&](int64_t) {
    if (quads) {
      run_chains(num_rounds, [&](Vec chain) { return dot_int8_quads(b, c, chain); });
    } else if (pairs) {
      run_chains(num_rounds, [&](Vec chain) { return dot_bf16_pairs(b, c, chain); });
    } else {  // a product that depends on the round: it cannot be taken out of the loop
      run_chains(num_rounds, [&](Vec chain) { return fma(chain, b, c); });
    }
  });
  return num_tasks * num_rounds * kChains * kLanes * (quads ? 8 : pairs ? 4 : 2);
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
