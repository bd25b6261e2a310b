// The entry points of one instruction set, gathered; compiled once an instruction set.
#include "ops.h"

#define CLRT_STRING_(x) #x
#define CLRT_STRING(x) CLRT_STRING_(x)

namespace codellama_rt {
namespace CLRT_ISA {

void embedding(const EmbeddingParams&);
void rms_norm(const RmsNormParams&);
void linear(const LinearParams&);
void quantize(const QuantizeParams&);
void apply_rotary_pos_emb(const RotaryParams&);
void reshape_and_cache(const ReshapeAndCacheParams&);
void rope_and_cache(const RopeAndCacheParams&);
void paged_attention(const PagedAttentionParams&);
void flash_attention(const FlashAttentionParams&);
void merge_attention(const MergeAttentionParams&);
void silu_and_mul(const SiluAndMulParams&);
void copy_blocks(const CopyBlocksParams&);
void read_memory(const void* memory, int64_t bytes);
int64_t multiply_add(DType dtype, int64_t num_rounds);

extern const KernelTable table;
const KernelTable table = {
    CLRT_STRING(CLRT_ISA), embedding,         rms_norm,       linear,          quantize,
    apply_rotary_pos_emb,  reshape_and_cache, rope_and_cache, paged_attention, flash_attention,
    merge_attention,       silu_and_mul,      copy_blocks,    read_memory,     multiply_add,
};

}  // namespace CLRT_ISA
}  // namespace codellama_rt
