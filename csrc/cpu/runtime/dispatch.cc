#include "cpu/runtime/dispatch.h"

#include <atomic>
#include <cstring>

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
CLRT_DECLARE(avx512_bf16)
#endif

namespace {

struct Available {
  const KernelTable* tables[4];
  size_t n = 0;

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd");
    const bool has_avx512_bf16 =
        has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    add(has_avx512_bf16, &avx512_bf16::table);
    add(has_avx512, &avx512::table);
    add(has_avx2, &avx2::table);
#endif
    add(true, &baseline::table);
  }

  void add(bool cpu_has_it, const KernelTable* table) {
    if (cpu_has_it && table) tables[n++] = table;
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
