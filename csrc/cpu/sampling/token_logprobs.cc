// token_logprobs: log softmax of rows of logits, at a given token and at the likeliest ones
// Shapes   logits (num_logits, vocab_size); token t reads row rows[t] of them; see ops.h
// Traffic  num_tokens * vocab_size * 4 bytes read
// Limit    float64 arithmetic: one exp per logit
// Tiling   one task = one token; a block of 64 logits is compared with the likeliest found so far
//          only if its greatest one is above them
// Numerics float64, sums as in sample.cc: the same bits on every instruction set
#include <cmath>

#include "cpu/runtime/task.h"
#include "cpu/simd/float64.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// The logarithm of the sum of e^(x - highest).
double log_total(const float* logits, int64_t size, double highest) {
  double total = 0;
  double weights[kBlock];
  const int64_t whole = size / kBlock * kBlock;
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    total += weigh_block(logits + begin, highest, kLog2E, weights);
  }
  if (whole < size) {
    for (int64_t i = 0; i < kBlock; ++i) {
      weights[i] = 0;
      if (whole + i < size) weights[i] = exp2_nonpositive((logits[whole + i] - highest) * kLog2E);
    }
    total += block_total(weights);
  }
  return std::log(total);
}

int32_t rank_of(const float* logits, int64_t size, int64_t token) {
  int32_t before = 0;
  for (int64_t i = 0; i < size; ++i) before += logits[i] > logits[token];
  for (int64_t i = 0; i < token; ++i) before += logits[i] == logits[token];
  return before + 1;
}

// Writes the ids of the highest logits, highest first; of equal ones the lower id goes first.
void find_likeliest(const float* logits, int64_t size, int32_t* ids, int64_t num_top) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = smaller(kBlock, size - begin);
    const bool full = found == num_top;
    if (full && highest_order(logits + begin, count) <= order_of(logits[ids[num_top - 1]])) {
      continue;
    }
    for (int64_t i = begin; i < begin + count; ++i) {
      if (found == num_top && !(logits[i] > logits[ids[num_top - 1]])) continue;
      int64_t at = found < num_top ? found++ : num_top - 1;
      for (; at > 0 && logits[i] > logits[ids[at - 1]]; --at) ids[at] = ids[at - 1];
      ids[at] = int32_t(i);
    }
  }
}

void rank_token(const TokenLogprobsParams& p, int64_t t) {
  const float* logits = p.logits + p.rows[t] * p.vocab_size;
  double* logprobs = p.logprobs + t * (1 + p.num_top);
  int32_t* top_ids = p.top_ids + t * p.num_top;
  p.ranks[t] = rank_of(logits, p.vocab_size, p.token_ids[t]);
  for (int64_t i = 0; i < p.num_top; ++i) top_ids[i] = -1;
  for (int64_t i = 0; i <= p.num_top; ++i) logprobs[i] = std::nan("");
  const double highest = logits[best_logit(logits, p.vocab_size)];
  if (!is_finite(highest)) return;
  const double log_sum = highest + log_total(logits, p.vocab_size, highest);
  logprobs[0] = logits[p.token_ids[t]] - log_sum;
  if (p.num_top > 0) find_likeliest(logits, p.vocab_size, top_ids, p.num_top);
  for (int64_t i = 0; i < smaller(p.num_top, p.vocab_size); ++i) {
    logprobs[1 + i] = logits[top_ids[i]] - log_sum;
  }
}

}  // namespace

void token_logprobs(const TokenLogprobsParams& p) {
  for_each_task(p.num_tokens, [&](int64_t t) { rank_token(p, t); });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
