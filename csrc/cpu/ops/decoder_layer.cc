// decoder_layer: x + attention(rms_norm(x)), then + mlp(rms_norm)      (arXiv:2302.13971, sect. 2)
// Traffic  the weights of the layer and the blocks of the sequences, once each
// Scratch  per token: dim + max(qkv, 2 * hidden_dim) + max(query, hidden_dim) floats and the lse;
//          kept by the calling thread
// Numerics float32 between the ops, exactly those of direct calls: the last sum is the one that
//          add_rms_norm makes at the start of the next layer
#include "cpu/ops/decoder_layer.h"

#include "common/check.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"

namespace codellama_rt {
namespace launch {
namespace {

struct Sizes {
  int64_t tokens, dim, hidden, heads, kv_heads, head_dim, block_size, seqs, max_blocks;

  int64_t q_dim() const { return heads * head_dim; }
  int64_t qkv_dim() const { return q_dim() + 2 * kv_heads * head_dim; }
};

Sizes check_weights(Check& check, const DecoderLayer& l) {
  Axis tokens{"num_tokens"}, dim{"dim"}, q_dim{"n_heads * head_dim"}, hidden{"hidden_dim"};
  Axis blocks{"num_blocks"}, kv_heads{"n_kv_heads"}, block{"block_size"}, head_dim{"head_dim"};
  check.float32("x", l.x, {&tokens, &dim});
  check.float32("out", l.out, {&tokens, &dim});
  check.writable("out", l.out);
  check.cache("key_cache", l.key_cache, {&blocks, &kv_heads, &block, &head_dim});
  check.cache("value_cache", l.value_cache, {&blocks, &kv_heads, &block, &head_dim},
              l.key_cache.dtype);
  check_token_strides(check, l.key_cache, l.value_cache, 2, "key_cache and value_cache");
  check.writable("key_cache", l.key_cache);
  check.writable("value_cache", l.value_cache);
  check_even(check, head_dim.size);
  check_block_size(check, block.size);
  Axis kv_dim{"n_kv_heads * head_dim", kv_heads.size * head_dim.size};
  check.floats("attention_norm", l.attention_norm, {&dim});
  check.weight("q_proj", l.q_proj, {&q_dim, &dim});
  check.weight("k_proj", l.k_proj, {&kv_dim, &dim}, l.q_proj.dtype);
  check.weight("v_proj", l.v_proj, {&kv_dim, &dim}, l.q_proj.dtype);
  check.weight("o_proj", l.o_proj, {&dim, &q_dim});
  check.floats("mlp_norm", l.mlp_norm, {&dim});
  check.weight("gate_proj", l.gate_proj, {&hidden, &dim});
  check.weight("up_proj", l.up_proj, {&hidden, &dim}, l.gate_proj.dtype);
  check.weight("down_proj", l.down_proj, {&dim, &hidden});
  check.require(q_dim.size % head_dim.size == 0, "q_proj's rows must be a multiple of head_dim");
  const int64_t heads = q_dim.size / head_dim.size;
  check_heads(check, heads, kv_heads.size);
  check_eps(check, l.eps);
  return {tokens.size,   dim.size,   hidden.size, heads, kv_heads.size,
          head_dim.size, block.size, 0,           0};
}

Sizes check_all(const DecoderLayer& l) {
  Check check("decoder_layer");
  Sizes sizes = check_weights(check, l);
  Axis tokens{"num_tokens", sizes.tokens}, half{"half_head_dim", sizes.head_dim / 2};
  Axis table{"num_positions"}, seqs{"num_seqs"}, max_blocks{"max_blocks"};
  const int64_t num_blocks = l.key_cache.shape[0];
  check.float32("cos", l.cos, {&table, &half});
  check.float32("sin", l.sin, {&table, &half});
  check.int32("positions", l.positions, {&tokens});
  check.int32("slot_mapping", l.slot_mapping, {&tokens});
  check.int32("block_tables", l.block_tables, {&seqs, &max_blocks});
  check.int32("seq_lens", l.seq_lens, {&seqs});
  Axis bounds{"num_seqs + 1", seqs.size + 1};
  check.int32("cu_seqlens_q", l.cu_seqlens_q, {&bounds});
  check.range("positions", l.positions, 0, table.size, "num_positions");
  check.range("slot_mapping", l.slot_mapping, -1, num_blocks * sizes.block_size,
              "num_blocks * block_size");
  check.offsets("cu_seqlens_q", l.cu_seqlens_q, sizes.tokens, "num_tokens");
  check_pages(check, l.block_tables, l.seq_lens, l.cu_seqlens_q, num_blocks, sizes.block_size);
  sizes.seqs = seqs.size;
  sizes.max_blocks = max_blocks.size;
  return sizes;
}

struct Buffers {
  float* narrow;  // (num_tokens, dim): the norm, later the sublayer's result
  float* wide;    // qkv, then the attention's result; gate and up
  float* middle;  // (num_tokens, q_dim) the query; (num_tokens, hidden_dim)
  float* lse;     // (num_tokens, n_heads)
};

Buffers cut_scratch(const Sizes& s) {
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t widest = larger(larger(s.dim, s.heads), larger(s.qkv_dim(), 2 * s.hidden));
  checked_product({s.tokens, widest, 4 * sizeof(float)});  // at least the sum below
  const int64_t narrow = s.tokens * s.dim;
  const int64_t wide = s.tokens * larger(s.qkv_dim(), 2 * s.hidden);
  const int64_t middle = s.tokens * larger(s.q_dim(), s.hidden);
  const int64_t floats = narrow + wide + middle + s.tokens * s.heads;
  auto* memory = static_cast<float*>(scratch(Scratch::kLayer, floats * sizeof(float)));
  return {memory, memory + narrow, memory + narrow + wide, memory + narrow + wide + middle};
}

void multiply(const Sizes& s, const float* x, int64_t k, std::initializer_list<TensorView> weights,
              float* out) {
  LinearParams p{};
  for (const TensorView& weight : weights) {
    p.weights[p.num_weights] = weight.data;
    p.n[p.num_weights++] = weight.shape[0];
    p.out_stride += weight.shape[0];
  }
  p.x = x;
  p.out = out;
  p.num_tokens = s.tokens;
  p.k = p.x_stride = k;
  p.x_dtype = p.out_dtype = DType::kFloat32;
  p.weight_dtype = weights.begin()->dtype;
  kernels().linear(p);
}

void normalize(const Sizes& s, const DecoderLayer& l, const TensorView& weight, const float* x,
               const float* residual, float* out) {
  kernels().rms_norm({x, residual, weight.data, out, residual ? l.out.data : nullptr,
                      DType::kFloat32, weight.dtype, s.tokens, s.dim, l.eps});
}

// rms_norm(x) -> narrow -> the attention's result in narrow
void attention(const Sizes& s, const DecoderLayer& l, const Buffers& b) {
  const CacheStrides key_strides = cache_strides(l.key_cache, true);
  const CacheStrides value_strides = cache_strides(l.value_cache, false);
  multiply(s, b.narrow, s.dim, {l.q_proj, l.k_proj, l.v_proj}, b.wide);
  kernels().rope_and_cache({b.wide, floats(l.cos), floats(l.sin), ints(l.positions),
                            l.key_cache.data, l.value_cache.data, ints(l.slot_mapping), b.middle,
                            DType::kFloat32, l.key_cache.dtype, s.tokens, s.heads, s.kv_heads,
                            s.head_dim, s.block_size, l.interleaved, s.qkv_dim(), key_strides,
                            value_strides});
  kernels().paged_attention({b.middle,
                             l.key_cache.data,
                             l.value_cache.data,
                             ints(l.block_tables),
                             ints(l.seq_lens),
                             ints(l.cu_seqlens_q),
                             b.wide,
                             b.lse,
                             DType::kFloat32,
                             l.key_cache.dtype,
                             s.tokens,
                             s.seqs,
                             s.max_blocks,
                             s.heads,
                             s.kv_heads,
                             s.head_dim,
                             s.block_size,
                             usual_scale(s.head_dim),
                             s.q_dim(),
                             key_strides,
                             value_strides,
                             l.key_cache.shape[0]});
  multiply(s, b.wide, s.q_dim(), {l.o_proj}, b.narrow);
}

void mlp(const Sizes& s, const DecoderLayer& l, const Buffers& b) {
  multiply(s, b.narrow, s.dim, {l.gate_proj, l.up_proj}, b.wide);
  kernels().silu_and_mul({b.wide, b.middle, DType::kFloat32, s.tokens, s.hidden});
  multiply(s, b.middle, s.hidden, {l.down_proj}, b.narrow);
}

}  // namespace

void decoder_layer(const DecoderLayer& l) {
  const Sizes s = check_all(l);
  const Buffers b = cut_scratch(s);
  normalize(s, l, l.attention_norm, floats(l.x), nullptr, b.narrow);
  attention(s, l, b);
  normalize(s, l, l.mlp_norm, b.narrow, floats(l.x), b.narrow);  // out = x + attention
  mlp(s, l, b);
  float* out = floats(l.out);
  for (int64_t i = 0; i < s.tokens * s.dim; ++i) out[i] = b.narrow[i] + out[i];
}

}  // namespace launch
}  // namespace codellama_rt
