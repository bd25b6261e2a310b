// What linear does besides for a decoder layer (FusedLinearParams), over weights of any dtype.
#pragma once

#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void silu_and_mul(const SiluAndMulParams& params);

namespace {

// Calls body for at most so many tokens at a time.
template <typename Body>
inline void for_tokens(const FusedLinearParams& all, int64_t tokens, const Body& body) {
  for (int64_t t = 0; t < all.num_tokens; t += tokens) {
    FusedLinearParams p = all;
    p.num_tokens = smaller(tokens, all.num_tokens - t);
    p.x = static_cast<const char*>(p.x) + t * p.x_stride * item_size(p.x_dtype);
    p.out = static_cast<char*>(p.out) + t * p.out_stride * item_size(p.out_dtype);
    if (p.addend) p.addend += t * p.addend_stride;
    body(p);
  }
}

// A gated product in two passes, for rows that are read in their order: this one first, then gate.
inline FusedLinearParams before_gating(const FusedLinearParams& gated) {
  FusedLinearParams p = gated;
  p.gate_up = nullptr;
  p.out = gated.gate_up;
  p.out_stride = p.n[0] + p.n[1];
  p.out_dtype = DType::kFloat32;
  return p;
}
inline void gate(const FusedLinearParams& p) {
  silu_and_mul({p.gate_up, p.out, DType::kFloat32, p.num_tokens, p.n[0], p.out_dtype});
}

// to (n) += from
inline void add(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
