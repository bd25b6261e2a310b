// What the host tells an Ascend kernel: plain structs that both sides read.
//
// Filled by plan.cpp, copied by the kernels word by word from global memory. Members are eight
// bytes, floats in pairs, so that the layout is the same for every compiler.
#pragma once

#include <cstdint>

namespace codellama_rt {
namespace ascend {

constexpr int64_t kUbBytes = 192 * 1024;  // unified buffer of a vector core (Atlas A2, A3)
constexpr int64_t kDmaBytes = 32;         // a DMA's and a vector's unit in it
constexpr int64_t kVectorFloats = 64;     // floats one vector instruction takes in a repeat
constexpr int64_t kBlockFloats = 8;       // floats in 32 bytes
constexpr int64_t kMaxCores = 64;         // vector cores: 40 or 48 on A2 and A3, 20 or 24 cube

constexpr int64_t kFloat16 = 0;
constexpr int64_t kBFloat16 = 1;

// Core c does the tasks [first[c], first[c + 1]).
struct Shares {
  int64_t first[kMaxCores + 1];
};

// Tasks: of each token, its heads in chunks: query heads, then key heads, then value heads.
struct RopeAndCacheTiling {
  int64_t num_tokens, n_heads, n_kv_heads, head_dim, block_size, element_type;
  int64_t chunk_heads;
  Shares tasks;
};

// Tasks: of each token, its heads in chunks: key heads, then value heads.
struct ReshapeAndCacheTiling {
  int64_t num_tokens, n_kv_heads, head_dim, block_size;
  int64_t chunk_heads;
  Shares tasks;
};

// rms_norm and add_rms_norm. Tasks: tokens.
struct RmsNormTiling {
  int64_t num_tokens, dim, element_type;
  int64_t num_buffers;  // 2 where two rows of each input fit
  float eps, inverse_dim;
  Shares tasks;
};

// Tasks: of each token, its elements in chunks.
struct SiluAndMulTiling {
  int64_t num_tokens, hidden_dim, element_type;
  int64_t chunk;
  Shares tasks;
};

// A row is a token and a key/value head: row = token * n_kv_heads + head. Its keys are attended in
// splits of `split` tokens that begin at multiples of it, whatever the batch is and however many
// cores there are; the splits' results are merged in ascending order. A unit is one split of one
// row; the cores have contiguous runs of units, in row order.
struct AttentionUnit {
  int64_t row, split;
  int64_t sequence;  // of the row's token
};

struct PagedAttentionTiling {
  int64_t num_tokens, num_seqs, max_blocks, n_heads, n_kv_heads, head_dim, block_size, element_type;
  int64_t split, tile;  // tokens; `tile` of them are in the unified buffer at a time
  float scale, padding;
  AttentionUnit first[kMaxCores + 1];
  // A row that several cores share is merged from global memory, by the core that has its first
  // split. Its partial results lie in consecutive slots of the workspace.
  int64_t open_slot[kMaxCores];       // of split 0 of the row that core c leaves open at its end
  int64_t inherited_slot[kMaxCores];  // of the first unit of core c, if an earlier core began it
  int64_t num_slots;
  // Of a slot: for each head of the group acc (head_dim); then the maxima, then the sums, each
  // spread over a block.
  int64_t slot_floats;
};

}  // namespace ascend
}  // namespace codellama_rt
