// The C functions of codellama_rt.h: plain structs to the launchers, exceptions to results.
#pragma GCC visibility push(default)
#include "codellama_rt.h"
#pragma GCC visibility pop

#include <climits>
#include <cstring>
#include <new>
#include <string>

#include "common/launch.h"
#include "cpu/ops/decoder_layer.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"

namespace codellama_rt {
namespace {

thread_local std::string last_error;

int fail(int result, const char* text) {
  try {
    last_error = text;
  } catch (...) {
    last_error.clear();
  }
  return result;
}

template <typename Body>
int guard(const Body& body) noexcept {
  try {
    body();
    return CODELLAMA_RT_OK;
  } catch (const DtypeError& error) {
    return fail(CODELLAMA_RT_INVALID_DTYPE, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(CODELLAMA_RT_INVALID_VALUE, error.what());
  } catch (const std::bad_alloc&) {
    return fail(CODELLAMA_RT_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(CODELLAMA_RT_FAILED, error.what());
  } catch (...) {
    return fail(CODELLAMA_RT_FAILED, "an unknown error");
  }
}

DType dtype_named(const char* name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32}) {
    if (std::strcmp(name, dtype_name(dtype)) == 0) return dtype;
  }
  return quantized_dtype(name);
}

// Bytes of a weight or a cache; -1: no such dtype, or sizes it cannot have.
int64_t num_bytes_of_weight(DType dtype, int64_t n, int64_t k) {
  if (!is_weight_dtype(dtype) || n < 0 || k < 0 || k % weight_block(dtype) != 0) return -1;
  if (k > kMaxElements || (k > 0 && n > kMaxElements / k)) return -1;
  return weight_bytes(dtype, n, k);
}

int64_t num_bytes_of_cache(DType dtype, bool key, const int64_t* shape) {
  if (!is_cache_dtype(dtype) || shape[2] % kCacheGroup != 0) return -1;
  if (dtype == DType::kInt4 && shape[3] % kInt4Step != 0) return -1;
  if (shape[3] > kMaxElements) return -1;
  for (int i = 0; i < 4; ++i) {
    if (shape[i] < 0) return -1;
  }
  int64_t bytes = cache_group_bytes(dtype, shape[3], key);
  for (const int64_t count : {shape[0], shape[1], shape[2] / kCacheGroup}) {
    if (__builtin_mul_overflow(bytes, count, &bytes)) return -1;
  }
  return bytes;
}

TensorView view(const codellama_rt_tensor& tensor, bool key = false) {
  TensorView t;
  t.data = tensor.data;
  t.dtype_text = tensor.dtype ? tensor.dtype : "no dtype";
  t.dtype = dtype_named(t.dtype_text);
  t.writable = tensor.read_only == 0;
  if (tensor.ndim < 0 || tensor.ndim > kMaxDims) {
    throw std::invalid_argument("a tensor of an op has at most 4 dimensions, got " +
                                std::to_string(tensor.ndim));
  }
  t.ndim = tensor.ndim;
  int64_t elements = 1;
  bool strided = false;
  for (int i = 0; i < t.ndim; ++i) {
    t.shape[i] = tensor.shape[i];
    strided = strided || tensor.strides[i] != 0;
    if (t.shape[i] == 0) elements = 0;
  }
  set_contiguous_strides(t);
  if (!t.data && elements != 0) throw std::invalid_argument("a tensor's data is null");
  if (is_float(t.dtype) || t.dtype == DType::kInt32 || t.dtype == DType::kOther) {
    for (int i = 0; strided && i < t.ndim; ++i) t.strides[i] = tensor.strides[i];
    return t;
  }
  t.num_bytes = t.ndim == 4   ? num_bytes_of_cache(t.dtype, key, t.shape)
                : t.ndim == 2 ? num_bytes_of_weight(t.dtype, t.shape[0], t.shape[1])
                              : -1;
  if (strided && (t.ndim != 4 || tensor.strides[0] <= 0 || tensor.strides[1] <= 0 ||
                  tensor.strides[2] != 0 || tensor.strides[3] != 0)) {
    throw std::invalid_argument(
        "a quantised cache may have strides of blocks and of heads alone, in bytes; other "
        "quantised tensors are contiguous");
  }
  for (int i = 0; strided && i < 2; ++i) t.piece_strides[i] = tensor.strides[i];
  return t;
}
TensorView keys(const codellama_rt_tensor& cache) { return view(cache, true); }

// A copy of the caller's struct, which may be of an older version: what it lacks is zero.
template <typename Args>
Args read(const Args* args) {
  constexpr size_t kLeast = offsetof(Args, num_threads) + sizeof(int32_t);
  if (!args || args->struct_size < kLeast || args->struct_size > sizeof(Args)) {
    throw std::invalid_argument(
        "struct_size must be sizeof the struct, of a header no newer than the library");
  }
  Args whole{};
  std::memcpy(&whole, args, args->struct_size);
  if (whole.num_threads < 0) {
    throw std::invalid_argument("num_threads must not be negative, got " +
                                std::to_string(whole.num_threads));
  }
  return whole;
}

template <typename Args, typename Body>
int run(const Args* given, const Body& body) {
  return guard([&] {
    const Args args = read(given);
    const ThreadLimit limit(args.num_threads > 0 ? args.num_threads : INT_MAX);
    body(args);
  });
}

Weights weights_of(const codellama_rt_linear_args& a) {
  if (a.num_weights < 1 || a.num_weights > kMaxWeights) {
    throw std::invalid_argument("linear: takes 1 to 3 weights, got " +
                                std::to_string(a.num_weights));
  }
  Weights weights;
  for (int i = 0; i < a.num_weights; ++i) weights.add(view(a.weights[i]));
  return weights;
}

}  // namespace
}  // namespace codellama_rt

using namespace codellama_rt;

#define CLRT_C_OP(name) int codellama_rt_##name(const codellama_rt_##name##_args* args)

CLRT_C_OP(embedding) {
  return run(args,
             [](auto& a) { launch::embedding(view(a.token_ids), view(a.table), view(a.out)); });
}
CLRT_C_OP(rms_norm) {
  return run(args,
             [](auto& a) { launch::rms_norm(view(a.x), view(a.weight), a.eps, view(a.out)); });
}
CLRT_C_OP(add_rms_norm) {
  return run(args, [](auto& a) {
    launch::add_rms_norm(view(a.x), view(a.residual), view(a.weight), a.eps, view(a.out),
                         view(a.residual_out));
  });
}
CLRT_C_OP(linear) {
  return run(args, [](auto& a) { launch::linear(view(a.x), weights_of(a), view(a.out)); });
}
CLRT_C_OP(apply_rotary_pos_emb) {
  return run(args, [](auto& a) {
    launch::apply_rotary_pos_emb(view(a.query), view(a.key), view(a.cos), view(a.sin),
                                 view(a.positions), a.interleaved != 0);
  });
}
CLRT_C_OP(reshape_and_cache) {
  return run(args, [](auto& a) {
    launch::reshape_and_cache(view(a.key), view(a.value), keys(a.key_cache), view(a.value_cache),
                              view(a.slot_mapping));
  });
}
CLRT_C_OP(rope_and_cache) {
  return run(args, [](auto& a) {
    launch::rope_and_cache(view(a.qkv), view(a.cos), view(a.sin), view(a.positions),
                           keys(a.key_cache), view(a.value_cache), view(a.slot_mapping),
                           a.interleaved != 0, view(a.query));
  });
}
CLRT_C_OP(flash_attention) {
  return run(args, [](auto& a) {
    launch::flash_attention(view(a.query), view(a.key), view(a.value), view(a.cu_seqlens_q),
                            view(a.cu_seqlens_k), a.causal != 0, a.scale, view(a.out), view(a.lse));
  });
}
CLRT_C_OP(paged_attention) {
  return run(args, [](auto& a) {
    launch::paged_attention(view(a.query), keys(a.key_cache), view(a.value_cache),
                            view(a.block_tables), view(a.seq_lens), view(a.cu_seqlens_q), a.scale,
                            view(a.out), view(a.lse));
  });
}
CLRT_C_OP(merge_attention) {
  return run(args, [](auto& a) {
    launch::merge_attention(view(a.out_a), view(a.lse_a), view(a.out_b), view(a.lse_b), view(a.out),
                            view(a.lse));
  });
}
CLRT_C_OP(silu_and_mul) {
  return run(args, [](auto& a) { launch::silu_and_mul(view(a.gate_up), view(a.out)); });
}
CLRT_C_OP(copy_blocks) {
  return run(args, [](auto& a) {
    launch::copy_blocks(keys(a.key_cache), view(a.value_cache), view(a.block_pairs));
  });
}
CLRT_C_OP(quantize) {
  return run(args, [](auto& a) { launch::quantize(view(a.weight), view(a.payload)); });
}
CLRT_C_OP(repack) {
  return run(args, [](auto& a) { launch::repack(view(a.weight), view(a.tiles)); });
}
CLRT_C_OP(sample) {
  return run(args, [](auto& a) {
    launch::sample(view(a.logits), view(a.rows), view(a.temperature), view(a.top_k), view(a.top_p),
                   view(a.min_p), view(a.seed), view(a.index), view(a.position),
                   view(a.repetition_penalty), view(a.presence_penalty), view(a.frequency_penalty),
                   view(a.seen_offsets), view(a.seen_ids), view(a.seen_counts),
                   view(a.bias_offsets), view(a.bias_ids), view(a.bias_values), view(a.masks),
                   view(a.mask_rows), view(a.token_ids), view(a.has_token));
  });
}
CLRT_C_OP(token_logprobs) {
  return run(args, [](auto& a) {
    launch::token_logprobs(view(a.logits), view(a.rows), view(a.token_ids), view(a.logprobs),
                           view(a.ranks), view(a.top_ids));
  });
}
CLRT_C_OP(decoder_layer) {
  return run(args, [](auto& a) {
    launch::decoder_layer({view(a.x),
                           view(a.attention_norm),
                           view(a.q_proj),
                           view(a.k_proj),
                           view(a.v_proj),
                           view(a.o_proj),
                           view(a.mlp_norm),
                           view(a.gate_proj),
                           view(a.up_proj),
                           view(a.down_proj),
                           view(a.cos),
                           view(a.sin),
                           view(a.positions),
                           keys(a.key_cache),
                           view(a.value_cache),
                           view(a.slot_mapping),
                           view(a.block_tables),
                           view(a.seq_lens),
                           view(a.cu_seqlens_q),
                           view(a.out),
                           a.eps,
                           a.interleaved != 0});
  });
}

int64_t codellama_rt_weight_bytes(const char* dtype, int64_t n, int64_t k) {
  return dtype ? num_bytes_of_weight(dtype_named(dtype), n, k) : -1;
}

int64_t codellama_rt_cache_bytes(const char* dtype, int32_t is_key, int64_t num_blocks,
                                 int64_t n_kv_heads, int64_t block_size, int64_t head_dim) {
  const int64_t shape[] = {num_blocks, n_kv_heads, block_size, head_dim};
  return dtype ? num_bytes_of_cache(dtype_named(dtype), is_key != 0, shape) : -1;
}

int32_t codellama_rt_num_threads() {
  int32_t threads = -1;
  guard([&] { threads = num_threads(); });
  return threads;
}

int codellama_rt_set_num_threads(int32_t n) {
  return guard([&] {
    if (n < 1) {
      throw std::invalid_argument("num_threads must be at least 1, got " + std::to_string(n));
    }
    set_num_threads(n);
  });
}

const char* codellama_rt_isa() { return kernels().isa; }

int codellama_rt_set_isa(const char* name) {
  return guard([&] {
    if (name && set_isa(name)) return;
    size_t n = 0;
    const KernelTable* const* tables = available_isas(&n);
    std::string names;
    for (size_t i = 0; i < n; ++i) names += std::string(" ") + tables[i]->isa;
    throw std::invalid_argument(std::string("instruction set '") + (name ? name : "") +
                                "' is not available; available:" + names);
  });
}

int32_t codellama_rt_api_version() { return CODELLAMA_RT_API_VERSION; }

const char* codellama_rt_last_error() { return last_error.c_str(); }
