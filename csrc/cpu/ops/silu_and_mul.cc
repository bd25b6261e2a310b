// silu_and_mul: out = gate * sigmoid(gate) * up            (SwiGLU, arXiv:2002.05202)
// Shapes   gate_up (num_tokens, 2 * hidden_dim): gate, then up; out (num_tokens, hidden_dim)
// Traffic  3 * num_tokens * hidden_dim * itemsize bytes, once each
// Limit    memory
// Tiling   rows in groups of 32 KiB
// Numerics fp32; exp within 2 ulp; one rounding at the end
#include "cpu/runtime/task.h"
#include "cpu/simd/vec.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

template <typename T, typename Out>
void silu_row(const T* gate, const T* up, Out* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (const int rest = int(n - i)) {
    store_first(out + i, silu(load_first(gate + i, rest)) * load_first(up + i, rest), rest);
  }
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p) {
  with_type(p.dtype, [&](auto type) {
    with_type(p.out_dtype, [&](auto out_type) {
      using T = decltype(type);
      using Out = decltype(out_type);
      for_each_row(p.num_tokens, 3 * p.hidden_dim * item_size(p.dtype), [&](int64_t t) {
        const auto* gate = static_cast<const T*>(p.gate_up) + 2 * t * p.hidden_dim;
        silu_row(gate, gate + p.hidden_dim, static_cast<Out*>(p.out) + t * p.hidden_dim,
                 p.hidden_dim);
      });
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
