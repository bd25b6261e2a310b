// The part of linear whose weights are quantised.
#pragma once

#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {

void linear_quantized(const FusedLinearParams& params);

}  // namespace CLRT_ISA
}  // namespace codellama_rt
