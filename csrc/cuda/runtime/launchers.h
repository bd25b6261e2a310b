// The launchers of every op, each in the file of its name. They put work on the stream of
// runtime.h, and throw where they refuse or CUDA does.
#pragma once

#include "ops.h"

namespace codellama_rt {
namespace cuda {

#define CLRT_OP(name, Params, signature) void name(const Params&);
#include "ops.def"

}  // namespace cuda
}  // namespace codellama_rt
