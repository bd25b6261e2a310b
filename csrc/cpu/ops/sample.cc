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
#include <limits>

#include "cpu/runtime/task.h"
#include "cpu/simd/float32_weights.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr double kMost = std::numeric_limits<double>::max();
constexpr double kNone = -std::numeric_limits<double>::infinity();  // of a token that cannot come

enum class Source : uint8_t { kLogits, kValues };  // where the scores of a block are

// The scores of a sample, later its weights: e^(score - highest), proportional to probabilities.
struct Row {
  const float* logits;   // (size) at first
  const uint32_t* mask;  // (ceil(size / 32)) where the scores are logits; null: all can come
  double* values;        // (size padded to blocks), ascending tokens; padding: kNone, later 0
  Source* sources;       // (num_blocks)
  double* block_max;     // (num_blocks) of scores
  double* block_sum;     // (num_blocks) of weights
  int32_t* token_ids;    // (size) after top-k; null: value i is that of token i
  double* candidates;    // (vocab_size) room for selections
  double* selected;      // (vocab_size) the same
  int64_t size;

  int64_t num_blocks() const { return ceil_div(size, kBlock); }
  int64_t block_size(int64_t b) const { return smaller(kBlock, size - b * kBlock); }
  double highest() const {
    double best = block_max[0];
    for (int64_t b = 1; b < num_blocks(); ++b) best = block_max[b] > best ? block_max[b] : best;
    return best;
  }
  int32_t token(int64_t i) const { return token_ids ? token_ids[i] : int32_t(i); }

  // Bit i: whether token i of the block can come, as far as the mask is concerned.
  uint64_t allowed(int64_t b) const {
    const int64_t count = block_size(b);
    const uint64_t in_row = count == kBlock ? kAll : (uint64_t{1} << count) - 1;
    if (!mask) return in_row;
    const uint64_t high = count > 32 ? mask[2 * b + 1] : 0;
    return (high << 32 | mask[2 * b]) & in_row;
  }

  // The scores of a block as its own values.
  double* own(int64_t b) const {
    double* own_values = values + b * kBlock;
    if (sources[b] != Source::kLogits) return own_values;
    const float* from = logits + b * kBlock;
    const int64_t count = block_size(b);
    if (count == kBlock) {
      for (int i = 0; i < kBlock; ++i) own_values[i] = from[i];
    } else {
      for (int64_t i = 0; i < count; ++i) own_values[i] = from[i];
    }
    if (allowed(b) != kAll) keep_allowed(allowed(b), kNone, own_values);
    sources[b] = Source::kValues;
    return own_values;
  }
};

size_t room(int64_t vocab_size) {
  const int64_t blocks = ceil_div(vocab_size, kBlock);
  return size_t(blocks * kBlock * 3 + blocks * 2) * sizeof(double) + vocab_size * sizeof(int32_t) +
         blocks * sizeof(Source);
}

Row make_row(const float* logits, int64_t vocab_size) {
  const int64_t blocks = ceil_div(vocab_size, kBlock), padded = blocks * kBlock;
  auto* memory = static_cast<double*>(scratch(Scratch::kTask, room(vocab_size)));
  Row row{};
  row.logits = logits;
  row.values = memory;
  row.candidates = row.values + padded;
  row.selected = row.candidates + padded;
  row.block_max = row.selected + padded;
  row.block_sum = row.block_max + blocks;
  row.size = vocab_size;
  // After them the ids of the tokens that top-k keeps, if it does.
  row.sources = reinterpret_cast<Source*>(row.block_sum + blocks) + vocab_size * sizeof(int32_t);
  for (int64_t b = 0; b < blocks; ++b) row.sources[b] = Source::kLogits;
  return row;
}

int32_t* id_room(const Row& row, int64_t vocab_size) {
  return reinterpret_cast<int32_t*>(row.block_sum + ceil_div(vocab_size, kBlock));
}

void find_maxima(Row& row) {
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.sources[b] == Source::kLogits && row.block_size(b) == kBlock) {
      row.block_max[b] = block_maximum(row.logits + b * kBlock, row.allowed(b));
    } else {
      row.block_max[b] = block_maximum(row.own(b));
    }
  }
}

// Where bit i % 32 of word i / 32 is not set, token i cannot come.
void apply_mask(const uint32_t* words, Row& row) {
  row.mask = words;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.sources[b] != Source::kValues) continue;
    keep_allowed(row.allowed(b), kNone, row.values + b * kBlock);
  }
}

// Penalties, bias and mask, in this order.
void process(const SampleParams& p, int64_t s, Row& row) {
  const double repetition = p.repetition_penalty[s], frequency = p.frequency_penalty[s];
  const auto score = [&](int32_t id) -> double& { return row.own(id / kBlock)[id % kBlock]; };
  for (int64_t i = p.seen_offsets[s]; i < p.seen_offsets[s + 1]; ++i) {
    double& x = score(p.seen_ids[i]);
    x = x > 0 ? x / repetition : x * repetition;
    if (p.seen_counts[i] > 0) x -= p.presence_penalty[s];
    x -= frequency * p.seen_counts[i];
  }
  for (int64_t i = p.bias_offsets[s]; i < p.bias_offsets[s + 1]; ++i) {
    score(p.bias_ids[i]) += p.bias_values[i];
  }
  if (p.mask_rows[s] >= 0) {
    apply_mask(p.masks + p.mask_rows[s] * ceil_div(p.vocab_size, 32), row);
  }
}

double middle_of(double a, double b, double c) {
  return (a > b) == (b > c) ? b : (b > a) == (a > c) ? a : c;
}

// The greatest number below a positive one.
double before_double(double x) { return from_bits(bits_of(x) - 1); }

// Puts the k-th in descending order at k: none before it is less, none after it is greater.
// (Hoare's FIND. No std::nth_element: its parts may be shared between instruction sets.)
double select(double* x, int64_t size, int64_t k) {
  int64_t low = 0, high = size - 1;
  while (low < high) {
    const double pivot = middle_of(x[low], x[low + (high - low) / 2], x[high]);
    int64_t i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i > j) break;
      const double moved = x[i];
      x[i++] = x[j];
      x[j--] = moved;
    }
    if (k > j && k < i) break;
    if (k <= j) high = j;
    if (k >= i) low = i;
  }
  return x[k];
}

// Calls body with the position and the value of each that is at least `bound`, ascending. No value
// of a block is above the block's limit: its maximum, or the sum of its weights.
template <typename Body>
void for_each_from(const Row& row, const double* limits, double bound, const Body& body) {
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (limits[b] < bound) continue;
    const double* values = row.own(b);
    for (int64_t i = 0; i < kBlock; ++i) {
      if (values[i] >= bound) body(b * kBlock + i, values[i]);
    }
  }
}

// Gathers the values above `over`, ascending tokens, and returns their number. After them there is
// room for whole blocks.
int64_t gather_above(const Row& row, const double* limits, double over, double* out) {
  int64_t count = 0;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (limits[b] > over) {
      count += append_within(row.own(b), over, kMost, out + count);
    }
  }
  return count;
}

// Leaves the k highest scores, with those equal to the k-th. As many blocks hold a score of at
// least the k-th highest block's maximum: nothing below it can be among them.
void keep_top_k(int64_t k, int64_t vocab_size, Row& row) {
  double bound = kNone;
  if (k <= row.num_blocks()) {
    std::memcpy(row.selected, row.block_max, row.num_blocks() * sizeof(double));
    bound = select(row.selected, row.num_blocks(), k - 1);
  }
  const int64_t num_above = gather_above(row, row.block_max, bound, row.candidates);
  const double kth = k <= num_above ? select(row.candidates, num_above, k - 1) : bound;
  int32_t* ids = id_room(row, vocab_size);
  int64_t kept = 0;
  for_each_from(row, row.block_max, kth > kNone ? kth : -kMost, [&](int64_t i, double x) {
    row.values[kept] = x;  // kept <= i
    ids[kept++] = int32_t(i);
  });
  row.token_ids = ids;
  row.size = kept;
  for (int64_t i = kept; i < row.num_blocks() * kBlock; ++i) row.values[i] = kNone;
  for (int64_t b = 0; b < row.num_blocks(); ++b) row.sources[b] = Source::kValues;
  find_maxima(row);
}

// How scores become weights: 2^((score - highest) * factor); the highest has the weight 1.
struct Scale {
  double highest, factor;
};

Scale scale_of(double highest, double temperature) {
  // Of the tiniest temperatures the reciprocal is infinite, and 0 times it would be NaN.
  return {highest, kLog2E / temperature < kMost ? kLog2E / temperature : kMost};
}

// Writes the weights of a block, and returns their sum.
double weigh(const Row& row, int64_t b, const Scale& scale, double* weights) {
  const double highest = scale.highest, factor = scale.factor;
  if (row.sources[b] == Source::kLogits && row.block_size(b) == kBlock) {
    return weigh_block(row.logits + b * kBlock, highest, factor, weights, row.allowed(b));
  }
  return weigh_block(row.own(b), highest, factor, weights);
}

// Scores become weights; returns their sum. Of blocks whose weights are all below `least`, by their
// maxima, the weights are left out: they are cut off later.
double weigh_all(const Scale& scale, double least, Row& row) {
  // Rounding may leave a weight above that of the maximum, by some 1e-16.
  const double bound = least > 0 ? std::log2(least) - 1e-9 : kNone;
  double total = 0;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    row.block_sum[b] = 0;
    if (least > 0 && (row.block_max[b] - scale.highest) * scale.factor < bound) continue;
    row.block_sum[b] = weigh(row, b, scale, row.values + b * kBlock);
    row.sources[b] = Source::kValues;
    total += row.block_sum[b];
  }
  return total;
}

// Which weights are kept: those above `least`, and those equal to it up to a position.
struct Cut {
  double least;
  int64_t last_equal;
};

// Gathers those of x that are in (over, most], ascending, with zeros up to a whole block, and
// returns their number. x has zeros up to a whole block as well, and may be `out`.
int64_t gather_within(const double* x, int64_t size, double over, double most, double* out) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    count += append_within(x + begin, over, most, out + count);
  }
  for (int64_t i = count; i % kBlock != 0; ++i) out[i] = 0;
  return count;
}

double total_of(const double* x, int64_t size) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) total += block_total(x + begin);
  return total;
}

// The nucleus (arXiv:1904.09751): the weights with at most `mass` before them in descending order;
// of equal ones the lower token goes first. The last weight to keep is looked for as by quicksort,
// in the part of the pivot that has it.
Cut nucleus(double top_p, double total, const Row& row) {
  const double mass = top_p * total;
  // Weights up to `over` sum to no more than the mass left out, so none of them is kept but the
  // highest, which always is.
  double over = (total - mass) / double(row.size), most = 1, before = 0;
  if (over >= most) over = before_double(most);
  double *run = row.candidates, *upper = row.selected;
  int64_t size = gather_above(row, row.block_sum, over, run);
  for (int64_t i = size; i % kBlock != 0; ++i) run[i] = 0;
  double least = 0;
  int64_t num_equal = 0;
  for (int round = 1;; ++round) {
    least = middle_of(run[0], run[size / 2], run[size - 1]);
    // At times between the bounds, so that no order of the weights takes long.
    if (round % 8 == 0) least = from_bits((bits_of(over) + bits_of(most) + 1) / 2);
    const int64_t num_upper = gather_within(run, size, least, most, upper);
    const double with_upper = before + total_of(upper, num_upper);
    if (with_upper > mass) {
      double* const other = run;
      run = upper, upper = other, size = num_upper, over = least;
      continue;
    }
    const int64_t num_lower = gather_within(run, size, over, before_double(least), run);
    num_equal = size - num_upper - num_lower;
    before = with_upper;
    if (num_lower == 0 || before + num_equal * least > mass) break;
    before += num_equal * least;
    size = num_lower, most = before_double(least);
  }
  Cut cut{least, row.size};
  const double more = mass > before ? (mass - before) / least : 0;  // equal ones after the first
  if (more + 1 >= double(num_equal)) return cut;
  int64_t left = int64_t(more) + 1;
  for_each_from(row, row.block_sum, least, [&](int64_t i, double weight) {
    if (weight == least && left > 0 && --left == 0) cut.last_equal = i;
  });
  return cut;
}

// Weights that are cut off become 0.
void apply(const Cut& cut, Row& row) {
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.block_sum[b] < cut.least) {
      row.block_sum[b] = 0;
      continue;
    }
    double* weights = row.values + b * kBlock;
    const int64_t last = cut.last_equal - b * kBlock;
    for (int i = 0; i < kBlock; ++i) weights[i] = weights[i] >= cut.least ? weights[i] : 0;
    for (int64_t i = larger(last + 1, 0); i < kBlock; ++i) {
      weights[i] = weights[i] > cut.least ? weights[i] : 0;
    }
    row.block_sum[b] = block_total(weights);
  }
}

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
