// A whole decoder layer as one op, for graphs: MindSpore pays for each op of a graph, not for its
// size. It writes the same bits as the single ops one after another.
#pragma once

#include "common/launch.h"

namespace codellama_rt {

// Tensors in the order of the op's arguments.
struct DecoderLayer {
  TensorView x;                                     // (num_tokens, dim) float32, the residual
  TensorView attention_norm;                        // (dim)
  TensorView q_proj, k_proj, v_proj;                // (heads * head_dim, dim)
  TensorView o_proj;                                // (dim, n_heads * head_dim)
  TensorView mlp_norm;                              // (dim)
  TensorView gate_proj, up_proj;                    // (hidden_dim, dim)
  TensorView down_proj;                             // (dim, hidden_dim)
  TensorView cos, sin;                              // (num_positions, head_dim / 2)
  TensorView positions;                             // (num_tokens)
  TensorView key_cache, value_cache;                // written
  TensorView slot_mapping;                          // (num_tokens)
  TensorView block_tables, seq_lens, cu_seqlens_q;  // as in paged_attention
  TensorView out;                                   // like x; may be x
  float eps;
  bool interleaved;
};

}  // namespace codellama_rt
