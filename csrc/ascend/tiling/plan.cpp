#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace codellama_rt {
namespace ascend {
namespace {

constexpr int64_t kMostRepeats = 255;  // of a vector instruction; here a head each

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void require_common(int64_t element_type, int64_t num_cores) {
  require(element_type == kFloat16 || element_type == kBFloat16,
          "the Ascend kernels take float16 and bfloat16");
  require(num_cores >= 1 && num_cores <= kMaxCores, "num_cores must be in [1, " +
                                                        std::to_string(kMaxCores) + "], got " +
                                                        std::to_string(num_cores));
}

void require_head_dim(int64_t head_dim) {
  require(head_dim >= 16 && head_dim <= 256 && head_dim % 16 == 0,
          "head_dim must be a multiple of 16 up to 256 (rows of 32 bytes), got " +
              std::to_string(head_dim));
}

// As even as whole tasks go; the longer shares first.
Shares share(int64_t num_tasks, int64_t num_cores) {
  Shares s{};
  const int64_t each = num_tasks / num_cores, longer = num_tasks % num_cores;
  for (int64_t c = 0; c <= kMaxCores; ++c) {
    const int64_t core = std::min(c, num_cores);
    s.first[c] = core * each + std::min(core, longer);
  }
  return s;
}

// The most heads at a time that leave work for every core, as far as `fits` goes.
template <typename Fits, typename TasksPerToken>
int64_t chunk_of_heads(int64_t num_tokens, int64_t most, int64_t num_cores, const Fits& fits,
                       const TasksPerToken& tasks_per_token) {
  int64_t chunk = most;
  while (chunk > 1 && !fits(chunk)) chunk = ceil_div(chunk, 2);
  while (chunk > 1 && num_tokens * tasks_per_token(chunk) < num_cores) chunk = ceil_div(chunk, 2);
  return chunk;
}

}  // namespace

// Buffers as in op_kernel/rope_and_cache.cpp.
int64_t ub_bytes(const RopeAndCacheTiling& t) {
  const int64_t row = t.chunk_heads * t.head_dim;
  const int64_t in_out = 2 * up(row * 2, kDmaBytes) * 3;  // in, out, passed through: two each
  const int64_t tables = 2 * t.head_dim * 4;
  return in_out + tables + 3 * row * 4;
}

RopeAndCacheTiling plan_rope_and_cache(int64_t num_tokens, int64_t n_heads, int64_t n_kv_heads,
                                       int64_t head_dim, int64_t block_size, int64_t element_type,
                                       int64_t num_cores) {
  require_common(element_type, num_cores);
  require_head_dim(head_dim);
  RopeAndCacheTiling t{};
  t.num_tokens = num_tokens;
  t.n_heads = n_heads;
  t.n_kv_heads = n_kv_heads;
  t.head_dim = head_dim;
  t.block_size = block_size;
  t.element_type = element_type;
  const auto per_token = [&](int64_t chunk) {
    return ceil_div(n_heads, chunk) + 2 * ceil_div(n_kv_heads, chunk);
  };
  const auto fits = [&](int64_t chunk) {
    t.chunk_heads = chunk;
    return ub_bytes(t) <= kUbBytes;
  };
  t.chunk_heads = chunk_of_heads(num_tokens, std::min(std::max(n_heads, n_kv_heads), kMostRepeats),
                                 num_cores, fits, per_token);
  t.tasks = share(num_tokens * per_token(t.chunk_heads), num_cores);
  return t;
}

int64_t ub_bytes(const ReshapeAndCacheTiling& t) { return 2 * t.chunk_heads * t.head_dim * 2; }

ReshapeAndCacheTiling plan_reshape_and_cache(int64_t num_tokens, int64_t n_kv_heads,
                                             int64_t head_dim, int64_t block_size,
                                             int64_t num_cores) {
  require_common(kFloat16, num_cores);
  require_head_dim(head_dim);
  ReshapeAndCacheTiling t{};
  t.num_tokens = num_tokens;
  t.n_kv_heads = n_kv_heads;
  t.head_dim = head_dim;
  t.block_size = block_size;
  const auto per_token = [&](int64_t chunk) { return 2 * ceil_div(n_kv_heads, chunk); };
  const auto fits = [&](int64_t chunk) {
    t.chunk_heads = chunk;
    return ub_bytes(t) <= kUbBytes;
  };
  t.chunk_heads = chunk_of_heads(num_tokens, n_kv_heads, num_cores, fits, per_token);
  t.tasks = share(num_tokens * per_token(t.chunk_heads), num_cores);
  return t;
}

// Buffers as in op_kernel/rms_norm.h.
int64_t ub_bytes(const RmsNormTiling& t, bool has_residual) {
  const int64_t row = up(t.dim * 2, kDmaBytes), floats = up(t.dim * 4, kDmaBytes);
  const int64_t in_out = t.num_buffers * (has_residual ? 4 : 2) * row;
  const int64_t sums = up(ceil_div(t.dim, kVectorFloats) * 4, kDmaBytes) + 9 * kDmaBytes;
  return in_out + row /* weight */ + 2 * floats + sums;
}

RmsNormTiling plan_rms_norm(int64_t num_tokens, int64_t dim, bool has_residual, float eps,
                            int64_t element_type, int64_t num_cores) {
  require_common(element_type, num_cores);
  RmsNormTiling t{};
  t.num_tokens = num_tokens;
  t.dim = dim;
  t.element_type = element_type;
  t.eps = eps;
  t.inverse_dim = 1.0f / float(dim);
  t.num_buffers = 2;
  if (ub_bytes(t, has_residual) > kUbBytes) t.num_buffers = 1;
  require(dim >= 1 && ub_bytes(t, has_residual) <= kUbBytes,
          "a row of dim=" + std::to_string(dim) + " does not fit the unified buffer");
  t.tasks = share(num_tokens, num_cores);
  return t;
}

// Buffers as in op_kernel/silu_and_mul.cpp.
int64_t ub_bytes(const SiluAndMulTiling& t) {
  const int64_t half = up(t.chunk * 2, kDmaBytes), floats = up(t.chunk * 4, kDmaBytes);
  return 2 * 3 * half + 3 * floats;
}

SiluAndMulTiling plan_silu_and_mul(int64_t num_tokens, int64_t hidden_dim, int64_t element_type,
                                   int64_t num_cores) {
  require_common(element_type, num_cores);
  constexpr int64_t kMostElements = 4096;  // 8 KB a DMA, 144 KB of buffers
  SiluAndMulTiling t{};
  t.num_tokens = num_tokens;
  t.hidden_dim = hidden_dim;
  t.element_type = element_type;
  t.chunk = std::min(kMostElements, up(hidden_dim, kVectorFloats));
  while (t.chunk > 256 && num_tokens * ceil_div(hidden_dim, t.chunk) < num_cores) {
    t.chunk = up(t.chunk / 2, kVectorFloats);
  }
  t.tasks = share(num_tokens * ceil_div(hidden_dim, t.chunk), num_cores);
  return t;
}

// Buffers as in op_kernel/paged_attention.cpp.
int64_t ub_bytes(const PagedAttentionTiling& t) {
  const int64_t group = t.n_heads / t.n_kv_heads, heads = group * t.head_dim;
  const int64_t pages = 2 * 2 * t.tile * t.head_dim * 2;  // keys and values, two tiles
  const int64_t query_out = 2 * heads * 2;
  const int64_t partials = 2 * t.slot_floats * 4;  // to and from the workspace
  const int64_t logsums = group * kDmaBytes;
  const int64_t floats = t.tile * t.head_dim * 4;
  const int64_t products = t.tile * std::max(t.head_dim, kVectorFloats) * 4;
  const int64_t spread = up(t.tile, kBlockFloats) * kDmaBytes;
  const int64_t scores = group * kVectorFloats * 4;
  const int64_t states = heads * 4 * 3 + 7 * up(group, kBlockFloats) * kDmaBytes;
  const int64_t numbers = up(group, kBlockFloats) * 4;
  return pages + query_out + partials + logsums + floats + products + spread + scores + states +
         numbers;
}

namespace {

void require_attention(const AttentionSizes& s, const int64_t* seq_lens, const int64_t* cu) {
  require_head_dim(s.head_dim);
  require(s.n_kv_heads >= 1 && s.n_heads % s.n_kv_heads == 0,
          "n_heads must be a multiple of n_kv_heads");
  require(s.block_size >= 16 && s.block_size % 16 == 0, "block_size must be a multiple of 16");
  require(cu[0] == 0 && cu[s.num_seqs] == s.num_tokens,
          "cu_seqlens_q must rise from 0 to num_tokens=" + std::to_string(s.num_tokens));
  for (int64_t i = 0; i < s.num_seqs; ++i) {
    const int64_t queries = cu[i + 1] - cu[i];
    require(queries >= 0, "cu_seqlens_q must not fall");
    require(seq_lens[i] >= queries && seq_lens[i] <= s.max_blocks * s.block_size,
            "seq_lens[" + std::to_string(i) + "]=" + std::to_string(seq_lens[i]) +
                " must be at least its queries (" + std::to_string(queries) +
                ") and at most max_blocks * block_size = " +
                std::to_string(s.max_blocks * s.block_size));
  }
}

int64_t row_weight(int64_t keys) { return keys + kUnitOverhead * num_splits(keys, kSplitTokens); }

// Where each core begins: at the first unit that no earlier core's share of the weight reaches.
void place_cores(PagedAttentionTiling* t, const int64_t* seq_lens, const int64_t* cu,
                 int64_t num_cores) {
  int64_t total = 0;
  for (int64_t s = 0; s < t->num_seqs; ++s) {
    const int64_t queries = cu[s + 1] - cu[s];
    for (int64_t i = 0; i < queries; ++i) {
      total += t->n_kv_heads * row_weight(visible_keys(seq_lens[s], queries, i));
    }
  }
  int64_t core = 0, weight = 0, last_sequence = 0;
  const auto target = [&] { return (core * total + num_cores - 1) / num_cores; };
  for (int64_t s = 0; s < t->num_seqs; ++s) {
    const int64_t queries = cu[s + 1] - cu[s];
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t keys = visible_keys(seq_lens[s], queries, i), of_row = row_weight(keys);
      last_sequence = s;
      for (int64_t head = 0; head < t->n_kv_heads; ++head, weight += of_row) {
        while (core < num_cores && target() < weight + of_row) {
          const int64_t inside = std::max<int64_t>(target() - weight, 0);
          const int64_t split = ceil_div(inside, kSplitTokens + kUnitOverhead);
          if (split >= num_splits(keys, kSplitTokens)) break;  // begins with the next row
          t->first[core++] = {(cu[s] + i) * t->n_kv_heads + head, split, s};
        }
      }
    }
  }
  for (; core <= kMaxCores; ++core) {
    t->first[core] = {t->num_tokens * t->n_kv_heads, 0, last_sequence};
  }
}

// Slots for the rows that end in another core than they begin in.
void place_slots(PagedAttentionTiling* t, const int64_t* seq_lens, const int64_t* cu) {
  int64_t open_row = -1, row_slot = 0;
  for (int64_t c = 0; c < kMaxCores; ++c) {
    const AttentionUnit &begin = t->first[c], &end = t->first[c + 1];
    t->inherited_slot[c] = begin.split > 0 && begin.row == open_row ? row_slot + begin.split : -1;
    t->open_slot[c] = -1;
    if (end.split == 0 || end.row == open_row) continue;
    const int64_t s = end.sequence, queries = cu[s + 1] - cu[s];
    const int64_t token = end.row / t->n_kv_heads;
    open_row = end.row;
    row_slot = t->open_slot[c] = t->num_slots;
    t->num_slots += num_splits(visible_keys(seq_lens[s], queries, token - cu[s]), kSplitTokens);
  }
}

}  // namespace

PagedAttentionTiling plan_paged_attention(const AttentionSizes& sizes, const int64_t* seq_lens,
                                          const int64_t* cu_seqlens_q, int64_t num_cores) {
  require_common(sizes.element_type, num_cores);
  require_attention(sizes, seq_lens, cu_seqlens_q);
  PagedAttentionTiling t{};
  t.num_tokens = sizes.num_tokens;
  t.num_seqs = sizes.num_seqs;
  t.max_blocks = sizes.max_blocks;
  t.n_heads = sizes.n_heads;
  t.n_kv_heads = sizes.n_kv_heads;
  t.head_dim = sizes.head_dim;
  t.block_size = sizes.block_size;
  t.element_type = sizes.element_type;
  t.scale = sizes.scale;
  t.split = kSplitTokens;
  t.slot_floats = sizes.n_heads / sizes.n_kv_heads * (sizes.head_dim + 2 * kBlockFloats);
  t.tile = kVectorFloats;  // its scores are one instruction's
  while (t.tile > 16 && ub_bytes(t) > kUbBytes) t.tile /= 2;
  require(ub_bytes(t) <= kUbBytes,
          "n_heads / n_kv_heads * head_dim is too much for the unified "
          "buffer; use attention=\"vendor\"");
  place_cores(&t, seq_lens, cu_seqlens_q, num_cores);
  place_slots(&t, seq_lens, cu_seqlens_q);
  return t;
}

}  // namespace ascend
}  // namespace codellama_rt
