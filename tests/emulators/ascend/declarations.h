// What a kernel declares to CANN's compiler: which cores it starts, and its tiling struct.
#pragma once

#include "global_memory.h"

// Vector cores alone: without, and with the address that SyncAll's hardware needs.
enum KernelMetaType { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_MIX_AIV_1_0 };

namespace ascend_emu {

// The kernel's copy of what the host planned.
template <typename Tiling>
void copy_tiling(Tiling* to, const uint8_t* from) {
  core().issue(PIPE_S, "GET_TILING_DATA_WITH_STRUCT");
  if (core().tiling_bytes != int64_t(sizeof(Tiling))) {
    fail("GET_TILING_DATA_WITH_STRUCT: REGISTER_TILING_DEFAULT declares another struct, or none");
  }
  global_memory().read(from, sizeof(Tiling));
  std::memcpy(to, from, sizeof(Tiling));
}

}  // namespace ascend_emu

#define KERNEL_TASK_TYPE_DEFAULT(type) ascend_emu::core().has_sync = type == KERNEL_TYPE_MIX_AIV_1_0
#define REGISTER_TILING_DEFAULT(Tiling) ascend_emu::core().tiling_bytes = sizeof(Tiling)
#define GET_TILING_DATA_WITH_STRUCT(Tiling, name, from) \
  Tiling name;                                          \
  ascend_emu::copy_tiling(&name, from)
