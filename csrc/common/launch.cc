#include "common/launch.h"

#include <limits>
#include <utility>

#include "common/check.h"
#ifdef CLRT_CUDA  // compiled once a device
#include "cuda/runtime/dispatch.h"
#else
#include "cpu/runtime/dispatch.h"
#endif

namespace codellama_rt {
namespace launch {

void embedding(TensorView token_ids, TensorView table, TensorView out) {
  Check check("embedding");
  Axis tokens{"num_tokens"}, vocab{"vocab_size"}, dim{"dim"};
  check.int32("token_ids", token_ids, {&tokens});
  check.weight("table", table, {&vocab, &dim});
  check.floats("out", out, {&tokens, &dim});
  check.writable("out", out);
  check.range("token_ids", token_ids, 0, vocab.size, "vocab_size");
  kernels().embedding(
      {ints(token_ids), table.data, out.data, table.dtype, out.dtype, tokens.size, dim.size});
}

void rms_norm(TensorView x, TensorView weight, float eps, TensorView out) {
  Check check("rms_norm");
  Axis tokens{"num_tokens"}, dim{"dim"};
  check.floats("x", x, {&tokens, &dim});
  check.floats("weight", weight, {&dim});
  check.floats("out", out, {&tokens, &dim}, x.dtype);
  check.writable("out", out);
  check_eps(check, eps);
  kernels().rms_norm({x.data, nullptr, weight.data, out.data, nullptr, x.dtype, weight.dtype,
                      tokens.size, dim.size, eps, x.dtype});
}

void add_rms_norm(TensorView x, TensorView residual, TensorView weight, float eps, TensorView out,
                  TensorView residual_out) {
  Check check("add_rms_norm");
  Axis tokens{"num_tokens"}, dim{"dim"};
  check.floats("x", x, {&tokens, &dim});
  check.floats("residual", residual, {&tokens, &dim}, x.dtype);
  check.floats("weight", weight, {&dim});
  check.floats("out", out, {&tokens, &dim}, x.dtype);
  check.floats("residual_out", residual_out, {&tokens, &dim}, x.dtype);
  check.writable("out", out);
  check.writable("residual_out", residual_out);
  check_eps(check, eps);
  kernels().rms_norm({x.data, residual.data, weight.data, out.data, residual_out.data, x.dtype,
                      weight.dtype, tokens.size, dim.size, eps, x.dtype});
}

void linear(TensorView x, Weights weights, TensorView out) {
  Check check("linear");
  check.require(weights.count >= 1 && weights.count <= kMaxWeights,
                [&] { return "takes 1 to 3 weights, got " + std::to_string(weights.count); });
  Axis tokens{"num_tokens"}, k{"in_features"}, total{"out_features", 0};
  check.rows("x", x, {&tokens, &k});
  LinearParams p{};
  for (int i = 0; i < weights.count; ++i) {
    Axis n{"out_features"};
    if (i == 0) check.weight("weight", weights.tensors[i], {&n, &k});
    if (i > 0) check.weight("weight", weights.tensors[i], {&n, &k}, weights.tensors[0].dtype);
    p.weights[i] = weights.tensors[i].data;
    p.n[i] = n.size;
    total.size += n.size;
  }
  check.rows("out", out, {&tokens, &total});
  check.writable("out", out);
  p.x = x.data;
  p.out = out.data;
  p.num_weights = weights.count;
  p.num_tokens = tokens.size;
  p.k = k.size;
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  p.x_dtype = x.dtype;
  p.weight_dtype = weights.tensors[0].dtype;
  p.out_dtype = out.dtype;
  kernels().linear(p);
}

void apply_rotary_pos_emb(TensorView query, TensorView key, TensorView cos, TensorView sin,
                          TensorView positions, bool interleaved) {
  Check check("apply_rotary_pos_emb");
  Axis tokens{"num_tokens"}, heads{"n_heads"}, kv_heads{"n_kv_heads"}, dim{"head_dim"};
  Axis table{"num_positions"};
  check.rows("query", query, {&tokens, &heads, &dim});
  check.rows("key", key, {&tokens, &kv_heads, &dim}, query.dtype);
  check_even(check, dim.size);
  Axis half{"half_head_dim", dim.size / 2};
  check.float32("cos", cos, {&table, &half});
  check.float32("sin", sin, {&table, &half});
  check.int32("positions", positions, {&tokens});
  check.writable("query", query);
  check.writable("key", key);
  check.range("positions", positions, 0, table.size, "num_positions");
  kernels().apply_rotary_pos_emb({query.data, key.data, floats(cos), floats(sin), ints(positions),
                                  query.dtype, tokens.size, heads.size, kv_heads.size, dim.size,
                                  interleaved, query.strides[0], key.strides[0]});
}

void reshape_and_cache(TensorView key, TensorView value, TensorView key_cache,
                       TensorView value_cache, TensorView slot_mapping) {
  Check check("reshape_and_cache");
  Axis tokens{"num_tokens"}, kv_heads{"n_kv_heads"}, dim{"head_dim"}, blocks{"num_blocks"},
      block{"block_size"};
  check.rows("key", key, {&tokens, &kv_heads, &dim});
  check.rows("value", value, {&tokens, &kv_heads, &dim}, key.dtype);
  check.cache("key_cache", key_cache, {&blocks, &kv_heads, &block, &dim});
  check.cache("value_cache", value_cache, {&blocks, &kv_heads, &block, &dim}, key_cache.dtype);
  check.int32("slot_mapping", slot_mapping, {&tokens});
  check.writable("key_cache", key_cache);
  check.writable("value_cache", value_cache);
  check_block_size(check, block.size);
  check.range("slot_mapping", slot_mapping, -1, blocks.size * block.size,
              "num_blocks * block_size");
  kernels().reshape_and_cache(
      {key.data, value.data, key_cache.data, value_cache.data, ints(slot_mapping), key.dtype,
       key_cache.dtype, tokens.size, kv_heads.size, dim.size, block.size, key.strides[0],
       value.strides[0], cache_strides(key_cache, true), cache_strides(value_cache, false)});
}

void rope_and_cache(TensorView qkv, TensorView cos, TensorView sin, TensorView positions,
                    TensorView key_cache, TensorView value_cache, TensorView slot_mapping,
                    bool interleaved, TensorView query) {
  Check check("rope_and_cache");
  Axis tokens{"num_tokens"}, heads{"n_heads"}, kv_heads{"n_kv_heads"}, dim{"head_dim"},
      blocks{"num_blocks"}, block{"block_size"}, table{"num_positions"};
  check.cache("key_cache", key_cache, {&blocks, &kv_heads, &block, &dim});
  check.cache("value_cache", value_cache, {&blocks, &kv_heads, &block, &dim}, key_cache.dtype);
  check.floats("query", query, {&tokens, &heads, &dim}, qkv.dtype);
  check_even(check, dim.size);
  check_block_size(check, block.size);
  Axis half{"half_head_dim", dim.size / 2};
  Axis qkv_dim{"(n_heads + 2 * n_kv_heads) * head_dim",
               (heads.size + 2 * kv_heads.size) * dim.size};
  check.rows("qkv", qkv, {&tokens, &qkv_dim});
  check.float32("cos", cos, {&table, &half});
  check.float32("sin", sin, {&table, &half});
  check.int32("positions", positions, {&tokens});
  check.int32("slot_mapping", slot_mapping, {&tokens});
  check.writable("key_cache", key_cache);
  check.writable("value_cache", value_cache);
  check.writable("query", query);
  check.range("positions", positions, 0, table.size, "num_positions");
  check.range("slot_mapping", slot_mapping, -1, blocks.size * block.size,
              "num_blocks * block_size");
  kernels().rope_and_cache({qkv.data, floats(cos), floats(sin), ints(positions), key_cache.data,
                            value_cache.data, ints(slot_mapping), query.data, qkv.dtype,
                            key_cache.dtype, tokens.size, heads.size, kv_heads.size, dim.size,
                            block.size, interleaved, qkv.strides[0], cache_strides(key_cache, true),
                            cache_strides(value_cache, false)});
}

void flash_attention(TensorView query, TensorView key, TensorView value, TensorView cu_seqlens_q,
                     TensorView cu_seqlens_k, bool causal, float scale, TensorView out,
                     TensorView lse) {
  Check check("flash_attention");
  Axis tokens{"num_tokens"}, keys{"num_keys"}, heads{"n_heads"}, kv_heads{"n_kv_heads"},
      dim{"head_dim"}, bounds{"num_seqs + 1"};
  check.rows("query", query, {&tokens, &heads, &dim});
  check.rows("key", key, {&keys, &kv_heads, &dim});
  check.rows("value", value, {&keys, &kv_heads, &dim}, key.dtype);
  check_token_strides(check, key, value, 0, "key and value");
  check.int32("cu_seqlens_q", cu_seqlens_q, {&bounds});
  check.int32("cu_seqlens_k", cu_seqlens_k, {&bounds});
  check.floats("out", out, {&tokens, &heads, &dim}, query.dtype);
  check.float32("lse", lse, {&tokens, &heads});
  check.writable("out", out);
  check.writable("lse", lse);
  check_heads(check, heads.size, kv_heads.size);
  check.offsets("cu_seqlens_q", cu_seqlens_q, tokens.size, "num_tokens");
  check.offsets("cu_seqlens_k", cu_seqlens_k, keys.size, "num_keys");
  kernels().flash_attention({query.data, key.data, value.data, ints(cu_seqlens_q),
                             ints(cu_seqlens_k), out.data, floats(lse), query.dtype, key.dtype,
                             tokens.size, keys.size, bounds.size - 1, heads.size, kv_heads.size,
                             dim.size, attention_scale(check, scale, dim.size), causal,
                             query.strides[0], key.strides[0]});
}

void paged_attention(TensorView query, TensorView key_cache, TensorView value_cache,
                     TensorView block_tables, TensorView seq_lens, TensorView cu_seqlens_q,
                     float scale, TensorView out, TensorView lse) {
  Check check("paged_attention");
  Axis tokens{"num_tokens"}, heads{"n_heads"}, kv_heads{"n_kv_heads"}, dim{"head_dim"},
      blocks{"num_blocks"}, block{"block_size"}, seqs{"num_seqs"}, max_blocks{"max_blocks"};
  check.rows("query", query, {&tokens, &heads, &dim});
  check.cache("key_cache", key_cache, {&blocks, &kv_heads, &block, &dim});
  check.cache("value_cache", value_cache, {&blocks, &kv_heads, &block, &dim}, key_cache.dtype);
  check_token_strides(check, key_cache, value_cache, 2, "key_cache and value_cache");
  check.int32("block_tables", block_tables, {&seqs, &max_blocks});
  check.int32("seq_lens", seq_lens, {&seqs});
  Axis bounds{"num_seqs + 1", seqs.size + 1};
  check.int32("cu_seqlens_q", cu_seqlens_q, {&bounds});
  check.floats("out", out, {&tokens, &heads, &dim}, query.dtype);
  check.float32("lse", lse, {&tokens, &heads});
  check.writable("out", out);
  check.writable("lse", lse);
  check_heads(check, heads.size, kv_heads.size);
  check_block_size(check, block.size);
  check.offsets("cu_seqlens_q", cu_seqlens_q, tokens.size, "num_tokens");
  check_pages(check, block_tables, seq_lens, cu_seqlens_q, blocks.size, block.size);
  kernels().paged_attention({query.data,
                             key_cache.data,
                             value_cache.data,
                             ints(block_tables),
                             ints(seq_lens),
                             ints(cu_seqlens_q),
                             out.data,
                             floats(lse),
                             query.dtype,
                             key_cache.dtype,
                             tokens.size,
                             seqs.size,
                             max_blocks.size,
                             heads.size,
                             kv_heads.size,
                             dim.size,
                             block.size,
                             attention_scale(check, scale, dim.size),
                             query.strides[0],
                             cache_strides(key_cache, true),
                             cache_strides(value_cache, false),
                             blocks.size,
                             query.dtype});
}

void merge_attention(TensorView out_a, TensorView lse_a, TensorView out_b, TensorView lse_b,
                     TensorView out, TensorView lse) {
  Check check("merge_attention");
  Axis tokens{"num_tokens"}, heads{"n_heads"}, dim{"head_dim"};
  check.floats("out_a", out_a, {&tokens, &heads, &dim});
  check.float32("lse_a", lse_a, {&tokens, &heads});
  check.floats("out_b", out_b, {&tokens, &heads, &dim}, out_a.dtype);
  check.float32("lse_b", lse_b, {&tokens, &heads});
  check.floats("out", out, {&tokens, &heads, &dim}, out_a.dtype);
  check.float32("lse", lse, {&tokens, &heads});
  check.writable("out", out);
  check.writable("lse", lse);
  kernels().merge_attention({out_a.data, out_b.data, floats(lse_a), floats(lse_b), out.data,
                             floats(lse), out_a.dtype, tokens.size, heads.size, dim.size});
}

void silu_and_mul(TensorView gate_up, TensorView out) {
  Check check("silu_and_mul");
  Axis tokens{"num_tokens"}, both{"2 * hidden_dim"};
  check.floats("gate_up", gate_up, {&tokens, &both});
  check.require(both.size % 2 == 0, [&] {
    return "gate_up must be (num_tokens, 2 * hidden_dim), got rows of " + std::to_string(both.size);
  });
  Axis hidden{"hidden_dim", both.size / 2};
  check.floats("out", out, {&tokens, &hidden}, gate_up.dtype);
  check.writable("out", out);
  kernels().silu_and_mul({gate_up.data, out.data, out.dtype, tokens.size, hidden.size, out.dtype});
}

namespace {

struct Repeated {
  int64_t count, stride;
};

// Rows that follow one another are one piece, whichever of the two axes is the inner one.
BlockPieces pieces_of_block(int64_t block_stride, Repeated outer, Repeated inner, int64_t bytes) {
  if (inner.stride > outer.stride) std::swap(inner, outer);
  if (inner.stride == bytes || inner.count == 1) {
    bytes *= inner.count;
    inner.count = 1;
    if (outer.stride == bytes || outer.count == 1) {
      bytes *= outer.count;
      outer.count = 1;
    }
  }
  return {block_stride, outer.count, outer.stride, inner.count, inner.stride, bytes};
}

}  // namespace

void copy_blocks(TensorView key_cache, TensorView value_cache, TensorView block_pairs) {
  Check check("copy_blocks");
  Axis blocks{"num_blocks"}, kv_heads{"n_kv_heads"}, block{"block_size"}, dim{"head_dim"},
      pairs{"num_pairs"}, two{"2", 2};
  check.cache("key_cache", key_cache, {&blocks, &kv_heads, &block, &dim});
  check.cache("value_cache", value_cache, {&blocks, &kv_heads, &block, &dim}, key_cache.dtype);
  check.int32("block_pairs", block_pairs, {&pairs, &two});
  check.writable("key_cache", key_cache);
  check.writable("value_cache", value_cache);
  check.range("block_pairs", block_pairs, 0, blocks.size, "num_blocks");
  const auto block_bytes = [&](bool key) {
    const int64_t group_bytes = cache_group_bytes(key_cache.dtype, dim.size, key);
    return kv_heads.size * (block.size * group_bytes / kCacheGroup);
  };
  const auto pieces = [&](const TensorView& cache, bool key) {
    const CacheStrides strides = cache_strides(cache, key);
    const bool floats = is_float(cache.dtype);
    const int64_t row = floats ? dim.size * item_size(cache.dtype) : strides.group;
    return pieces_of_block(
        strides.block, {kv_heads.size, strides.head},
        {floats ? block.size : block.size / kCacheGroup, floats ? strides.token : strides.group},
        row);
  };
  kernels().copy_blocks({key_cache.data, value_cache.data, ints(block_pairs), pairs.size,
                         block_bytes(true), block_bytes(false), pieces(key_cache, true),
                         pieces(value_cache, false)});
}

#ifndef CLRT_CUDA  // whose formats are made by Python
void quantize(TensorView weight, TensorView payload) {
  Check check("quantize");
  Axis n{"out_features"}, k{"in_features"};
  check.floats("weight", weight, {&n, &k});
  check.require(payload.dtype == DType::kInt8 || payload.dtype == DType::kInt4,
                std::string("dtype must be int8 or int4, got ") + payload.dtype_text);
  check.weight("payload", payload, {&n, &k});
  check.writable("payload", payload);
  kernels().quantize({weight.data, payload.data, weight.dtype, payload.dtype, n.size, k.size});
}

void repack(TensorView weight, TensorView tiles) {
  Check check("repack");
  Axis n{"out_features"}, k{"in_features"};
  check.require(is_gguf(weight.dtype),
                std::string("weight must be in a format of GGUF, got ") + weight.dtype_text);
  check.weight("weight", weight, {&n, &k});
  check.weight("tiles", tiles, {&n, &k}, DType(int(weight.dtype) + kNumGgufFormats));
  check.writable("tiles", tiles);
  kernels().repack({weight.data, tiles.data, weight.dtype, n.size, k.size});
}

namespace {

const double* doubles(const TensorView& t) { return static_cast<const double*>(t.data); }

// Every element of a float64 vector in [low, high].
void check_within(Check& check, const char* name, const TensorView& t, double low, double high,
                  const char* wanted) {
  for (int64_t i = 0; i < t.shape[0]; ++i) {
    if (doubles(t)[i] >= low && doubles(t)[i] <= high) continue;
    check.require(false, std::string(name) + "[" + std::to_string(i) + "] must be " + wanted +
                             ", got " + std::to_string(doubles(t)[i]));
  }
}

// Lists of tokens, one per sample.
void check_lists(Check& check, const char* offsets_name, const TensorView& offsets,
                 const char* ids_name, const TensorView& ids, int64_t num_samples,
                 int64_t vocab_size, const char* total_is) {
  Axis bounds{"num_samples + 1", num_samples + 1}, entries{total_is};
  check.int32(offsets_name, offsets, {&bounds});
  check.int32(ids_name, ids, {&entries});
  check.offsets(offsets_name, offsets, entries.size, total_is);
  check.range(ids_name, ids, 0, vocab_size, "vocab_size");
}

}  // namespace

void sample(TensorView logits, TensorView rows, TensorView temperature, TensorView top_k,
            TensorView top_p, TensorView min_p, TensorView seed, TensorView index,
            TensorView position, TensorView repetition_penalty, TensorView presence_penalty,
            TensorView frequency_penalty, TensorView seen_offsets, TensorView seen_ids,
            TensorView seen_counts, TensorView bias_offsets, TensorView bias_ids,
            TensorView bias_values, TensorView masks, TensorView mask_rows, TensorView token_ids,
            TensorView has_token) {
  Check check("sample");
  Axis num_logits{"num_logits"}, vocab{"vocab_size"}, samples{"num_samples"};
  check.float32("logits", logits, {&num_logits, &vocab});
  check.int32("rows", rows, {&samples});
  const std::pair<const char*, const TensorView*> reals[] = {
      {"temperature", &temperature},
      {"top_p", &top_p},
      {"min_p", &min_p},
      {"repetition_penalty", &repetition_penalty},
      {"presence_penalty", &presence_penalty},
      {"frequency_penalty", &frequency_penalty}};
  for (const auto& [name, tensor] : reals) check.array(name, *tensor, {&samples}, "float64", 8);
  check.int32("top_k", top_k, {&samples});
  check.array("seed", seed, {&samples}, "uint64", 8);
  check.array("index", index, {&samples}, "uint64", 8);
  check.array("position", position, {&samples}, "uint64", 8);
  check_lists(check, "seen_offsets", seen_offsets, "seen_ids", seen_ids, samples.size, vocab.size,
              "num_seen");
  Axis num_seen{"num_seen", seen_ids.shape[0]}, num_biases{"num_biases"};
  check.int32("seen_counts", seen_counts, {&num_seen});
  check_lists(check, "bias_offsets", bias_offsets, "bias_ids", bias_ids, samples.size, vocab.size,
              "num_biases");
  num_biases.size = bias_ids.shape[0];
  check.array("bias_values", bias_values, {&num_biases}, "float64", 8);
  Axis num_masks{"num_masks"}, words{"ceil(vocab_size / 32)", (vocab.size + 31) / 32};
  check.array("masks", masks, {&num_masks, &words}, "uint32", 4);
  check.int32("mask_rows", mask_rows, {&samples});
  check.int32("token_ids", token_ids, {&samples});
  check.array("has_token", has_token, {&samples}, "bool", 1);
  check.writable("token_ids", token_ids);
  check.writable("has_token", has_token);
  check.require(vocab.size > 0, "logits must have a token, got vocab_size=0");
  check.range("rows", rows, 0, num_logits.size, "num_logits");
  check.range("top_k", top_k, 0, int64_t{1} << 31, "2^31");
  check.range("seen_counts", seen_counts, 0, int64_t{1} << 31, "2^31");
  check.range("mask_rows", mask_rows, -1, num_masks.size, "num_masks");
  constexpr double kMost = std::numeric_limits<double>::max();
  check_within(check, "temperature", temperature, 0, kMost, "finite and not negative");
  check_within(check, "top_p", top_p, std::numeric_limits<double>::denorm_min(), 1, "in (0, 1]");
  check_within(check, "min_p", min_p, 0, 1, "in [0, 1]");
  check_within(check, "repetition_penalty", repetition_penalty, 0.01, 100, "in [0.01, 100]");
  check_within(check, "presence_penalty", presence_penalty, -kMost, kMost, "finite");
  check_within(check, "frequency_penalty", frequency_penalty, -kMost, kMost, "finite");
  check_within(check, "bias_values", bias_values, -INFINITY, kMost, "a number below infinity");
  const auto words_of = [](const TensorView& t) { return static_cast<const uint64_t*>(t.data); };
  kernels().sample({floats(logits),
                    ints(rows),
                    doubles(temperature),
                    doubles(top_p),
                    doubles(min_p),
                    ints(top_k),
                    words_of(seed),
                    words_of(index),
                    words_of(position),
                    doubles(repetition_penalty),
                    doubles(presence_penalty),
                    doubles(frequency_penalty),
                    ints(seen_offsets),
                    ints(seen_ids),
                    ints(seen_counts),
                    ints(bias_offsets),
                    ints(bias_ids),
                    doubles(bias_values),
                    ints(mask_rows),
                    static_cast<const uint32_t*>(masks.data),
                    static_cast<int32_t*>(token_ids.data),
                    static_cast<uint8_t*>(has_token.data),
                    samples.size,
                    vocab.size});
}

void token_logprobs(TensorView logits, TensorView rows, TensorView token_ids, TensorView logprobs,
                    TensorView ranks, TensorView top_ids) {
  Check check("token_logprobs");
  Axis num_logits{"num_logits"}, vocab{"vocab_size"}, tokens{"num_tokens"}, top{"num_top"};
  check.float32("logits", logits, {&num_logits, &vocab});
  check.int32("rows", rows, {&tokens});
  check.int32("token_ids", token_ids, {&tokens});
  check.int32("ranks", ranks, {&tokens});
  check.int32("top_ids", top_ids, {&tokens, &top});
  Axis all{"1 + num_top", 1 + top.size};
  check.array("logprobs", logprobs, {&tokens, &all}, "float64", 8);
  check.writable("ranks", ranks);
  check.writable("top_ids", top_ids);
  check.writable("logprobs", logprobs);
  check.range("rows", rows, 0, num_logits.size, "num_logits");
  check.range("token_ids", token_ids, 0, vocab.size, "vocab_size");
  const auto written = [](const TensorView& t) { return static_cast<int32_t*>(t.data); };
  kernels().token_logprobs({floats(logits), ints(rows), ints(token_ids),
                            static_cast<double*>(logprobs.data), written(ranks), written(top_ids),
                            tokens.size, vocab.size, top.size});
}
#endif

}  // namespace launch
}  // namespace codellama_rt
