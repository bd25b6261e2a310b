// Which instruction set's kernels run: the best for this CPU, or the one asked for.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "ops.h"

namespace codellama_rt {

// What CPUID says about a CPU. A feature counts if the operating system supports it as well.
struct Cpu {
  std::string vendor;  // "GenuineIntel", "AuthenticAMD", ...
  bool avx2 = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false;
};

#pragma GCC visibility push(default)
std::vector<const char*> isas_of(const Cpu& cpu);     // that it can run, whatever was built
const KernelTable& kernels();                         // chosen at the first call
const KernelTable* const* available_isas(size_t* n);  // of this CPU and build, best first
bool set_isa(const char* name);                       // false: this CPU or build lacks it
#pragma GCC visibility pop

}  // namespace codellama_rt
