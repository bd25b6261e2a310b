// The scores of one sample: logits as they lie, until penalties, a bias or a mask change a block of
// them, or something selects from it; then that block has float64 values of its own.
#pragma once

#include <limits>

#include "cpu/runtime/task.h"
#include "cpu/simd/float64.h"
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

inline size_t room(int64_t vocab_size) {
  const int64_t blocks = ceil_div(vocab_size, kBlock);
  return size_t(blocks * kBlock * 3 + blocks * 2) * sizeof(double) + vocab_size * sizeof(int32_t) +
         blocks * sizeof(Source);
}

inline Row make_row(const float* logits, int64_t vocab_size) {
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

inline int32_t* id_room(const Row& row, int64_t vocab_size) {
  return reinterpret_cast<int32_t*>(row.block_sum + ceil_div(vocab_size, kBlock));
}

inline void find_maxima(Row& row) {
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.sources[b] == Source::kLogits && row.block_size(b) == kBlock) {
      row.block_max[b] = block_maximum(row.logits + b * kBlock, row.allowed(b));
    } else {
      row.block_max[b] = block_maximum(row.own(b));
    }
  }
}

// Where bit i % 32 of word i / 32 is not set, token i cannot come.
inline void apply_mask(const uint32_t* words, Row& row) {
  row.mask = words;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.sources[b] != Source::kValues) continue;
    keep_allowed(row.allowed(b), kNone, row.values + b * kBlock);
  }
}

// Penalties, bias and mask, in this order.
inline void process(const SampleParams& p, int64_t s, Row& row) {
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

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
