// sample: the next token of each row, drawn from its processed logits
// Shapes   logits (num_logits, vocab_size); sample s reads row rows[s] of them; see ops.h
// Traffic  num_samples * vocab_size * 4 bytes read; a draw works on a float64 copy in the cache
// Limit    greedy: memory; a draw: arithmetic, one exp per token that top-k leaves, in float64 with
//          top-p or min-p, else in float32
// Tiling   one task = a sample, or several short ones; a row is looked at in blocks of 64 tokens,
//          and what cannot hold a candidate (its greatest element is too small) is skipped. A block
//          gets scores of its own, in float64, only if penalties, bias or the mask change it, or
//          something selects from it. Nothing is sorted: top-k and top-p look for their last token
//          by selection
// Numerics float64. A block is summed by halves, then blocks in order: one fixed order. No
//          multiplication is fused with an addition (CMakeLists.txt), so every instruction set
//          gives the same bits. Draws: Philox4x64-10 (Salmon et al., SC 2011) of seed, sample
//          index and position alone. Without cuts, float32 weights tell the token first, if it is
//          the same whatever their errors; else (a draw in 20 of the benchmark's) float64 does
#include <cmath>

#include "cpu/sampling/cuts.h"
#include "cpu/sampling/rough_weights.h"
#include "cpu/sampling/row.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// A number in [0, 1) from Philox4x64-10: key = seed and index, counter = position + 1, as NumPy
// counts up before it draws.
double uniform(uint64_t seed, uint64_t index, uint64_t position) {
  uint64_t counter[4] = {position + 1, 0, 0, 0}, key[2] = {seed, index};
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93 * counter[0];
    const unsigned __int128 second = (unsigned __int128)0xCA5A826395121157 * counter[2];
    const uint64_t next[4] = {uint64_t(second >> 64) ^ counter[1] ^ key[0], uint64_t(second),
                              uint64_t(first >> 64) ^ counter[3] ^ key[1], uint64_t(first)};
    std::memcpy(counter, next, sizeof(counter));
    key[0] += 0x9E3779B97F4A7C15;
    key[1] += 0xBB67AE8584CAA73B;
  }
  return double(counter[0] >> 11) * 0x1p-53;
}

// The block in which the cumulative distribution over ascending tokens passes `target`; `before` is
// the sum of the blocks before it.
int64_t find_block(double target, const Row& row, double& before) {
  double end = 0;
  int64_t block = 0;
  for (int64_t b = 0; b < row.num_blocks() && end <= target; ++b) {
    if (row.block_sum[b] == 0) continue;
    block = b;
    before = end;
    end += row.block_sum[b];
  }
  return block;
}

// The same within a block.
int64_t find_weight(double target, double before, const double* weights) {
  int64_t last = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    if (weights[i] == 0) continue;
    last = i;  // rounding may leave the target above the last sum
    before += weights[i];
    if (before > target) break;
  }
  return last;
}

// Draws from all scores; their weights are computed once more where the token is, and not kept.
int32_t draw_uncut(double u, const Scale& scale, Row& row) {
  double weights[kBlock], total = 0, before = 0;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    row.block_sum[b] = weigh(row, b, scale, weights);
    total += row.block_sum[b];
  }
  const int64_t block = find_block(u * total, row, before);
  weigh(row, block, scale, weights);
  return row.token(block * kBlock + find_weight(u * total, before, weights));
}

// Draws as draw_uncut, from float32 weights, or returns -1: u is too close to the end of a token's
// interval for them to tell. An error e_i of a weight moves the difference of a sum to a token and
// u times the sum of all by (1 - u) e_i or u e_i, so the errors of all weights bound that as well.
int32_t draw_roughly(double u, const Scale& scale, Row& row) {
  const float highest = float(scale.highest), factor = float(scale.factor);
  const double up = std::exp2((highest - scale.highest) * scale.factor);  // they are relative to it
  if (!(factor > 0x1p-30f && factor < 0x1p30f && up > 0.5 && up < 2)) return -1;
  float rough[kBlock];
  double weights[kBlock], before = 0;
  const auto is_rough = [&](int64_t b) {
    return row.sources[b] == Source::kLogits && row.block_size(b) == kBlock;
  };
  const auto weigh_rough = [&](int64_t b) {
    return weigh_roughly(row.logits + b * kBlock, highest, factor, rough, row.allowed(b));
  };
  Rough sums;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (is_rough(b)) {
      const Rough block = weigh_rough(b);
      row.block_sum[b] = up * block.weights;
      sums.exponents += up * block.exponents;
    } else {
      row.block_sum[b] = weigh(row, b, scale, weights);
    }
    sums.weights += row.block_sum[b];
  }
  const double target = u * sums.weights, error = sums.error();
  const int64_t block = find_block(target, row, before);
  if (is_rough(block)) {
    weigh_rough(block);
    for (int i = 0; i < kBlock; ++i) weights[i] = up * rough[i];
  } else {
    weigh(row, block, scale, weights);
  }
  const int64_t place = find_weight(target, before, weights);
  for (int64_t i = 0; i < place; ++i) before += weights[i];
  const bool is_sure = before + error < target && target + error < before + weights[place];
  return is_sure ? int32_t(block * kBlock + place) : -1;
}

// Draws from what top-p and min-p leave.
int32_t draw_cut(double u, double top_p, double min_p, const Scale& scale, Row& row) {
  const bool has_top_p = top_p < 1;
  const double sum = weigh_all(scale, has_top_p ? 0 : min_p, row);
  Cut cut{0, row.size};
  if (has_top_p) cut = nucleus(top_p, sum, row);
  if (min_p > cut.least) cut = {min_p, row.size};  // of weight 1, the likeliest
  apply(cut, row);
  double total = 0, before = 0;
  for (int64_t b = 0; b < row.num_blocks(); ++b) total += row.block_sum[b];
  const int64_t block = find_block(u * total, row, before);
  const double* weights = row.values + block * kBlock;
  return row.token(block * kBlock + find_weight(u * total, before, weights));
}

bool has_restrictions(const SampleParams& p, int64_t s) {
  return p.mask_rows[s] >= 0 || p.seen_offsets[s] < p.seen_offsets[s + 1] ||
         p.bias_offsets[s] < p.bias_offsets[s + 1];
}

void sample_row(const SampleParams& p, int64_t s) {
  const float* logits = p.logits + p.rows[s] * p.vocab_size;
  const int64_t best = best_logit(logits, p.vocab_size);
  p.token_ids[s] = int32_t(best);
  p.has_token[s] = is_finite(logits[best]);
  const bool greedy = p.temperature[s] == 0, restricted = has_restrictions(p, s);
  if (!p.has_token[s] || (greedy && !restricted)) return;
  Row row = make_row(logits, p.vocab_size);
  const bool cut_to_k = p.top_k[s] > 0 && p.top_k[s] < p.vocab_size;
  double highest = logits[best];
  if (restricted) process(p, s, row);
  if (restricted || cut_to_k || p.min_p[s] > 0) find_maxima(row);
  if (restricted) {
    highest = row.highest();
    p.has_token[s] = is_finite(highest);
    if (greedy || !p.has_token[s]) {
      const int64_t block = first_equal(row.block_max, row.num_blocks(), highest);
      const int64_t place = highest > kNone ? first_equal(row.own(block), kBlock, highest) : 0;
      p.token_ids[s] = int32_t(block * kBlock + place);
      return;
    }
  }
  if (cut_to_k) keep_top_k(p.top_k[s], p.vocab_size, row);
  const Scale scale = scale_of(highest, p.temperature[s]);
  const double u = uniform(p.seed[s], p.index[s], p.position[s]);
  if (p.top_p[s] < 1 || p.min_p[s] > 0) {
    p.token_ids[s] = draw_cut(u, p.top_p[s], p.min_p[s], scale, row);
    return;
  }
  const int32_t sure = cut_to_k ? -1 : draw_roughly(u, scale, row);
  p.token_ids[s] = sure >= 0 ? sure : draw_uncut(u, scale, row);
}

}  // namespace

void sample(const SampleParams& p) {
  const int64_t row_bytes = p.vocab_size * int64_t(sizeof(float));
  for_each_row(p.num_samples, row_bytes, [&](int64_t s) { sample_row(p, s); });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
