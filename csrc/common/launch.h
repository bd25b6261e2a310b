// The ops on tensors of any framework: checks, then the kernel of the chosen instruction set.
//
// Both bindings end here: bind/python.cc (direct calls) and bind/mindspore.cc (graph ops).
// Each throws std::invalid_argument or DtypeError before anything is written.
#pragma once

#include "common/check.h"

namespace codellama_rt {
struct DecoderLayer;

// The weights of linear, which lie apart.
struct Weights {
  static constexpr int kMost = 8;  // that reach its check, which wants up to kMaxWeights
  TensorView tensors[kMost];
  int count = 0;

  void add(const TensorView& tensor) {
    if (count < kMost) tensors[count++] = tensor;
  }
};

#pragma GCC visibility push(default)
namespace launch {

#define CLRT_OP(name, Params, signature) void name signature;
#define CLRT_COMPOSED_OP(name, signature) void name signature;
#define CLRT_DIRECT_OP(name, Params, signature) void name signature;
#include "ops.def"

}  // namespace launch
#pragma GCC visibility pop

}  // namespace codellama_rt
