// The device's table of kernels, as launch.cc asks for it; each runs on the stream of runtime.h.
#pragma once

#include "ops.h"

namespace codellama_rt {

const KernelTable& kernels();

}  // namespace codellama_rt
