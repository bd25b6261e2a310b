/* codellama_rt's operators for programs in C and C++, on the CPU: no Python, no framework.
 *
 * Every operator takes one struct. Set its struct_size to sizeof it and all other fields you do not
 * need to zero (`codellama_rt_rms_norm_args args = {sizeof args};`): later versions only add fields
 * at the end, and what an older program does not have counts as zero. Shapes, dtypes and numerics
 * are those of the Python operators of the same name, docs/operators.md; results are written into
 * tensors that the caller gives. All arguments are checked before anything is written.
 *
 * Calls are synchronous, may come from any thread, and throw nothing.
 */
#ifndef CODELLAMA_RT_H_
#define CODELLAMA_RT_H_

#include <stddef.h>
#include <stdint.h>

#define CODELLAMA_RT_API_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns; codellama_rt_last_error has the text. */
enum {
  CODELLAMA_RT_OK = 0,
  CODELLAMA_RT_INVALID_VALUE = 1, /* a shape, a value, a read-only tensor, a wrong struct_size */
  CODELLAMA_RT_INVALID_DTYPE = 2,
  CODELLAMA_RT_OUT_OF_MEMORY = 3,
  CODELLAMA_RT_FAILED = 4 /* threads that cannot be started, and anything else */
};

/* A tensor in the program's memory. The dtype is "float32", "float16", "bfloat16", "int32", or a
 * quantised one: "int8", "int4", and for weights those of GGUF, "q4_0", "q8_0", "q4_k", ... (the
 * list is in docs/quantization.md). The shape of a quantised tensor is that of the floats it stands
 * for.
 *
 * Strides are in elements; all 0 means contiguous. Of a quantised cache only the first two may be
 * given, in bytes: from block to block and from head to head. */
typedef struct {
  void* data;
  const char* dtype;
  int32_t ndim;      /* at most 4 */
  int32_t read_only; /* 1: an operator that would write it is refused */
  int64_t shape[4];
  int64_t strides[4];
} codellama_rt_tensor;

typedef struct {
  size_t struct_size;
  int32_t num_threads; /* at most so many take part; 0: all of codellama_rt_num_threads() */
  codellama_rt_tensor token_ids, table;
  codellama_rt_tensor out;
} codellama_rt_embedding_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  float eps;
  codellama_rt_tensor x, weight;
  codellama_rt_tensor out; /* may be x */
} codellama_rt_rms_norm_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  float eps;
  codellama_rt_tensor x, residual, weight;
  codellama_rt_tensor out, residual_out; /* may be x and residual */
} codellama_rt_add_rms_norm_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  int32_t num_weights; /* 1 to 3, multiplied as if their rows were one weight's */
  codellama_rt_tensor x, weights[3];
  codellama_rt_tensor out;
} codellama_rt_linear_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  int32_t interleaved; /* 1: elements (2i, 2i + 1) rotate together; 0: (i, i + head_dim / 2) */
  codellama_rt_tensor query, key; /* written */
  codellama_rt_tensor cos, sin, positions;
} codellama_rt_apply_rotary_pos_emb_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor key, value;
  codellama_rt_tensor key_cache, value_cache; /* written */
  codellama_rt_tensor slot_mapping;
} codellama_rt_reshape_and_cache_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  int32_t interleaved;
  codellama_rt_tensor qkv, cos, sin, positions;
  codellama_rt_tensor key_cache, value_cache; /* written */
  codellama_rt_tensor slot_mapping;
  codellama_rt_tensor query; /* out */
} codellama_rt_rope_and_cache_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  int32_t causal;
  float scale; /* 0: 1 / sqrt(head_dim) */
  codellama_rt_tensor query, key, value, cu_seqlens_q, cu_seqlens_k;
  codellama_rt_tensor out, lse;
} codellama_rt_flash_attention_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  float scale; /* 0: 1 / sqrt(head_dim) */
  codellama_rt_tensor query, key_cache, value_cache, block_tables, seq_lens, cu_seqlens_q;
  codellama_rt_tensor out, lse;
} codellama_rt_paged_attention_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor out_a, lse_a, out_b, lse_b;
  codellama_rt_tensor out, lse;
} codellama_rt_merge_attention_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor gate_up;
  codellama_rt_tensor out;
} codellama_rt_silu_and_mul_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor key_cache, value_cache; /* written */
  codellama_rt_tensor block_pairs;
} codellama_rt_copy_blocks_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor weight;
  codellama_rt_tensor payload; /* out, "int8" or "int4": codellama_rt_weight_bytes of them */
} codellama_rt_quantize_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor weight; /* blocks as in a GGUF file, such as "q4_0" */
  codellama_rt_tensor tiles;  /* out, "q4_0_tiled": codellama_rt_weight_bytes of them */
} codellama_rt_repack_args;

/* Arrays are (num_samples) unless ops.sample of the Python package gives another shape; offsets
 * are (num_samples + 1). */
typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor logits, rows;
  codellama_rt_tensor temperature;           /* float64; 0: the highest score, without a draw */
  codellama_rt_tensor top_k;                 /* int32; 0: all */
  codellama_rt_tensor top_p, min_p;          /* float64 */
  codellama_rt_tensor seed, index, position; /* uint64 */
  codellama_rt_tensor repetition_penalty, presence_penalty, frequency_penalty; /* float64 */
  codellama_rt_tensor seen_offsets, seen_ids, seen_counts;
  codellama_rt_tensor bias_offsets, bias_ids, bias_values; /* bias_values: float64 */
  codellama_rt_tensor masks, mask_rows;                    /* masks: uint32 */
  codellama_rt_tensor token_ids, has_token;                /* out, int32 and bool */
} codellama_rt_sample_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  codellama_rt_tensor logits, rows, token_ids;
  codellama_rt_tensor logprobs, ranks, top_ids; /* out; logprobs: float64 */
} codellama_rt_token_logprobs_args;

typedef struct {
  size_t struct_size;
  int32_t num_threads;
  int32_t interleaved;
  float eps;
  codellama_rt_tensor x, attention_norm, q_proj, k_proj, v_proj, o_proj, mlp_norm, gate_proj,
      up_proj, down_proj, cos, sin, positions;
  codellama_rt_tensor key_cache, value_cache; /* written */
  codellama_rt_tensor slot_mapping, block_tables, seq_lens, cu_seqlens_q;
  codellama_rt_tensor out; /* may be x */
} codellama_rt_decoder_layer_args;

int codellama_rt_embedding(const codellama_rt_embedding_args* args);
int codellama_rt_rms_norm(const codellama_rt_rms_norm_args* args);
int codellama_rt_add_rms_norm(const codellama_rt_add_rms_norm_args* args);
int codellama_rt_linear(const codellama_rt_linear_args* args);
int codellama_rt_apply_rotary_pos_emb(const codellama_rt_apply_rotary_pos_emb_args* args);
int codellama_rt_reshape_and_cache(const codellama_rt_reshape_and_cache_args* args);
int codellama_rt_rope_and_cache(const codellama_rt_rope_and_cache_args* args);
int codellama_rt_flash_attention(const codellama_rt_flash_attention_args* args);
int codellama_rt_paged_attention(const codellama_rt_paged_attention_args* args);
int codellama_rt_merge_attention(const codellama_rt_merge_attention_args* args);
int codellama_rt_silu_and_mul(const codellama_rt_silu_and_mul_args* args);
int codellama_rt_copy_blocks(const codellama_rt_copy_blocks_args* args);
int codellama_rt_quantize(const codellama_rt_quantize_args* args);
int codellama_rt_repack(const codellama_rt_repack_args* args);
int codellama_rt_sample(const codellama_rt_sample_args* args);
int codellama_rt_token_logprobs(const codellama_rt_token_logprobs_args* args);
int codellama_rt_decoder_layer(const codellama_rt_decoder_layer_args* args);

/* Bytes of a weight (n, k), or of a cache of keys (is_key 1) or of values (0); -1: no such dtype,
 * or a size it cannot have. */
int64_t codellama_rt_weight_bytes(const char* dtype, int64_t n, int64_t k);
int64_t codellama_rt_cache_bytes(const char* dtype, int32_t is_key, int64_t num_blocks,
                                 int64_t n_kv_heads, int64_t block_size, int64_t head_dim);

/* Of the library's threads and instruction set, for all callers of the process. */
int32_t codellama_rt_num_threads(void); /* -1: CODELLAMA_RT_NUM_THREADS has a bad value */
int codellama_rt_set_num_threads(int32_t num_threads);
const char* codellama_rt_isa(void);
int codellama_rt_set_isa(const char* name);

int32_t codellama_rt_api_version(void); /* of the library: at least CODELLAMA_RT_API_VERSION */

/* Of the calling thread's last call that failed; "" before. It stays until the next one fails. */
const char* codellama_rt_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
