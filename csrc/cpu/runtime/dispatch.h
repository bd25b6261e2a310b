// Which instruction set's kernels run: the best this CPU has, or the one asked for.
#pragma once

#include <cstddef>

#include "ops.h"

namespace codellama_rt {

#pragma GCC visibility push(default)
const KernelTable& kernels();                         // chosen at the first call
const KernelTable* const* available_isas(size_t* n);  // best first
bool set_isa(const char* name);                       // false: this CPU or build lacks it
#pragma GCC visibility pop

}  // namespace codellama_rt
