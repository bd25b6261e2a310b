// What top-k, top-p and min-p leave of a row, without sorting it: each looks for the last token
// that it keeps by selection, in the blocks that can hold it.
#pragma once

#include <cmath>

#include "cpu/sampling/row.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

inline double middle_of(double a, double b, double c) {
  return (a > b) == (b > c) ? b : (b > a) == (a > c) ? a : c;
}

// The greatest number below a positive one.
inline double before_double(double x) { return from_bits(bits_of(x) - 1); }

// Puts the k-th in descending order at k: none before it is less, none after it is greater.
// (Hoare's FIND. No std::nth_element: its parts may be shared between instruction sets.)
inline double select(double* x, int64_t size, int64_t k) {
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
inline void for_each_from(const Row& row, const double* limits, double bound, const Body& body) {
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
inline int64_t gather_above(const Row& row, const double* limits, double over, double* out) {
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
inline void keep_top_k(int64_t k, int64_t vocab_size, Row& row) {
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

inline Scale scale_of(double highest, double temperature) {
  // Of the tiniest temperatures the reciprocal is infinite, and 0 times it would be NaN.
  return {highest, kLog2E / temperature < kMost ? kLog2E / temperature : kMost};
}

// Writes the weights of a block, and returns their sum.
inline double weigh(const Row& row, int64_t b, const Scale& scale, double* weights) {
  const double highest = scale.highest, factor = scale.factor;
  if (row.sources[b] == Source::kLogits && row.block_size(b) == kBlock) {
    return weigh_block(row.logits + b * kBlock, highest, factor, weights, row.allowed(b));
  }
  return weigh_block(row.own(b), highest, factor, weights);
}

// Scores become weights; returns their sum. Of blocks whose weights are all below `least`, by their
// maxima, the weights are left out: they are cut off later.
inline double weigh_all(const Scale& scale, double least, Row& row) {
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
inline int64_t gather_within(const double* x, int64_t size, double over, double most, double* out) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    count += append_within(x + begin, over, most, out + count);
  }
  for (int64_t i = count; i % kBlock != 0; ++i) out[i] = 0;
  return count;
}

inline double total_of(const double* x, int64_t size) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) total += block_total(x + begin);
  return total;
}

// The nucleus (arXiv:1904.09751): the weights with at most `mass` before them in descending order;
// of equal ones the lower token goes first. The last weight to keep is looked for as by quicksort,
// in the part of the pivot that has it.
inline Cut nucleus(double top_p, double total, const Row& row) {
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
inline void apply(const Cut& cut, Row& row) {
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

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
