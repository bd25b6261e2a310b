#include "cuda/runtime/dispatch.h"

#include "cuda/runtime/launchers.h"

namespace codellama_rt {

const KernelTable& kernels() {
  static const KernelTable table = [] {
    KernelTable t{};
    t.isa = "cuda";
#define CLRT_OP(name, Params, signature) t.name = cuda::name;
#include "ops.def"
    return t;
  }();
  return table;
}

}  // namespace codellama_rt
