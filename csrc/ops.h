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
  void* out;             // (num_tokens, dim)
  void* residual_out;    // (num_tokens, dim) x + residual; may be `residual`; null without one
  DType dtype, weight_dtype;
  int64_t num_tokens, dim;
  float eps;
  DType out_dtype;  // of out alone; the ops' is that of x
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

// linear as a decoder layer wants it: what becomes of the sums on their way to out. On the CPU.
struct FusedLinearParams : LinearParams {
  // (num_tokens, sum(n)) scratch, or null. With it the weights are gate and up, of as many rows:
  // silu(gate) * up goes to out, (num_tokens, n[0]).
  float* gate_up = nullptr;
  // (num_tokens, sum(n)), rows addend_stride apart: added to the result; may be out. Or null.
  const float* addend = nullptr;
  int64_t addend_stride = 0;
};

struct QuantizeParams {
  const void* weight;  // (n, k)
  void* payload;       // weight_bytes(dtype, n, k)
  DType weight_dtype, dtype;
  int64_t n, k;
};

struct RepackParams {
  const void* weight;  // (n, k), rows of GGUF blocks
  void* tiles;         // the same in tiles: weight_bytes(tiled dtype, n, k)
  DType dtype;         // of weight
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
  int64_t query_stride, key_stride;  // from token to token
};

// Caches are (num_blocks, n_kv_heads, block_size, head_dim); the token of slot s lies in block
// s / block_size at row s % block_size of every head. Slot -1 is skipped. In memory the axes may be
// in any order, and other things between them, but for the row of head_dim elements; of a quantised
// cache kCacheGroup rows with their scales are one piece (quantized.h). On cuda all is contiguous.
struct CacheStrides {  // in bytes
  int64_t block, head;
  int64_t group;  // of kCacheGroup tokens
  int64_t token;  // of floats; 0 in a quantised cache
};

struct ReshapeAndCacheParams {
  const void *key, *value;        // (num_tokens, n_kv_heads, head_dim)
  void *key_cache, *value_cache;  // (num_blocks, n_kv_heads, block_size, head_dim)
  const int32_t* slot_mapping;    // (num_tokens)
  DType dtype, cache_dtype;
  int64_t num_tokens, n_kv_heads, head_dim, block_size;
  int64_t key_stride, value_stride;  // from token to token
  CacheStrides key_cache_strides, value_cache_strides;
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
  int64_t qkv_stride;  // from token to token
  CacheStrides key_cache_strides, value_cache_strides;
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
  void* out;                            // (num_tokens, n_heads, head_dim)
  float* lse;                           // (num_tokens, n_heads), natural logarithm; or null
  DType dtype, cache_dtype;
  int64_t num_tokens, num_seqs, max_blocks, n_heads, n_kv_heads, head_dim, block_size;
  float scale;
  int64_t query_stride;                                 // from token to token
  CacheStrides key_cache_strides, value_cache_strides;  // with one stride of tokens
  int64_t num_blocks;
  DType out_dtype;  // the op's is that of query
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
  int64_t query_stride, key_stride;  // from token to token; key_stride is the values' as well
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
  DType out_dtype;  // the op's is dtype
};

// A block's bytes in memory: outer x inner pieces, each in one run. On cuda always one.
struct BlockPieces {
  int64_t block_stride, num_outer, outer_stride, num_inner, inner_stride, bytes;  // all in bytes
};

struct CopyBlocksParams {
  void *key_cache, *value_cache;  // (num_blocks, ...)
  const int32_t* block_pairs;     // (num_pairs, 2): source, destination; done in order
  int64_t num_pairs, key_block_bytes, value_block_bytes;
  BlockPieces key_pieces, value_pieces;
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

// Instructions that multiply and add at rates of their own, for `multiply_add`.
enum class Arithmetic : int32_t { kFma, kDotBf16, kMaddInt16, kDotInt16, kDotInt8 };
constexpr const char* kArithmeticNames[] = {"fp32 FMA", "vdpbf16ps", "vpmaddwd", "vpdpwssd",
                                            "vpdpbusd"};

// One table an instruction set (or device): the ops' entry points.
struct KernelTable {
  const char* isa;
#define CLRT_OP(name, Params, signature) void (*name)(const Params&);
#define CLRT_DIRECT_OP(name, Params, signature) void (*name)(const Params&);
#include "ops.def"
  // Probes of the machine, no operators: read `bytes` once; repeat an instruction for `num_rounds`
  // per thread and return the operations of all, 0 if the instruction set lacks it.
  void (*read_memory)(const void* memory, int64_t bytes);
  int64_t (*multiply_add)(Arithmetic arithmetic, int64_t num_rounds);
  // Of the CPU's decoder_layer.
  void (*fused_linear)(const FusedLinearParams&);
  DType (*linear_input)(DType weight_dtype);  // what linear rounds x to first, or float32
};

}  // namespace codellama_rt
