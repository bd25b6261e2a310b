// The contract of every kernel: one plain struct an op, on every device.
//
// Raw pointers, sizes, strides in elements; no framework type. Inner dimensions are contiguous
// unless a stride is given. Dtypes: activations are float32, float16 or bfloat16; caches too, each
// of its own, or int8 or int4 (quantized.h); indices are int32; statistics, RoPE tables and
// log-sum-exps are float32. Offsets are int64_t: 100k tokens overflow 32 bits. Arguments were
// checked by the launcher.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace codellama_rt {

struct EmbeddingParams {
  const int32_t* token_ids;  // (num_tokens), each in [0, vocab_size)
  const void* table;         // (vocab_size, dim)
  void* out;                 // (num_tokens, dim)
  DType table_dtype, out_dtype;
  int64_t num_tokens, dim;
};

// rms_norm; with a residual: add_rms_norm.
struct RmsNormParams {
  const void* x;         // (num_tokens, dim)
  const void* residual;  // (num_tokens, dim) in x's dtype, added to x first; or null
  const void* weight;    // (dim)
  void* out;             // (num_tokens, dim) in x's dtype
  void* residual_out;    // (num_tokens, dim) x + residual; may be `residual`; null without one
  DType dtype, weight_dtype;
  int64_t num_tokens, dim;
  float eps;
};

// Up to three weights that lie apart (q, k, v; gate, up) are multiplied in one pass over x, as if
// they were one weight of sum(n) rows.
constexpr int kMaxWeights = 3;

struct LinearParams {
  const void* x;                     // (num_tokens, k), rows x_stride apart
  const void* weights[kMaxWeights];  // each (n[i], k)
  void* out;                         // (num_tokens, sum(n)), rows out_stride apart
  int64_t n[kMaxWeights];
  int64_t num_weights, num_tokens, k, x_stride, out_stride;
  DType x_dtype, weight_dtype, out_dtype;
};

struct QuantizeParams {
  const void* weight;  // (n, k)
  void* payload;       // weight_bytes(dtype, n, k)
  DType weight_dtype, dtype;
  int64_t n, k;
};

// Tables: row p holds the cosines (sines) of position p. `interleaved`: elements (2i, 2i + 1)
// rotate together, as in Meta's files; otherwise (i, i + head_dim / 2), as in Hugging Face's.
struct RotaryParams {
  void* query;               // (num_tokens, n_heads, head_dim), in place
  void* key;                 // (num_tokens, n_kv_heads, head_dim), in place
  const float *cos, *sin;    // (num_positions, head_dim / 2)
  const int32_t* positions;  // (num_tokens), each in [0, num_positions)
  DType dtype;
  int64_t num_tokens, n_heads, n_kv_heads, head_dim;
  bool interleaved;
};

// Pages are head-major: (num_blocks, n_kv_heads, block_size, head_dim); the token of slot s lies in
// block s / block_size at row s % block_size of every head. Slot -1 is skipped.
struct ReshapeAndCacheParams {
  const void *key, *value;        // (num_tokens, n_kv_heads, head_dim)
  void *key_cache, *value_cache;  // (num_blocks, n_kv_heads, block_size, head_dim)
  const int32_t* slot_mapping;    // (num_tokens)
  DType dtype, cache_dtype;
  int64_t num_tokens, n_kv_heads, head_dim, block_size;
};

struct RopeAndCacheParams {
  const void* qkv;                // (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
  const float *cos, *sin;         // (num_positions, head_dim / 2)
  const int32_t* positions;       // (num_tokens)
  void *key_cache, *value_cache;  // (num_blocks, n_kv_heads, block_size, head_dim)
  const int32_t* slot_mapping;    // (num_tokens)
  void* query;                    // out: (num_tokens, n_heads, head_dim) in qkv's dtype
  DType dtype, cache_dtype;
  int64_t num_tokens, n_heads, n_kv_heads, head_dim, block_size;
  bool interleaved;
};

// Both attentions are causal from the end: query i of a sequence with num_queries queries and
// length keys sees the keys [0, length - num_queries + i]. flash_attention may be non-causal.
// A query without keys gives out = 0, lse = -inf.
struct PagedAttentionParams {
  const void* query;                    // (num_tokens, n_heads, head_dim)
  const void *key_cache, *value_cache;  // (num_blocks, n_kv_heads, block_size, head_dim)
  const int32_t* block_tables;          // (num_seqs, max_blocks)
  const int32_t* seq_lens;              // (num_seqs), the queries' own tokens included
  const int32_t* cu_seqlens_q;          // (num_seqs + 1)
  void* out;                            // (num_tokens, n_heads, head_dim) in query's dtype
  float* lse;                           // (num_tokens, n_heads), natural logarithm
  DType dtype, cache_dtype;
  int64_t num_tokens, num_seqs, max_blocks, n_heads, n_kv_heads, head_dim, block_size;
  float scale;
};

struct FlashAttentionParams {
  const void* query;            // (num_tokens, n_heads, head_dim)
  const void *key, *value;      // (num_keys, n_kv_heads, head_dim)
  const int32_t* cu_seqlens_q;  // (num_seqs + 1)
  const int32_t* cu_seqlens_k;  // (num_seqs + 1)
  void* out;                    // (num_tokens, n_heads, head_dim) in query's dtype
  float* lse;                   // (num_tokens, n_heads)
  DType dtype, kv_dtype;
  int64_t num_tokens, num_keys, num_seqs, n_heads, n_kv_heads, head_dim;
  float scale;
  bool causal;
};

struct MergeAttentionParams {
  const void *out_a, *out_b;   // (num_tokens, n_heads, head_dim)
  const float *lse_a, *lse_b;  // (num_tokens, n_heads)
  void* out;                   // (num_tokens, n_heads, head_dim)
  float* lse;                  // (num_tokens, n_heads)
  DType dtype;
  int64_t num_tokens, n_heads, head_dim;
};

struct SiluAndMulParams {
  const void* gate_up;  // (num_tokens, 2 * hidden_dim): gate, then up
  void* out;            // (num_tokens, hidden_dim)
  DType dtype;
  int64_t num_tokens, hidden_dim;
};

struct CopyBlocksParams {
  void *key_cache, *value_cache;  // (num_blocks, ...)
  const int32_t* block_pairs;     // (num_pairs, 2): source, destination; done in order
  int64_t num_pairs, key_block_bytes, value_block_bytes;
};

// Sample s draws the token that follows row rows[s] of the logits. Arrays are (num_samples) unless
// a shape is given; offsets are (num_samples + 1) and rise from 0.
struct SampleParams {
  const float* logits;  // (num_logits, vocab_size)
  const int32_t* rows;
  const double *temperature, *top_p, *min_p;  // temperature 0: the highest score, without a draw
  const int32_t* top_k;                       // 0: all
  const uint64_t *seed, *index, *position;    // all that a draw depends on
  const double *repetition_penalty, *presence_penalty, *frequency_penalty;
  const int32_t *seen_offsets, *seen_ids, *seen_counts;  // tokens so far, occurrences in the output
  const int32_t *bias_offsets, *bias_ids;
  const double* bias_values;  // added; -inf forbids
  const int32_t* mask_rows;   // of masks; -1: none
  const uint32_t* masks;      // (num_masks, ceil(vocab_size / 32)): bit i allows token i
  int32_t* token_ids;         // without a finite highest score: the first token that has it, or NaN
  uint8_t* has_token;         // 1: there is one to choose
  int64_t num_samples, vocab_size;
};

// Log-probabilities of given tokens in rows of logits, and of each row's likeliest ones.
struct TokenLogprobsParams {
  const float* logits;       // (num_logits, vocab_size)
  const int32_t* rows;       // (num_tokens)
  const int32_t* token_ids;  // (num_tokens)
  double* logprobs;          // (num_tokens, 1 + num_top): of the token, then of the likeliest
  int32_t* ranks;            // (num_tokens), from 1; of equal ones the lower token goes first
  int32_t* top_ids;          // (num_tokens, num_top)
  int64_t num_tokens, vocab_size, num_top;
};

// One table an instruction set (or device): the ops' entry points.
struct KernelTable {
  const char* isa;
#define CLRT_OP(name, Params, signature) void (*name)(const Params&);
#define CLRT_DIRECT_OP(name, Params, signature) void (*name)(const Params&);
#include "ops.def"
  // Probes of the machine, no operators: read `bytes` once; do `num_rounds` of a dtype's arithmetic
  // a thread and return the FLOPs of all.
  void (*read_memory)(const void* memory, int64_t bytes);
  int64_t (*multiply_add)(DType dtype, int64_t num_rounds);
};

}  // namespace codellama_rt
