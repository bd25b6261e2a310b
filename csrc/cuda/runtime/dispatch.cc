#include "cuda/runtime/dispatch.h"

#include "cuda/runtime/launchers.h"

namespace codellama_rt {

const KernelTable& kernels() {
  static const KernelTable table = [] {
    KernelTable t{};
    t.isa = "cuda";
    t.embedding = cuda::embedding;
    t.rms_norm = cuda::rms_norm;
    t.linear = cuda::linear;
    t.apply_rotary_pos_emb = cuda::apply_rotary_pos_emb;
    t.reshape_and_cache = cuda::reshape_and_cache;
    t.rope_and_cache = cuda::rope_and_cache;
    t.paged_attention = cuda::paged_attention;
    t.flash_attention = cuda::flash_attention;
    t.merge_attention = cuda::merge_attention;
    t.silu_and_mul = cuda::silu_and_mul;
    t.copy_blocks = cuda::copy_blocks;
    return t;
  }();
  return table;
}

}  // namespace codellama_rt
