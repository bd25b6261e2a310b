#include "cpu/runtime/dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace codellama_rt {

// Weak: a build may have left one out (CODELLAMA_RT_ISAS), whose table then is null.
#define CLRT_DECLARE(isa)                               \
  namespace isa {                                       \
  extern const KernelTable table __attribute__((weak)); \
  }
namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
CLRT_DECLARE(avx2)
CLRT_DECLARE(avx512)
CLRT_DECLARE(avx512_vnni)
CLRT_DECLARE(avx512_bf16)
#endif

namespace {

// Which of two sets comes first where a CPU has both is settled by its maker, never by a
// measurement: the two round bfloat16 products differently, and the bits of one machine must not
// change with its load. What decides is VDPBF16PS beside float32 FMA, in FLOP a cycle and core:
//   AMD Zen 4    64 beside 32 (EPYC of family 25 model 17: 471 beside 235 GFLOP/s on two cores)
//   Intel        30 beside 61 (Xeon of family 6 model 207: 150-180 beside 348-380; prompts of a 7B
//                model 1.77 times as fast without it). It was made for AMX, which is not used here.
//   any other    unknown: as on Intel, whose first choice has the smaller error
struct Preference {
  const char* vendor;  // as CPUID spells it; null: any other
  const char* sets[5];
};
constexpr Preference kPreferences[] = {
    {"AuthenticAMD", {"avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline"}},
    {nullptr, {"avx512_vnni", "avx512_bf16", "avx512", "avx2", "baseline"}},
};

bool can_run(const Cpu& cpu, const std::string& set) {
  if (set == "avx2") return cpu.avx2;
  if (set == "avx512") return cpu.avx2 && cpu.avx512;
  if (set == "avx512_vnni") return cpu.avx2 && cpu.avx512 && cpu.avx512_vnni;
  if (set == "avx512_bf16") return cpu.avx2 && cpu.avx512 && cpu.avx512_vnni && cpu.avx512_bf16;
  return set == "baseline";
}

Cpu this_cpu() {
  Cpu cpu;
#if defined(__x86_64__)
  unsigned highest = 0, name[3] = {};
  __get_cpuid(0, &highest, &name[0], &name[2], &name[1]);
  cpu.vendor.assign(reinterpret_cast<const char*>(name), sizeof(name));
  __builtin_cpu_init();
  cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  cpu.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512cd");
  cpu.avx512_vnni = __builtin_cpu_supports("avx512vnni");
  cpu.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
#endif
  return cpu;
}

// The tables that this build has; a set that was left out is not among them.
const KernelTable* built_table(const std::string& set) {
#if defined(__x86_64__)
  if (set == "avx2") return &avx2::table;
  if (set == "avx512") return &avx512::table;
  if (set == "avx512_vnni") return &avx512_vnni::table;
  if (set == "avx512_bf16") return &avx512_bf16::table;
#endif
  return set == "baseline" ? &baseline::table : nullptr;
}

struct Available {
  const KernelTable* tables[5];
  size_t n = 0;

  Available() {
    for (const char* set : isas_of(this_cpu())) {
      if (const KernelTable* table = built_table(set)) tables[n++] = table;
    }
  }

  const KernelTable* find(const char* name) const {
    for (size_t i = 0; i < n; ++i) {
      if (std::strcmp(tables[i]->isa, name) == 0) return tables[i];
    }
    return nullptr;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

std::vector<const char*> isas_of(const Cpu& cpu) {
  const Preference* preference = kPreferences;
  while (preference->vendor && cpu.vendor != preference->vendor) ++preference;
  std::vector<const char*> sets;
  for (const char* set : preference->sets) {
    if (can_run(cpu, set)) sets.push_back(set);
  }
  return sets;
}

const KernelTable* const* available_isas(size_t* n) {
  *n = available().n;
  return available().tables;
}

bool set_isa(const char* name) {
  const KernelTable* table = available().find(name);
  if (table) chosen.store(table);
  return table != nullptr;
}

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (!table) chosen.store(table = available().tables[0]);
  return *table;
}

}  // namespace codellama_rt
