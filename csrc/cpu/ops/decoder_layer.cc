// decoder_layer: x + attention(rms_norm(x)), then + mlp(rms_norm)      (arXiv:2302.13971, sect. 2)
// Traffic  the weights of the layer and the blocks of the sequences, once each
// Fusion   silu and the two sums are made of a product's sums before they are written, and what the
//          next product rounds to bfloat16 is written as bfloat16: of 512 tokens of SmolLM2-135M
//          (AMD EPYC, Zen 4, one core) 630 -> 604 ms
// Scratch  per token: dim + max(qkv, 2 * hidden_dim) + max(query, hidden_dim) floats, of which many
//          tokens leave gate and up untouched
// Numerics the bits of the ops called one after another, between which all is float32
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

// What lies between the ops, of num_tokens tokens each. Products read their input in the dtype that
// they round it to (linear_input).
class Buffers {
 public:
  explicit Buffers(const Sizes& s) : memory_(bytes(s)) {
    narrow = static_cast<float*>(memory_.data());
    wide = narrow + s.tokens * s.dim;
    middle = wide + s.tokens * widest(s);
  }

  float* narrow;  // dim: normalized
  float* wide;    // qkv, then what was attended; gate and up of few tokens
  float* middle;  // the query; hidden_dim

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  static int64_t widest(const Sizes& s) { return larger(s.qkv_dim(), 2 * s.hidden); }
  static size_t bytes(const Sizes& s) {
    checked_product({s.tokens, larger(s.dim, widest(s)), 3 * sizeof(float)});  // at least the next
    const int64_t floats = s.dim + widest(s) + larger(s.q_dim(), s.hidden);
    return s.tokens * floats * sizeof(float);
  }

  LentMemory memory_;
};

FusedLinearParams product(const Sizes& s, const void* x, int64_t k,
                          std::initializer_list<TensorView> weights, float* out) {
  FusedLinearParams p{};
  for (const TensorView& weight : weights) {
    p.weights[p.num_weights] = weight.data;
    p.n[p.num_weights++] = weight.shape[0];
    p.out_stride += weight.shape[0];
  }
  p.x = x;
  p.out = out;
  p.num_tokens = s.tokens;
  p.k = p.x_stride = k;
  p.weight_dtype = weights.begin()->dtype;
  p.x_dtype = kernels().linear_input(p.weight_dtype);
  p.out_dtype = DType::kFloat32;
  return p;
}

// out = addend + x times the weight
void multiply_and_add(const Sizes& s, const void* x, int64_t k, const TensorView& weight,
                      const float* addend, float* out) {
  FusedLinearParams p = product(s, x, k, {weight}, out);
  p.addend = addend;
  p.addend_stride = s.dim;
  kernels().fused_linear(p);
}

void normalize(const Sizes& s, const DecoderLayer& l, const TensorView& weight, const float* x,
               DType out_dtype, void* out) {
  kernels().rms_norm({x, nullptr, weight.data, out, nullptr, DType::kFloat32, weight.dtype,
                      s.tokens, s.dim, l.eps, out_dtype});
}

// out = x + attention(rms_norm(x))
void attention(const Sizes& s, const DecoderLayer& l, const Buffers& b) {
  const CacheStrides key_strides = cache_strides(l.key_cache, true);
  const CacheStrides value_strides = cache_strides(l.value_cache, false);
  const FusedLinearParams qkv = product(s, b.narrow, s.dim, {l.q_proj, l.k_proj, l.v_proj}, b.wide);
  normalize(s, l, l.attention_norm, floats(l.x), qkv.x_dtype, b.narrow);
  kernels().fused_linear(qkv);
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
                             nullptr,
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
                             l.key_cache.shape[0],
                             kernels().linear_input(l.o_proj.dtype)});
  multiply_and_add(s, b.wide, s.q_dim(), l.o_proj, floats(l.x), floats(l.out));
}

// out = out + mlp(rms_norm(out))
void mlp(const Sizes& s, const DecoderLayer& l, const Buffers& b) {
  FusedLinearParams gated = product(s, b.narrow, s.dim, {l.gate_proj, l.up_proj}, b.middle);
  gated.gate_up = b.wide;
  gated.out_stride = s.hidden;
  gated.out_dtype = kernels().linear_input(l.down_proj.dtype);
  normalize(s, l, l.mlp_norm, floats(l.out), gated.x_dtype, b.narrow);
  kernels().fused_linear(gated);
  multiply_and_add(s, b.middle, s.hidden, l.down_proj, floats(l.out), floats(l.out));
}

}  // namespace

void decoder_layer(const DecoderLayer& l) {
  const Sizes s = check_all(l);
  const Buffers b(s);
  attention(s, l, b);
  mlp(s, l, b);
}

}  // namespace launch
}  // namespace codellama_rt
