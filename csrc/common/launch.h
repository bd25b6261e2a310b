// The ops on tensors of any framework: checks, then the kernel of the chosen instruction set.
//
// Both bindings end here: bind/python.cc (direct calls) and bind/mindspore.cc (graph ops).
// Each throws std::invalid_argument or DtypeError before anything is written.
#pragma once

#include "common/check.h"

namespace codellama_rt {
#pragma GCC visibility push(default)
namespace launch {

void embedding(TensorView token_ids, TensorView table, TensorView out);
void rms_norm(TensorView x, TensorView weight, float eps, TensorView out);
void add_rms_norm(TensorView x, TensorView residual, TensorView weight, float eps, TensorView out,
                  TensorView residual_out);
void linear(TensorView x, const TensorView* weights, int num_weights, TensorView out);
void quantize(TensorView weight, TensorView payload);
void apply_rotary_pos_emb(TensorView query, TensorView key, TensorView cos, TensorView sin,
                          TensorView positions, bool interleaved);
void reshape_and_cache(TensorView key, TensorView value, TensorView key_cache,
                       TensorView value_cache, TensorView slot_mapping);
void rope_and_cache(TensorView qkv, TensorView cos, TensorView sin, TensorView positions,
                    TensorView key_cache, TensorView value_cache, TensorView slot_mapping,
                    bool interleaved, TensorView query);
void flash_attention(TensorView query, TensorView key, TensorView value, TensorView cu_seqlens_q,
                     TensorView cu_seqlens_k, bool causal, float scale, TensorView out,
                     TensorView lse);
void paged_attention(TensorView query, TensorView key_cache, TensorView value_cache,
                     TensorView block_tables, TensorView seq_lens, TensorView cu_seqlens_q,
                     float scale, TensorView out, TensorView lse);
void merge_attention(TensorView out_a, TensorView lse_a, TensorView out_b, TensorView lse_b,
                     TensorView out, TensorView lse);
void silu_and_mul(TensorView gate_up, TensorView out);
void copy_blocks(TensorView key_cache, TensorView value_cache, TensorView block_pairs);

}  // namespace launch
#pragma GCC visibility pop

}  // namespace codellama_rt
