// One step of decoding in a C++ program: RoPE, the cache, attention. No Python is loaded.
//
// The cache is the program's own: one pool (num_blocks, 2, block_size, n_kv_heads, head_dim) that
// holds keys and values side by side, token by token. The operators see two views of it.
#include <codellama_rt.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr int64_t kHeads = 8, kKvHeads = 2, kHeadDim = 64;
constexpr int64_t kBlockSize = 32, kNumBlocks = 6, kLength = 70;

codellama_rt_tensor tensor(void* data, const char* dtype, std::vector<int64_t> shape) {
  codellama_rt_tensor t = {};
  t.data = data;
  t.dtype = dtype;
  t.ndim = int32_t(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) t.shape[i] = shape[i];
  return t;
}

codellama_rt_tensor floats(std::vector<float>& data, std::vector<int64_t> shape) {
  return tensor(data.data(), "float32", shape);
}

codellama_rt_tensor ints(std::vector<int32_t>& data, std::vector<int64_t> shape) {
  return tensor(data.data(), "int32", shape);
}

// Keys (0) or values (1) of the pool, seen as (num_blocks, n_kv_heads, block_size, head_dim).
codellama_rt_tensor cache_view(std::vector<float>& pool, int which) {
  const int64_t token = kKvHeads * kHeadDim, part = kBlockSize * token;
  codellama_rt_tensor t =
      tensor(pool.data() + which * part, "float32", {kNumBlocks, kKvHeads, kBlockSize, kHeadDim});
  const int64_t strides[4] = {2 * part, kHeadDim, token, 1};
  for (int i = 0; i < 4; ++i) t.strides[i] = strides[i];
  return t;
}

bool ok(int result) {
  if (result != CODELLAMA_RT_OK) std::fprintf(stderr, "%s\n", codellama_rt_last_error());
  return result == CODELLAMA_RT_OK;
}

// The same attention in ten lines: the largest difference.
float difference(const std::vector<float>& query, const std::vector<float>& pool,
                 const std::vector<int32_t>& table, const std::vector<float>& out) {
  const int64_t token = kKvHeads * kHeadDim, part = kBlockSize * token;
  float worst = 0;
  for (int64_t h = 0; h < kHeads; ++h) {
    std::vector<double> sum(kHeadDim);
    double weights = 0;
    for (int64_t i = 0; i < kLength; ++i) {
      const float* key = pool.data() + table[i / kBlockSize] * 2 * part + i % kBlockSize * token +
                         h / (kHeads / kKvHeads) * kHeadDim;
      double score = 0;
      for (int64_t d = 0; d < kHeadDim; ++d) score += double(query[h * kHeadDim + d]) * key[d];
      const double weight = std::exp(score / std::sqrt(double(kHeadDim)));
      weights += weight;
      for (int64_t d = 0; d < kHeadDim; ++d) sum[d] += weight * key[part + d];
    }
    for (int64_t d = 0; d < kHeadDim; ++d) {
      worst = std::fmax(worst, std::fabs(float(sum[d] / weights) - out[h * kHeadDim + d]));
    }
  }
  return worst;
}

}  // namespace

int main() {
  if (codellama_rt_api_version() < CODELLAMA_RT_API_VERSION) return 2;
  const int64_t width = (kHeads + 2 * kKvHeads) * kHeadDim;
  std::vector<float> pool(kNumBlocks * 2 * kBlockSize * kKvHeads * kHeadDim);
  std::vector<int32_t> table = {3, 1, 4}, seq_lens = {kLength}, first_query = {0, 1};
  std::vector<float> qkv(kLength * width), query(kLength * kHeads * kHeadDim);
  std::vector<float> cos(kLength * kHeadDim / 2), sin(cos.size());
  std::vector<int32_t> positions(kLength), slots(kLength);
  uint32_t random = 1;
  for (float& x : qkv) {
    random = random * 1664525u + 1013904223u;
    x = float(random >> 8) / float(1 << 23) - 1;
  }
  for (int64_t i = 0; i < kLength; ++i) {
    positions[i] = int32_t(i);
    slots[i] = int32_t(table[i / kBlockSize] * kBlockSize + i % kBlockSize);
    for (int64_t d = 0; d < kHeadDim / 2; ++d) {
      const double angle = double(i) * std::pow(10000.0, -2.0 * double(d) / kHeadDim);
      cos[i * kHeadDim / 2 + d] = float(std::cos(angle));
      sin[i * kHeadDim / 2 + d] = float(std::sin(angle));
    }
  }

  codellama_rt_rope_and_cache_args rope = {};
  rope.struct_size = sizeof rope;
  rope.qkv = floats(qkv, {kLength, width});
  rope.cos = floats(cos, {kLength, kHeadDim / 2});
  rope.sin = floats(sin, {kLength, kHeadDim / 2});
  rope.positions = ints(positions, {kLength});
  rope.key_cache = cache_view(pool, 0);
  rope.value_cache = cache_view(pool, 1);
  rope.slot_mapping = ints(slots, {kLength});
  rope.query = floats(query, {kLength, kHeads, kHeadDim});
  if (!ok(codellama_rt_rope_and_cache(&rope))) return 1;

  std::vector<float> last(query.end() - kHeads * kHeadDim, query.end());
  std::vector<float> out(last.size()), lse(kHeads);
  codellama_rt_paged_attention_args attention = {};
  attention.struct_size = sizeof attention;
  attention.num_threads = 1;
  attention.query = floats(last, {1, kHeads, kHeadDim});
  attention.key_cache = rope.key_cache;
  attention.value_cache = rope.value_cache;
  attention.block_tables = ints(table, {1, 3});
  attention.seq_lens = ints(seq_lens, {1});
  attention.cu_seqlens_q = ints(first_query, {2});
  attention.out = floats(out, {1, kHeads, kHeadDim});
  attention.lse = floats(lse, {1, kHeads});
  if (!ok(codellama_rt_paged_attention(&attention))) return 1;

  const float worst = difference(last, pool, table, out);
  std::printf("%s, %d threads: largest difference %.1e\n", codellama_rt_isa(),
              int(codellama_rt_num_threads()), worst);
  attention.seq_lens = ints(seq_lens, {2});  // a mistake is told in words
  if (codellama_rt_paged_attention(&attention) != CODELLAMA_RT_INVALID_VALUE) return 1;
  std::printf("%s\n", codellama_rt_last_error());
  return worst < 1e-5f ? 0 : 1;
}
