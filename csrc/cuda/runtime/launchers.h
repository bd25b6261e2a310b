// The launchers of every op, each in the file of its name. They put work on the stream of
// runtime.h, and throw where they refuse or CUDA does.
#pragma once

#include "ops.h"

namespace codellama_rt {
namespace cuda {

void embedding(const EmbeddingParams&);
void rms_norm(const RmsNormParams&);
void linear(const LinearParams&);
void apply_rotary_pos_emb(const RotaryParams&);
void reshape_and_cache(const ReshapeAndCacheParams&);
void rope_and_cache(const RopeAndCacheParams&);
void paged_attention(const PagedAttentionParams&);
void flash_attention(const FlashAttentionParams&);
void merge_attention(const MergeAttentionParams&);
void silu_and_mul(const SiluAndMulParams&);
void copy_blocks(const CopyBlocksParams&);

}  // namespace cuda
}  // namespace codellama_rt
